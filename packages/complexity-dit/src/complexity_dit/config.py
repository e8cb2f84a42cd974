"""Settings of every command as dataclasses; the sentence under a field is its `--help`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from inl_core.run.errors import UserError


@dataclass
class DataConfig:
    """Which pictures to read, at what size, and which of them are held out."""

    source: str = "art"
    """Where the pictures come from: `art` (drawn by this package), `imagefolder:PATH` (a folder
    with or without metadata.csv) or `hub:NAME` (a dataset of the Hugging Face hub, or a folder
    that `datasets.load_dataset` can read). Training also takes `latents:PATH`, which
    `complexity-dit encode` made from one of these."""

    vae: str | None = None
    """VAE of latents, as hub id or folder: `AutoencoderKL`, `AutoencoderTiny`, `TinyAutoencoder` or
    the files of TAEF2. Training needs it only when the one that the cache names has moved."""

    resolution: int = 32
    """Side of the square training pictures in pixels; smaller images are skipped and counted."""

    label_fields: list[str] | None = None
    """Columns used as labels; by default every ClassLabel column and every text column whose
    names repeat at least twice on average; `[]` for none."""

    holdout: float = 0.1
    """Fraction held out for evaluation, chosen by the hash of each file's bytes: adding files
    never moves one across, and byte-identical files stay on one side."""

    num_images: int = 8192
    """How many pictures the `art` source draws; other sources always give all they have."""

    flip: bool = True
    """Mirror half of the training pictures left to right, at random; for latents, `encode` must
    have been told the same: false leaves the mirror images out, at half the time and space."""

    balanced_labels: str | None = None
    """Label field whose labels training reads equally often, rare or not; pictures without that
    label keep their share. By default every picture comes equally often."""

    strict: bool = False
    """Stop at the first unreadable or too small image instead of skipping it."""

    image_column: str | None = None
    """Column that holds the picture; by default `image`, or the only image column there is."""

    num_workers: int = 0
    """Processes that decode the pictures the first time a source is read; 0 uses this one."""


@dataclass
class ObjectiveConfig:
    """The training target and the distribution of noise levels."""

    prediction_type: Literal["flow", "epsilon", "v_prediction"] = "flow"
    """flow: velocity of the straight path from image to noise; the others use the DDPM schedule."""

    network_output: Literal["sample", "target"] | None = None
    """What the network writes: the clean image (`sample`, flow only), from which the velocity
    follows, or the target itself; the loss is on the target either way. By default sample for
    flow, target for the others."""

    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the noise level t in (0, 1)."""

    logit_mean: float = 0.0
    """Mean of logit(t) for logit_normal; above 0 favours high noise."""

    logit_std: float = 1.0
    """Standard deviation of logit(t) for logit_normal."""

    shift: float = 2.0
    """Time shift s in training: t becomes s*t / (1 + (s - 1)*t); above 1 puts more of it on high
    noise, where composition is decided. 1 is off."""

    sampling_shift: float = 5.0
    """Time shift in sampling (flow only). Above the training's: the last step, to the clean image,
    then starts from more noise, whose traces a small network cannot remove in smaller steps."""

    label_dropout: float | dict[str, float] = 0.1
    """Probability that each label of an image is replaced by the null row, for guidance; or one
    for each label field, e.g. {style: 0.1, artist: 0.5}, every field named."""

    direction_weight: float = 0.0
    """Weight of the velocity-direction term 1 - cosine(prediction, target), added to the squared
    error (FasterDiT, arXiv 2410.10356); flow and v_prediction only. 0 is off."""

    direction_over: Literal["image", "channels"] = "image"
    """What a direction is: image, one for all numbers of an image; or channels, one at each
    position over its channels, which asks for many channels (latents)."""

    @property
    def writes_sample(self) -> bool:
        """Whether the network writes the clean image.

        Raises:
            UserError: If it should, and the objective has no velocity that follows from it.
        """
        if self.network_output == "sample" and self.prediction_type != "flow":
            raise UserError(
                f"network_output sample goes with prediction_type flow, not "
                f"{self.prediction_type}: use --objective.network_output target"
            )
        return self.prediction_type == "flow" and self.network_output != "target"

    def check(self) -> None:
        """Refuse settings that do not fit each other.

        Raises:
            UserError: If a weight or a probability is out of range, or the direction term is asked
                for where the target is no velocity.
        """
        _ = self.writes_sample
        if not (math.isfinite(self.direction_weight) and self.direction_weight >= 0):
            raise UserError(
                f"direction_weight {self.direction_weight} must be 0 (off) or a positive number"
            )
        if self.direction_weight and self.prediction_type == "epsilon":
            raise UserError(
                f"direction_weight {self.direction_weight} needs a velocity as the target: use "
                "prediction_type flow or v_prediction, or direction_weight 0 with epsilon"
            )
        dropout = self.label_dropout
        for label, value in dropout.items() if isinstance(dropout, dict) else [("", dropout)]:
            if not 0 <= value <= 1:
                name = f"label_dropout of {label}" if label else "label_dropout"
                raise UserError(f"{name}: {value} must be a probability, from 0 to 1")

    def label_dropouts(self, fields: Sequence[str]) -> list[float]:
        """The dropout probability of each label field, in their order.

        Raises:
            UserError: If `label_dropout` names a field that is not there, or leaves one out.
        """
        if not isinstance(self.label_dropout, dict):
            return [self.label_dropout] * len(fields)
        if set(self.label_dropout) != set(fields):
            raise UserError(
                f"label_dropout names {', '.join(self.label_dropout) or 'no field'}, but the label "
                f"fields of the data are {', '.join(fields) or 'none'}: give each of them a "
                "probability (0 for never), or one number for all"
            )
        return [self.label_dropout[field] for field in fields]


@dataclass
class SampleConfig:
    """How pictures are painted; all of it is part of a result's settings."""

    seed: int = 0
    """Seed of the set; the noise of image i comes from (seed, i) alone."""

    num_inference_steps: int = 20
    """Denoising steps: one evaluation of the network each, two with Heun, twice that guided."""

    scheduler: str | None = None
    """Class name of a diffusers scheduler, e.g. DPMSolverMultistepScheduler; the pipeline's own by
    default."""

    shift: float | None = None
    """Time shift of a flow-matching scheduler; the one saved in the pipeline by default."""

    guidance_scale: float = 2.0
    """Classifier-free guidance, or autoguidance if that is given; 1 is off."""

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels in [0, 1] within which guidance acts."""

    autoguidance: str | None = None
    """Pipeline folder of a weaker model of the same data, e.g. an early checkpoint's, that guidance
    leads away from instead of from the null rows."""

    height: int | None = None
    """Height in pixels; the training size by default."""

    width: int | None = None
    """Width in pixels; the training size by default."""

    batch_size: int = 64
    """Pictures painted together; bits do not depend on it. Best is a multiple of chunk_size."""

    chunk_size: int = 16
    """Pictures in one network call, padded if need be; a set's bits are defined at this size."""


@dataclass
class PlanConfig:
    """What the config of a run does not say."""

    train_images: int | None = None
    """Training images, to count epochs."""

    channels: int | None = None
    """Channels of the input; by default 3 for pixels, and the cache's for latents that are there
    (32 for TAEF2, 4 for the VAE of Stable Diffusion)."""

    cells: int | None = None
    """Side of the input, in pixels or latent cells; by default data.resolution for pixels and the
    cache's for latents that are there."""

    num_classes: dict[str, int] = field(default_factory=dict)
    """Labels of each field, e.g. {style: 27}; by default the cache's, or none."""

    processes: int = 1
    """Devices that share the batch."""

    images_per_second: float | None = None
    """A measured speed of all devices together, for the time estimate."""

    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s at the run's precision, e.g. 989 for bf16 on an H100; with
    `mfu`, for the time estimate."""

    mfu: float | None = None
    """Share of the peak that training reaches, e.g. 0.4."""


Dtype = Literal["float32", "bfloat16"]


Resize = Literal["tf1", "pytorch-fid", "antialias"]


# What an evaluation measures; every field's sentence is its ``--help``.

Measure = Literal["fid", "kid", "prdc", "sfid", "is"]


@dataclass
class EvalConfig:
    """What is measured, at how many images and with which network."""

    num_images: int = 2048
    """Images of each side (n); at most what a folder or the held-out split has. Compare numbers
    at equal n only."""

    seed: int = 0
    """Seed of the draw of reference images (and so of the labels asked for), of KID subsets and of
    resamples."""

    weights: str = "auto"
    """Feature network: auto (search for Inception, then a random network whose distance is named
    fd_random), random, a file of Inception weights, or the folder of a transformers vision model
    (DINOv2, CLIP), whose distance is named after it."""

    resize: Resize = "tf1"
    """How images reach 299 px: tf1 (torch-fidelity, ADM), pytorch-fid or antialias (torchmetrics).
    """

    dtype: Dtype = "float32"
    """Arithmetic in the feature network; bfloat16 is faster and only for tracking a training."""

    device: str = "auto"
    """Where everything runs: auto, cpu, cuda, cuda:1."""

    measures: list[Measure] = field(default_factory=lambda: ["fid", "kid", "prdc", "sfid", "is"])
    """fid, kid, prdc (precision, recall, density, coverage), sfid, is (Inception score). What
    cannot be had is named in the result, with the reason."""

    kid_subsets: int = 100
    """Random subsets KID is averaged over."""

    kid_subset_size: int = 1000
    """Images in a KID subset; reduced to n when n is smaller."""

    bootstrap: int = 20
    """Resamples for the standard error of the Frechet distance; 0 for none."""

    curve: bool = True
    """Measure the Frechet distance at n, n/2, n/4 and n/8 and continue it to infinite n; needs the
    bootstrap."""

    label_field: str | None = "style"
    """Label measured by itself, each name, and whose accuracy is measured (nearest class mean in
    feature space, fitted on training images); null for none."""

    label_min: int = 50
    """Images of either side that a label needs for its own numbers."""

    floors: bool = False
    """Also measure the training split, the VAE's reconstruction of the held-out images where the
    pipeline has a VAE, and the held-out images shrunk to 8 px and back, against the held-out
    images."""

    memorisation: bool = False
    """Look for the nearest training image of every sample, beside those of held-out images."""

    memorisation_images: int | None = None
    """Training images searched; null for all of them."""

    keep_images: bool = True
    """Keep the samples as PNGs in the output folder: an interrupted run goes on from them."""

    report: bool = True
    """Write report.html into the output folder."""

    save_statistics: bool = False
    """Write statistics of the reference (reference.npz) into the output folder: a later
    --reference."""

    cache: bool = True
    """Keep features of real images in the user's cache folder."""

    overwrite: bool = False
    """Replace a result that is already in the output folder, and samples of other settings."""

    quiet: bool = False
    """Print no table at the end."""

    @classmethod
    def brief(cls, **fields: Any) -> "EvalConfig":
        """FID and KID alone: every further measure costs minutes of one core, `fields` aside."""
        brief = {
            "measures": ["fid", "kid"], "bootstrap": 0, "curve": False, "label_field": None,
            "report": False,
        }  # fmt: skip
        return cls(**(brief | fields))

    def check(self) -> None:
        """Raise a `UserError` for a value out of range."""
        if self.num_images < 2:
            raise UserError(f"num_images is {self.num_images}; a distance needs at least 2")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UserError(f"bootstrap is {self.bootstrap}; expected 0 for none, or 2 and more")
        if self.label_min < 2:
            raise UserError(f"label_min is {self.label_min}; a distance needs at least 2 images")
        if self.memorisation_images is not None and self.memorisation_images < 2:
            raise UserError(
                f"memorisation_images is {self.memorisation_images}; expected at least 2, or null"
            )
        known = ("fid", "kid", "prdc", "sfid", "is")
        if not self.measures or set(self.measures) - set(known):
            raise UserError(f"measures is {self.measures}; expected some of {', '.join(known)}")


# How the gallery is served and what one request may ask for.


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    max_images: int = 32
    """Pictures painted at once."""

    max_steps: int = 100
    """Denoising steps."""

    max_side: int = 512
    """Height and width in pixels."""

    max_guidance: float = 20.0
    """Guidance scale."""

    def __post_init__(self) -> None:
        for name in ("max_images", "max_steps", "max_side", "max_guidance"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass
class AppConfig:
    """Where the gallery listens, and how many may wait."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is this machine alone, 0.0.0.0 is every network it is in.
    There is no password."""

    port: int = 7860
    """Port to listen on."""

    queue_size: int = 8
    """Requests that may wait while one is painted; more are refused."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    max_images: int = Limits.max_images
    """Pictures painted at once, at most."""

    max_steps: int = Limits.max_steps
    """Denoising steps, at most."""

    max_side: int = Limits.max_side
    """Height and width in pixels, at most."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise UserError(f"port {self.port} must be from 1 to 65535")
        if self.queue_size < 1:
            raise UserError(f"queue_size {self.queue_size} must be at least 1")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_images, self.max_steps, self.max_side)


# Names of the files that our folders have beside those of diffusers.

DATA_FILE = "data.json"
"""In a pipeline or adapter folder: the `DataConfig` that it was trained with."""

ADAPTER_FILE = "adapter.json"
"""In an adapter folder: which pipeline it belongs to."""


@dataclass
class ModelConfig:
    """The network."""

    size: str = "nano"
    """Named size: nano, tiny, mini (CPU), S, B, L, XL."""

    patch_size: int = 4
    """Side of a patch in pixels (or latent cells); one patch is one token."""

    dynamics_placement: Literal["stream", "branch", "force", "force_mlp", "none"] = "branch"
    """Where INL dynamics act in a layer; none is the plain transformer."""

    dynamics_adaptive: Literal["token", "channel", "layer", "lite"] = "channel"
    """What the coefficients of the dynamics depend on; lite has fixed ones."""

    token_drop_rate: float = 0.0
    """Share of an image's tokens, drawn anew at each step, that bypass the middle blocks in
    training (TREAD, arXiv 2501.04765); none do in sampling. 0 is off."""

    token_drop_until: float = 1.0
    """Share of the run after which no token is dropped any more: a last stretch on whole images
    brings the network back to what sampling asks of it (as SPRINT does, arXiv 2510.21986)."""

    token_drop_start: int | None = None
    """First block that dropped tokens bypass, counted from 0; by default 1, the second."""

    token_drop_end: int | None = None
    """Block before which dropped tokens are back; by default the last one."""

    value_residual: bool = False
    """Blend the attention values of every block with the first block's, by a learned share that
    starts at one half (arXiv 2410.17897)."""

    routing: Literal["none", "timestep", "position"] = "none"
    """Experts in place of the MLP, at equal work a token: chosen by the image's noise level, in
    buckets that training meets equally often, or by the token's band of the picture."""

    num_experts: int = 4
    """Experts of each block, beside the shared one; with routing only."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Any other argument of ComplexityDiTTransformer2DModel, e.g. {hidden_size: 256}."""


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices of attention and MLP, and AdamW for the rest: for a GPU, on a
    CPU without bfloat16 units it can cost more than the rest of the step."""

    lr: float = 5e-3
    """Peak learning rate."""

    muon_lr: float | None = None
    """Peak learning rate of Muon, scaled to updates of AdamW's size; by default `lr`."""

    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.95
    """Decay of the second moment."""

    weight_decay: float = 0.01
    """Decay of matrices; norms, biases, mu and label tables are never decayed."""

    warmup_steps: int = 200
    """Steps of linear warm-up."""

    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "cosine"
    """Learning rate after the warm-up."""

    grad_clip: float = 1.0
    """Largest global gradient norm."""

    spike_factor: float = 0.0
    """Skip a step whose gradient norm, before clipping, is more than this many times the 0.9
    quantile of recent norms, and one that is not finite: weights, moments and EMA stay, the
    schedule goes on. Asks the device for the norm at every step. 0 is off: a norm that is not
    finite then stops the run."""

    spike_window: int = 100
    """How many recent norms that quantile is of; nothing finite is skipped before there are."""

    spike_limit: int = 10
    """Most steps in a row without a finite norm that the guard skips; one more stops the run."""


@dataclass
class EMAConfig:
    """The moving average whose weights are saved, sampled and evaluated (diffusers' EMAModel)."""

    decay: float = 0.998
    """Largest decay per step."""

    power: float = 0.75
    """Warm-up: the decay at step s is 1 - (1 + s)^-power until it reaches `decay`."""


@dataclass
class LoraOptions:
    """An adapter in place of a whole network: small matrices, and rows for labels that are new."""

    rank: int = 0
    """Rank of the matrices that are trained beside the frozen weights of `init_from` (LoRA, arXiv
    2106.09685); the run then writes an adapter folder. 0 trains the whole network."""

    alpha: float | None = None
    """Rank times the scale of what the matrices add; by default the rank, which is scale 1."""

    dropout: float = 0.0
    """Dropout before the matrices."""

    targets: list[str] = field(
        default_factory=lambda: [
            "to_q", "to_k", "to_v", "to_out.0", "mlp.gate", "mlp.up", "mlp.down"
        ]
    )  # fmt: skip
    """Linear layers that get matrices, by the end of their names."""

    labels: dict[str, str] = field(default_factory=dict)
    """Labels that all pictures get, e.g. --lora.labels.style Ukiyo_e: for a folder that does not
    say; a name that the base does not know becomes the adapter's."""


@dataclass
class TrainConfig:
    """One full run. The defaults are the demo: a small model that paints the embedded art set."""

    out: str = "runs/train"
    """Folder of the run."""

    resume: str = "none"
    """auto: go on from the last checkpoint in `out`, if any; none; or a checkpoint folder."""

    init_from: str | None = None
    """A pipeline folder or Hub id whose weights a new run starts from (fine-tuning): labels are
    matched by name, new ones start from the null row. A run that is resumed does not read it,
    unless it trains an adapter (`lora`) of it."""

    seed: int = 0
    """Seed of the initialisation, data order, noise and label dropout."""

    steps: int = 3300
    """Optimizer steps."""

    batch_size: int = 16
    """Images a step, over all processes."""

    gradient_accumulation_steps: int = 1
    """Parts that a step's batch is split into, to save memory."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass; weights and optimizer stay in fp32."""

    compile: Literal["no", "regional"] | bool = "no"
    """regional compiles the repeated blocks (torch.compile, fullgraph), once for all of them; it
    costs about a minute at the start. true and false are read as regional and no."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""

    loader_workers: int = 0
    """Processes that prepare batches; 0 is best for pictures that fit in memory."""

    log_every: int = 20
    """Steps between writes of train_log.csv (a row a step), noise_levels.csv and the tracker."""

    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where curves go beside the CSV files; tensorboard writes `logs/` in `out`."""

    noise_bins: int = 5
    """Bins of the noise level whose mean squared errors noise_levels.csv shows; 0 for none."""

    dynamics_every: int = 0
    """Steps between looks at the dynamics (dynamics.csv: a row a layer); 0 for none."""

    sample_every: int = 0
    """Steps between grids of pictures of the raw and the EMA weights in samples/; 0 for none."""

    evaluate_every: int = 0
    """Steps between evaluations of the EMA weights, FID and KID (metrics.csv); 0 for none. Such
    a step also makes a checkpoint."""

    evaluate_num_images: int = 2048
    """Images of each side of such an evaluation."""

    evaluate_reference: str | None = None
    """What it compares with: a data source (its held-out pictures), a folder of pictures or a
    statistics .npz; by default the source of the training."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always makes one."""

    keep_last: int = 2
    """How many of the newest checkpoints to keep; 0 keeps all."""

    keep_every: int = 0
    """Steps between checkpoints that are kept for ever, whatever keep_last says; 0 for none."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which paintings."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What it learns to predict."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it learns."""

    ema: EMAConfig = field(default_factory=EMAConfig)
    """Which average of its weights is kept."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    """An adapter to train in place of the network."""

    def __post_init__(self) -> None:
        """Read the switch that `compile` was before it had names."""
        if isinstance(self.compile, bool):
            self.compile = "regional" if self.compile else "no"
