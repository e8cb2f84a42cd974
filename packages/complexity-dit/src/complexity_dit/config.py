"""Settings of every command as dataclasses; the text under a field is its `--help`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from inl_core.run.errors import UserError
from inl_core.run.json_files import fits
from inl_core.run.settings import Setting, check_range, check_types

DATA_FILE = "data.json"
"""In a pipeline or adapter folder: the `DataConfig` that it was trained with."""

AVERAGE_FILE = "average.json"
"""In a pipeline folder of `complexity-dit average`: length and step of its average."""

ADAPTER_FILE = "adapter.json"
"""In an adapter folder: the pipeline that it belongs to."""

GUIDANCE: dict[str, Any] = {
    "guidance_scale": 2.0, "internal_guidance_scale": 1.0, "guidance_interval": (0.0, 1.0),
}  # fmt: skip
"""The guidance of a pipeline that recommends none."""

SHIPPED = {name: f"complexity-models/{name}" for name in ("wikiart-128", "wikiart-128-captions")}
"""Names of the pipelines in `checkpoints/` of the repository, with their Hub ids."""

RUN_KIND = "complexity-dit-run"
"""Mark of the folder of a training, see `inl_core.run.folders`."""

AUTOENCODER_KIND = "complexity-dit-autoencoder"
"""Mark of the folder of a training of an autoencoder."""

PRESETS = {"paper": {"dynamics_placement": "stream", "dynamics_adaptive": "token"}}
"""Named networks as fields of `ModelConfig`."""

Dtype = Literal["float32", "bfloat16"]
Resize = Literal["tf1", "pytorch-fid", "antialias"]
Measure = Literal["fid", "kid", "prdc", "is"]


def _filled(config: Any, usual: Mapping[str, Any], before: Mapping[str, Any]) -> Any:
    """A copy whose fields of None have the value before, if it has the usual type, or the usual."""
    return replace(
        config,
        **{
            name: before[name] if fits(before.get(name), type(value)) else value
            for name, value in usual.items()
            if getattr(config, name) is None
        },
    )


@dataclass
class DataConfig:
    """The pictures to read, their size, and the share that is held out."""

    source: str = "art"
    """Where the pictures come from: `art` (drawn by this package), `imagefolder:PATH` (a folder
    with or without metadata.csv) or `hub:NAME` (a dataset of the Hugging Face Hub, or a folder
    that `datasets.load_dataset` can read). Training also takes `latents:PATH`, the output of
    `complexity-dit encode` for one of these."""

    vae: str | None = None
    """VAE of latents, as Hub id or folder: `AutoencoderKL`, `AutoencoderTiny`, `TinyAutoencoder` or
    the files of TAEF2. Training needs it only if the one that the cache names has moved."""

    resolution: int = 32
    """Side of the square training pictures in pixels; smaller images are skipped and counted."""

    label_fields: list[str] | None = None
    """Columns used as labels; by default every ClassLabel column and every text column whose
    values occur at least twice on average; `[]` for none."""

    holdout: float = 0.1
    """Fraction held out for evaluation, chosen by the hash of each file's bytes: adding files
    never moves another one across, and byte-identical files stay on one side."""

    num_images: int = 8192
    """Number of pictures that the `art` source draws; other sources are always read in full."""

    crop: Literal["center", "random"] = "center"
    """Square that training takes of a picture whose shorter side is scaled to the resolution: the
    one in the middle, or at every step another one at random. Evaluation takes the middle, and so
    do latents."""

    flip: bool = True
    """Mirror half of the training pictures left to right, at random; for latents, `encode` needs
    the same setting: false leaves the mirror images out, which halves its time and space."""

    clusters: int = 0
    """Number of clusters of the pictures (for latents, of these) that become one more label field,
    `cluster`, in training: colour and composition, found by k-means. Without other labels, guidance
    needs them. A run keeps its centres; held-out pictures get the nearest one. 0 is off."""

    strict: bool = False
    """Stop at the first unreadable or too small image instead of skipping it."""

    image_column: str | None = None
    """Column that holds the picture; by default `image`, or the only image column."""

    text_column: str | list[str] | None = None
    """Columns of captions for a network with a text encoder: text, or lists of texts, of which each
    step draws one. By default `text` if there is one and no template; `[]` for none."""

    caption_template: str | None = None
    """Captions composed of columns, e.g. "{style} {genre} by {artist}: {title}"; of phrasings
    separated by | each step draws one, and drops each part at random. Titles lose dates, numbers
    and what is left of file names. With `text_column`, one more caption beside those."""

    num_workers: int = 0
    """Processes that decode the pictures the first time a source is read; 0 uses this one."""

    RETIRED = MappingProxyType({"balanced_labels": None})
    """Fields of earlier versions, see `without_retired`."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(self, "[1, inf)", "resolution", "num_images")
        check_range(self, "[0, inf)", "num_workers", "clusters")
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout {self.holdout} must be at least 0 and below 1")


@dataclass
class ModelConfig:
    """The network."""

    size: str = "nano"
    """Named size: nano, tiny, mini (CPU), S, B, L, XL."""

    patch_size: int = 4
    """Side of a patch in pixels or latent cells; one patch is one token."""

    preset: Literal["paper"] | None = None
    """Named dynamics, for what the next two fields leave open: paper is the layer of the INL
    dynamics paper, placement stream with coefficients that a controller sets per token."""

    dynamics_placement: Literal["stream", "branch", "force", "force_mlp", "none"] | None = None
    """Where INL dynamics act in a layer; none is the plain transformer. By default that of the
    preset, else that of the run that is resumed or of the network of `init_from`, else none: the
    others cost 1 to 7 % of a step, and FID stayed where it was (docs/results/dynamics.md)."""

    dynamics_adaptive: Literal["token", "channel", "layer", "lite"] | None = None
    """What the coefficients of the dynamics depend on; lite has constant ones. By default found as
    the placement is, in the end channel."""

    token_drop_rate: float = 0.0
    """Share of an image's tokens, drawn anew at each step, that bypass the middle blocks in
    training (TREAD, arXiv 2501.04765); none do in sampling. 0 is off."""

    token_drop_until: float = 1.0
    """Share of the run with token dropping: the rest trains on all tokens, as in sampling (SPRINT,
    arXiv 2510.21986)."""

    token_drop_start: int | None = None
    """First block that dropped tokens bypass, counted from 0; 1 (the second) by default."""

    token_drop_end: int | None = None
    """Block at which dropped tokens return; the last one by default."""

    auxiliary_layer: int = 0
    """Number of blocks, best a third of them, after which a second output layer learns the same
    target, for internal guidance (arXiv 2512.24176). 0 is off."""

    num_loops: int = 1
    """How often the blocks in the middle are applied, with the same weights and a velocity that is
    carried from one repetition to the next; 1 is the plain stack."""

    overrides: dict[str, Setting] = field(default_factory=dict)
    """Any other argument of ComplexityDiTTransformer2DModel, e.g. {hidden_size: 256}."""

    RETIRED = MappingProxyType({"value_residual": False, "routing": "none", "num_experts": ...})

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        if not 0 < self.token_drop_until <= 1:
            raise UserError(
                f"token_drop_until {self.token_drop_until} must be above 0 and at most 1, the "
                "share of the run with dropping (token_drop_rate 0 switches it off)"
            )
        if not 0 <= self.token_drop_rate < 1:
            raise UserError(
                f"token_drop_rate {self.token_drop_rate} must be at least 0 (off) and below 1"
            )
        check_range(self, "[1, inf)", "patch_size", "num_loops")
        check_range(self, "[0, inf)", "token_drop_start", "token_drop_end", "auxiliary_layer")

    def resolved(self, recorded: Mapping[str, Any] | None = None) -> "ModelConfig":
        """A copy whose dynamics are named.

        Args:
            recorded: Fields of the run that is resumed, or of the network that a new run starts
                from, which decide before the defaults but not before a preset.
        """
        usual = {"dynamics_placement": "none", "dynamics_adaptive": "channel"}
        preset = PRESETS[self.preset] if self.preset else {}
        return _filled(self, usual, preset or recorded or {})


@dataclass
class ObjectiveConfig:
    """The training target and the distribution of noise levels."""

    prediction_type: Literal["flow", "epsilon", "v_prediction"] = "flow"
    """flow: velocity of the straight path from image to noise; the others use the DDPM schedule."""

    network_output: Literal["sample", "target"] | None = None
    """What the network predicts: the clean image (`sample`, flow only), from which the velocity
    follows, or the target itself; the loss is on the target either way. By default sample for
    flow, target for the others."""

    time_sampling: Literal["logit_normal", "uniform"] | None = None
    """Distribution of the noise level t in (0, 1). By default logit_normal for flow, and uniform
    for epsilon and v_prediction, as DDPM draws its steps."""

    logit_mean: float = 0.0
    """Mean of logit(t) for logit_normal; above 0 favours high noise."""

    logit_std: float = 1.0
    """Standard deviation of logit(t) for logit_normal."""

    shift: float | None = None
    """Time shift s in training: t becomes s*t / (1 + (s - 1)*t); above 1 favours high noise, where
    composition is decided. 1 is off. By default 2 for flow and 1 for the others."""

    sampling_shift: float = 5.0
    """Time shift in sampling (flow only). Larger than in training, so that the last step, to the
    clean image, starts from more noise: a small network does not remove it in smaller steps."""

    label_dropout: float | dict[str, float] = 0.1
    """Probability that each label of an image is replaced by the null row, for guidance; or one
    for each label field, e.g. {style: 0.1, artist: 0.5}, every field named."""

    label_dropout_all: float = 0.0
    """Probability that all labels of an image are replaced together, in addition to label_dropout,
    and its caption with them.
    Guidance leads away from the network without any label, which dropping each of n fields by
    itself trains on a share of label_dropout^n only. 0 is off."""

    RETIRED = MappingProxyType({"direction_weight": 0.0, "direction_over": ...})

    auxiliary_weight: float = 0.5
    """Weight of the loss of the auxiliary output (`model.auxiliary_layer`): above 0 and at most
    0.5, so that the last output stays what the network is trained for."""

    def __post_init__(self) -> None:
        """Refuse values that are out of range or do not fit each other.

        Raises:
            UserError: Also if the network should predict the clean image without an objective that
                has the velocity it needs.
        """
        check_types(self)
        check_range(self, "(-inf, inf)", "logit_mean")
        check_range(self, "(0, inf)", "logit_std", "shift", "sampling_shift")
        if self.network_output == "sample" and self.prediction_type != "flow":
            raise UserError(
                f"network_output sample needs prediction_type flow, not {self.prediction_type}: "
                "use --objective.network_output target"
            )
        if not 0 < self.auxiliary_weight <= 0.5:
            raise UserError(
                f"auxiliary_weight {self.auxiliary_weight} must be above 0 and at most 0.5; to "
                "train without an auxiliary output, set model.auxiliary_layer 0"
            )
        check_range(self, "[0, 1]", "label_dropout_all")
        dropout = self.label_dropout
        for label, value in dropout.items() if isinstance(dropout, Mapping) else [("", dropout)]:
            if not 0 <= value <= 1:
                name = f"label_dropout of {label}" if label else "label_dropout"
                raise UserError(f"{name}: {value} must be a probability, from 0 to 1")

    def resolved(self, recorded: Mapping[str, Any] | None = None) -> "ObjectiveConfig":
        """A copy whose density of noise levels, `time_sampling` and `shift`, is named.

        Args:
            recorded: Objective of the run that is resumed, which decides before the defaults.
        """
        flow = self.prediction_type == "flow"
        usual = {"time_sampling": "logit_normal", "shift": 2.0} if flow else {
            "time_sampling": "uniform", "shift": 1.0
        }  # fmt: skip
        return _filled(self, usual, recorded or {})

    @property
    def writes_sample(self) -> bool:
        """Whether the network predicts the clean image."""
        return self.prediction_type == "flow" and self.network_output != "target"

    def label_dropouts(self, fields: Sequence[str]) -> list[float]:
        """The dropout probability of each label field, in their order.

        Raises:
            UserError: `label_dropout` names a field that does not exist, or leaves one out.
        """
        if not isinstance(self.label_dropout, Mapping):
            return [self.label_dropout] * len(fields)
        if set(self.label_dropout) != set(fields):
            raise UserError(
                f"label_dropout names {', '.join(self.label_dropout) or 'no field'}, but the label "
                f"fields of the data are {', '.join(fields) or 'none'}: give each of them a "
                "probability (0 for never), or one number for all"
            )
        return [self.label_dropout[field] for field in fields]


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices of attention and MLP and AdamW for the rest. Muon is meant
    for GPUs: on a CPU without bfloat16 units it can take longer than the rest of the step."""

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
    """Weight decay of matrices; norms, biases, mu and label tables have none."""

    warmup_steps: int = 200
    """Steps of linear warm-up."""

    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "cosine"
    """Learning rate after the warm-up."""

    grad_clip: float = 1.0
    """Global norm to which gradients are clipped; 0 does not clip."""

    spike_factor: float = 0.0
    """Skip a step whose gradient norm, before clipping, is not finite or exceeds this factor times
    the 0.9 quantile of recent norms: weights, moments and EMA stay, the schedule advances. Reads
    the norm from the device at every step. 0 is off: a norm that is not finite stops the run."""

    spike_window: int = 100
    """Number of recent norms for that quantile; until there are as many, only norms that are not
    finite are skipped."""

    spike_limit: int = 10
    """Most consecutive steps without a finite norm that are skipped; one more stops the run."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(self, "(0, inf)", "muon_lr")
        check_range(self, "[0, inf)", "lr", "weight_decay", "warmup_steps", "grad_clip")
        check_range(self, "[0, 1)", "beta1", "beta2", "muon_momentum")
        check_range(self, "[2, inf)", "spike_window")
        check_range(self, "[0, inf)", "spike_limit")
        if not self.spike_factor:
            return
        if not (math.isfinite(self.spike_factor) and self.spike_factor >= 1):
            raise UserError(
                f"spike_factor {self.spike_factor} must be 0 (off) or a number of at least 1: a "
                "multiple of the usual gradient norm"
            )


@dataclass
class EMAConfig:
    """The moving average whose weights are saved, sampled and evaluated (diffusers' EMAModel)."""

    decay: float = 0.998
    """Largest decay per step."""

    power: float = 0.75
    """Warm-up: the decay at step s is 1 - (1 + s)^-power until it reaches `decay`."""

    snapshot_every: int = 0
    """Steps between snapshots in `averages/`, from which `complexity-dit average` makes an average
    of any length afterwards; about 20 in a run are enough. 0 is off."""

    lengths: list[float] = field(default_factory=lambda: [0.05, 0.1])
    """Lengths of the averages in a snapshot: standard deviations of their power-function profiles
    as shares of the training so far (arXiv 2312.02696), from 0.01 to 0.28. Each takes the memory
    of the weights."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(self, "[0, 1)", "decay")
        check_range(self, "(0, inf)", "power")
        check_range(self, "[0, inf)", "snapshot_every")
        check_range(self, "[0.01, 0.28]", "lengths")
        if len(set(self.lengths)) < max(1, len(self.lengths)):
            raise UserError(f"lengths {self.lengths} must be different ones, at least one")

    @property
    def kept_lengths(self) -> list[float]:
        """Lengths of the averages that are kept; none without snapshots."""
        return self.lengths if self.snapshot_every else []


@dataclass
class LoraOptions:
    """An adapter to train in place of the network: low-rank matrices, and rows for new labels."""

    rank: int = 0
    """Rank of the matrices that are added to the frozen weights of `init_from` (LoRA, arXiv
    2106.09685); the run then writes an adapter folder. 0 trains the full network."""

    alpha: float | None = None
    """Scale of the product of the matrices, times the rank; by default the rank, a scale of 1."""

    dropout: float = 0.0
    """Dropout of the input of the matrices."""

    targets: list[str] = field(
        default_factory=lambda: [
            "to_q", "to_k", "to_v", "to_out.0", "mlp.gate", "mlp.up", "mlp.down"
        ]
    )  # fmt: skip
    """Linear layers that get matrices, by the end of their names."""

    labels: dict[str, str] = field(default_factory=dict)
    """Labels of all pictures, e.g. --lora.labels.style Ukiyo_e, for a folder without labels; the
    adapter adds names that the base does not have."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(self, "(0, inf)", "alpha")
        if self.rank < 0:
            raise UserError(f"lora.rank {self.rank} must be at least 0 (0 is no adapter)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout {self.dropout} must be at least 0 and below 1")
        if self.rank and not self.targets:
            raise UserError("lora.targets is empty: name layers, e.g. [to_q, to_k, to_v, to_out.0]")


@dataclass
class TextEncoderConfig:
    """The model that reads captions and prompts; its states are part of the network's input."""

    source: str = "none"
    """none; lm, a small complexity-lm model that is trained together with the network; lm:PATH, a
    trained one; or hf:ID_OR_PATH, any text encoder of transformers, which stays as it is."""

    trainable: bool | None = None
    """Whether the run trains it too: by default lm is, and those that come trained are not."""

    bidirectional: bool = False
    """Let every token of a complexity-lm model see the whole caption, not only what precedes it."""

    max_length: int = 64
    """Tokens of a caption at most; what is longer is cut."""

    caption_dropout: float = 0.1
    """Probability that the caption of an image is left out, for guidance, whatever its labels."""

    overrides: dict[str, Setting] = field(default_factory=dict)
    """Other sizes of `lm`, arguments of DeepConfig, e.g. {hidden_size: 384}."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range, or for options that do not go together."""
        check_types(self)
        kind, _, place = self.source.partition(":")
        if self.source not in ("none", "lm") and (kind not in ("lm", "hf") or not place):
            raise UserError(
                f"text_encoder.source {self.source!r} must be none, lm, lm:PATH or hf:ID_OR_PATH"
            )
        check_range(self, "[1, inf)", "max_length")
        check_range(self, "[0, 1]", "caption_dropout")
        if self.source == "lm" and self.trainable is False:
            raise UserError(
                "text_encoder.trainable is false, and lm is a new model without any training: "
                "leave it out, or give a trained one as lm:PATH"
            )
        if kind == "hf" and (self.trainable or self.bidirectional):
            raise UserError(
                f"text_encoder.trainable {self.trainable} and bidirectional {self.bidirectional} "
                f"are for complexity-lm models, and {self.source} is used as it is: leave both out"
            )
        if self.overrides and self.source != "lm":
            raise UserError(
                f"text_encoder.overrides {self.overrides} are sizes of a new model, source lm, not "
                f"of {self.source}: leave them out"
            )

    @property
    def trains(self) -> bool:
        """Whether the encoder's weights are trained."""
        return self.source == "lm" if self.trainable is None else self.trainable


@dataclass
class RunConfig:
    """What every training of this package has: its folder, its length, its data, its files."""

    out: str = "runs/train"
    """Folder of the run."""

    resume: str = "none"
    """auto: resume from the last checkpoint in `out`, if any; none; or a checkpoint folder."""

    seed: int = 0
    """Seed of the initialisation, data order, noise and label dropout."""

    steps: int = 3300
    """Optimizer steps."""

    batch_size: int = 16
    """Images per step, over all processes."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast of the forward pass; weights and optimizer stay in fp32. auto is bf16 where the
    device has units for it (a GPU, a CPU with amx_bf16 or avx512_bf16), else no; a resumed run
    keeps what it started with."""

    compile: Literal["auto", "no", "regional", "max"] | bool = "auto"
    """regional compiles the repeated blocks (torch.compile, fullgraph), once for all of them, which
    takes about a minute at the start; auto does so in runs that are long enough to save more. max
    compiles the whole network as one graph, which takes several minutes, and a GPU replays it as
    CUDA graphs, without waiting for Python: for small networks on a fast GPU; not with accumulated
    gradients, gradient checkpointing or FSDP. true and false are read as regional and no; a resumed
    run keeps what auto was."""

    loader_workers: int = 0
    """Processes that prepare batches; 0 is best for pictures that fit in memory. On a GPU a thread
    does it if there are none, and whatever the number for latents that are kept in its memory."""

    log_every: int = 20
    """Steps between writes of train_log.csv (one row per step), noise_levels.csv and the tracker.
    """

    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Tracker that gets the curves in addition to the CSV files; tensorboard writes `logs/` in
    `out`."""

    heldout_every: int = 0
    """Steps between measurements of the loss on held-out pictures with the EMA weights, for the
    same noise, times and dropped labels every time (heldout_log.csv); 0 is off."""

    heldout_num_images: int = 256
    """Number of held-out pictures of such a measurement, at most."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always saves one."""

    keep_last: int = 2
    """Number of the newest checkpoints to keep; 0 keeps all."""

    keep_every: int = 0
    """Steps between checkpoints that are kept for ever, whatever keep_last is; 0 is off."""

    data: DataConfig = field(default_factory=DataConfig)
    """The pictures."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""

    ema: EMAConfig = field(default_factory=EMAConfig)
    """The average of the weights."""

    def __post_init__(self) -> None:
        """Read the switch that `compile` once was; raise a `UserError` for a value out of range."""
        check_types(self)
        if isinstance(self.compile, bool):
            self.compile = "regional" if self.compile else "no"
        check_range(
            self, "[1, inf)", "steps", "batch_size", "log_every", "checkpoint_every",
            "heldout_num_images",
        )  # fmt: skip
        check_range(self, "[0, inf)", "loader_workers", "keep_last", "keep_every", "heldout_every")


@dataclass
class TrainConfig(RunConfig):
    """A training run. The defaults are the demo: a small model of the embedded art set."""

    init_from: str | None = None
    """Pipeline folder, checkpoint, folder of a run, or Hub id whose weights a new run starts from
    (fine-tuning): labels are matched by name, new ones start from the null row. Ignored when a run
    is resumed, unless it trains an adapter (`lora`) of that pipeline."""

    gradient_accumulation_steps: int = 1
    """Parts that the batch of a step is split into, to save memory."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""

    loop_sampling: Literal["fixed", "uniform", "poisson"] = "fixed"
    """Repetitions of a training step of a network with a loop: always num_loops, or a number drawn
    for each step with that mean, from 1 to 2 num_loops - 1 (uniform) or of 1 + Poisson. Samples and
    held-out losses are computed at num_loops."""

    noise_bins: int = 5
    """Bins of the noise level in noise_levels.csv, mean squared errors; 0 is off."""

    dynamics_every: int = 0
    """Steps between measurements of the dynamics (dynamics.csv, one row per layer); 0 is off."""

    sample_every: int = 0
    """Steps between grids of samples of the raw and the EMA weights in samples/; 0 is off."""

    evaluate_every: int = 0
    """Steps between evaluations of the EMA weights, FID and KID (metrics.csv); 0 is off. Such a
    step also saves a checkpoint."""

    evaluate_num_images: int = 2048
    """Number of generated and of reference images of such an evaluation."""

    evaluate_reference: str | None = None
    """Reference of such an evaluation: a data source (its held-out pictures), a folder of pictures
    or a statistics .npz; by default the source of the training."""

    evaluate_dtype: Literal["auto"] | Dtype = "auto"
    """Arithmetic in the feature network of such an evaluation: auto is bfloat16 where the device
    computes in it, but float32 for a statistics .npz, which was made in it. `complexity-dit
    evaluate` uses float32, and so do quoted numbers."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The training target."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    """An adapter to train in place of the network."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The reader of captions, for a network that takes prompts."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        super().__post_init__()
        check_range(self, "[1, inf)", "gradient_accumulation_steps")
        check_range(
            self, "[0, inf)", "noise_bins", "dynamics_every", "sample_every", "evaluate_every"
        )
        check_range(self, "[2, inf)", "evaluate_num_images")
        if self.lora.rank and self.text_encoder.source != "none":
            raise UserError(
                f"text_encoder.source {self.text_encoder.source} is for a full network: leave it "
                "at none for an adapter, which is trained without captions"
            )
        if self.lora.rank and self.ema.snapshot_every:
            raise UserError(
                f"ema.snapshot_every {self.ema.snapshot_every} is for the weights of a full "
                "network: leave it at 0 for an adapter"
            )
        if self.optim.spike_factor and self.mixed_precision == "fp16":
            raise UserError(
                f"spike_factor {self.optim.spike_factor} does not work with mixed_precision fp16, "
                "whose gradient scaler skips steps itself: use bf16, or spike_factor 0"
            )
        if self.compile == "max" and self.gradient_accumulation_steps > 1:
            raise UserError(
                "compile max does not work with gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}, as its CUDA graphs would overwrite the "
                "gradients of one part by those of the next: use compile regional, or 1"
            )
        if self.compile == "max" and self.loop_sampling != "fixed":
            raise UserError(
                f"compile max does not work with loop_sampling {self.loop_sampling}: it makes a "
                "graph of the whole network, another one for each number of repetitions; use "
                "compile regional, or loop_sampling fixed"
            )
        if self.compile == "max" and self.gradient_checkpointing:
            raise UserError(
                "compile max does not work with gradient_checkpointing, which torch does not trace "
                "as part of one graph here: use compile regional, or leave it off"
            )


@dataclass
class AutoencoderModelConfig:
    """The networks, a `TinyAutoencoder`; latents are patch_size * 2^(stages - 1) times smaller."""

    latent_channels: int = 16
    """Channels of a latent."""

    patch_size: int = 2
    """Side of the square of pixels that is one cell of the first stage."""

    block_out_channels: list[int] = field(default_factory=lambda: [48, 96, 192])
    """Width of each stage, finest first; each further stage halves the size."""

    layers_per_block: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Blocks of each stage of the encoder, finest first."""

    decoder_layers_per_block: list[int] = field(default_factory=lambda: [2, 2, 1])
    """Blocks of each stage of the decoder, coarsest first."""

    pool_channels: int = 0
    """Inner width of a branch in the coarsest stage that is normalised over the whole picture, as
    in TAEF2; 0 is none."""

    latent_bound: float = 3.0
    """The decoder gets bound * tanh(latent / bound)."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(self, "[1, inf)", "latent_channels", "patch_size", "block_out_channels")
        check_range(self, "[0, inf)", "layers_per_block", "decoder_layers_per_block")
        check_range(self, "[0, inf)", "pool_channels")
        check_range(self, "(0, inf)", "latent_bound")


@dataclass
class AutoencoderConfig(RunConfig):
    """The training of an autoencoder: L1, edges, and late a critic of patches."""

    out: str = "runs/autoencoder"
    """Folder of the run; the autoencoder is in its sub-folder vae."""

    seed: int = 0
    """Seed of the initialisation, data order and crops."""

    steps: int = 20000
    """Optimizer steps."""

    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast of the networks; weights and optimizer stay in fp32. auto is bf16 where the device
    has units for it, else no; a resumed run keeps what it started with."""

    heldout_every: int = 1000
    """Steps between measurements of the PSNR of held-out pictures with the EMA weights
    (heldout_log.csv), each with a strip of reconstructions in samples/; 0 is off."""

    crop_size: int | None = None
    """Side in pixels of the square that is cut at random out of each training picture; by default
    the whole picture."""

    edge_weight: float = 1.0
    """Weight of the mean absolute error of differences of neighbouring pixels, beside L1."""

    adversarial_weight: float = 0.3
    """Length of the critic's gradient with respect to the reconstruction, in parts of that of L1
    and edges; 0 trains without one."""

    adversarial_start: float = 0.6
    """Share of the run before the critic."""

    critic_channels: int = 32
    """Width of the critic's first layer."""

    critic_layers: int = 3
    """Layers of the critic that halve the size; 3 judge patches of 38 pixels."""

    critic_lr: float | None = None
    """Peak learning rate of the critic; by default optim.lr."""

    evaluate_num_images: int = 2048
    """Number of held-out pictures, at most, of the measures at the end (result.json); 0 is off."""

    evaluate_weights: str = "auto"
    """Feature network of these measures, as `weights` of `complexity-dit evaluate`."""

    data: DataConfig = field(default_factory=lambda: DataConfig(resolution=128, label_fields=[]))
    """The pictures."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, beta2=0.99, weight_decay=0.0)
    )
    """The optimizer, AdamW."""

    ema: EMAConfig = field(default_factory=lambda: EMAConfig(decay=0.999))
    """The average of the weights."""

    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    """The networks."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range, or for what only `train` has."""
        super().__post_init__()
        check_range(self, "[1, inf)", "crop_size", "critic_channels", "critic_layers")
        check_range(self, "[0, inf)", "edge_weight", "adversarial_weight", "evaluate_num_images")
        check_range(self, "[0, 1]", "adversarial_start")
        check_range(self, "(0, inf)", "critic_lr")
        if self.crop_size is not None and self.crop_size > self.data.resolution:
            raise UserError(
                f"crop_size {self.crop_size} is larger than data.resolution {self.data.resolution}"
            )
        if self.optim.name != "adamw":
            raise UserError(f"optim.name {self.optim.name}: an autoencoder is trained with adamw")
        if self.ema.snapshot_every:
            raise UserError(
                f"ema.snapshot_every {self.ema.snapshot_every}: an autoencoder has one average, of "
                "ema.decay"
            )
        if self.data.vae is not None or self.data.clusters:
            raise UserError(
                f"an autoencoder has no use for data.vae {self.data.vae} and data.clusters "
                f"{self.data.clusters}: leave both out"
            )


@dataclass
class PlanConfig:
    """What a plan needs in addition to the config of a run."""

    train_images: int | None = None
    """Training images, to count epochs."""

    channels: int | None = None
    """Channels of the input (32 for TAEF2, 4 for the VAE of Stable Diffusion); by default 3 for
    pixels, and those of the cache for latents if it exists."""

    cells: int | None = None
    """Side of the input, in pixels or latent cells; by default data.resolution for pixels, and that
    of the cache for latents if it exists."""

    num_classes: dict[str, int] = field(default_factory=dict)
    """Number of labels of each field, e.g. {style: 27}; by default those of the cache, or none."""

    processes: int = 1
    """Devices that share the batch."""

    images_per_second: float | None = None
    """A measured speed of all devices together, for the time estimate."""

    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s at the run's precision, e.g. 989 for bf16 on an H100; with
    `mfu`, for the time estimate."""

    mfu: float | None = None
    """Share of the peak that training reaches, e.g. 0.4."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(self, "[1, inf)", "processes", "train_images", "channels", "cells")
        check_range(self, "[1, inf)", "num_classes")
        check_range(self, "(0, inf)", "images_per_second", "peak_tflops")
        check_range(self, "(0, 1]", "mfu")


@dataclass
class SampleConfig:
    """How pictures are sampled; all of it is part of a result's settings."""

    seed: int = 0
    """Seed of the set; the noise of image i depends on (seed, i) alone."""

    num_inference_steps: int = 20
    """Denoising steps: one network evaluation each, two with Heun; guidance doubles that."""

    scheduler: str | None = None
    """Class name of a diffusers scheduler, e.g. DPMSolverMultistepScheduler; by default that of the
    pipeline."""

    shift: float | None = None
    """Time shift of a flow-matching scheduler; by default that of the pipeline."""

    guidance_scale: float | None = None
    """Scale of classifier-free guidance, or of autoguidance if that is given; 1 is off. By default
    what the pipeline recommends, or 2."""

    internal_guidance_scale: float | None = None
    """Scale of internal guidance, away from the network's auxiliary output (arXiv 2512.24176): no
    further evaluation. Added to the other guidance if both are on; 1 is off. By default what the
    pipeline recommends, or 1."""

    guidance_interval: tuple[float, float] | None = None
    """Noise levels in [0, 1] between which guidance is on; by default what the pipeline
    recommends, or all."""

    autoguidance: str | None = None
    """Pipeline folder of a weaker model of the same data, e.g. of an early checkpoint: guidance
    leads away from it in place of the null rows (arXiv 2406.02507)."""

    negative_prompt: str | None = None
    """Text that guidance leads away from, in place of the empty one, for a pipeline with a text
    encoder."""

    num_loops: int | None = None
    """Repetitions of the loop of a network that has one; by default those of its training."""

    height: int | None = None
    """Height in pixels; the training size by default."""

    width: int | None = None
    """Width in pixels; the training size by default."""

    batch_size: int = 64
    """Pictures sampled together, best a multiple of chunk_size; bits do not depend on it."""

    chunk_size: int = 16
    """Pictures per network call, padded if need be; the bits of a set depend on it."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(
            self, "[1, inf)", "num_inference_steps", "height", "width", "batch_size", "chunk_size",
            "num_loops",
        )  # fmt: skip
        check_range(self, "(0, inf)", "shift")
        check_range(self, "(-inf, inf)", "guidance_scale", "internal_guidance_scale")
        check_range(self, "[0, 1]", "guidance_interval")
        if self.negative_prompt is not None and (self.guidance_scale == 1 or self.autoguidance):
            raise UserError(
                f"negative_prompt {self.negative_prompt!r} takes part in classifier-free guidance "
                "alone: set guidance_scale above 1, and no autoguidance"
            )


@dataclass
class StartConfig:
    """What `sample` starts from in place of noise alone."""

    image: str | None = None
    """A picture, or a folder of them, to start from (image-to-image): its largest centred part of
    the wanted shape, scaled. Labels that are not named are left out, not drawn. By default one
    image for each picture and named label; further ones begin again with the first."""

    mask: str | None = None
    """With `image`, a picture of the same size (inpainting): white is made anew, black is kept."""

    strength: float | None = None
    """With `image`, the share of the steps to run: 0 is the picture itself, 1 keeps nothing of it.
    By default 0.6, or with a mask 1."""

    interpolate: bool = False
    """A strip from the first named labels to the second (`--labels.style Cubism Fauvism`), in
    `num_images` equal steps (8 by default), both ends included."""

    to_seed: int | None = None
    """With `interpolate`, the seed of the noise of the last image; by default that of the first."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range, or for options that do not go together."""
        check_types(self)
        check_range(self, "[0, 1]", "strength")
        for name, value, needed in (
            ("mask", self.mask, "image"),
            ("strength", self.strength, "image"),
            ("to_seed", self.to_seed, "interpolate"),
        ):
            if value is not None and not getattr(self, needed):
                raise UserError(f"{name} {value} needs --{needed}")
        if self.image and self.interpolate:
            raise UserError("image and interpolate exclude each other: give one of them")

    @property
    def steps_share(self) -> float:
        """The strength, or its default."""
        return self.strength if self.strength is not None else 1.0 if self.mask else 0.6


@dataclass
class EvalSampleConfig(SampleConfig):
    """How the pictures of an evaluation are sampled; all of it is part of a result's settings."""

    guidance_scale: float | None = 1.0
    """Scale of classifier-free guidance, or of autoguidance if that is given; 1, off, is that of
    the protocol (docs/fid-protocol.md), and not the default of `sample`; null is what the pipeline
    recommends."""

    internal_guidance_scale: float | None = 1.0
    """Scale of internal guidance, likewise."""

    guidance_interval: tuple[float, float] | None = (0.0, 1.0)
    """Noise levels in [0, 1] between which guidance is on, likewise."""


@dataclass
class EvalConfig:
    """What is measured, on how many images and with which network."""

    num_images: int = 2048
    """Number n of generated and of reference images; at most what a folder or the held-out split
    has. Compare numbers at equal n only."""

    seed: int = 0
    """Seed of the draw of reference images (and so of the labels of the samples), of KID subsets
    and of resamples."""

    weights: str = "auto"
    """Feature network: auto (Inception if its weights are found, else a random network, whose
    distance is called fd_random), random, a file of Inception weights, or the folder of a
    transformers vision model (DINOv2, CLIP), whose distance is named after it."""

    resize: Resize = "tf1"
    """How images are resized to 299 px: tf1 (torch-fidelity, ADM), pytorch-fid or antialias
    (torchmetrics)."""

    dtype: Dtype = "float32"
    """Arithmetic in the feature network; bfloat16 is faster and only for tracking a training."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1."""

    measures: list[Measure] = field(default_factory=lambda: ["fid", "kid", "prdc", "is"])
    """fid, kid, prdc (precision, recall, density, coverage), is (Inception score). The result
    names those that are not available, with the reason."""

    kid_subsets: int = 100
    """Number of random subsets that KID is averaged over."""

    kid_subset_size: int = 1000
    """Images per KID subset; reduced to n if n is smaller."""

    bootstrap: int = 20
    """Resamples for the standard error of the Frechet distance; 0 for none. It needs 4 images per
    feature (8,192 for Inception); the standard error of KID is right at any n."""

    curve: bool = True
    """Measure the Frechet distance at n, n/2, n/4 and n/8 and extrapolate it to infinite n; needs
    what the bootstrap needs."""

    label_field: str | None = "style"
    """Label field with a distance per label and a label accuracy (nearest class mean in feature
    space, fitted on training images); null for none."""

    label_min: int = 50
    """Generated and real images that a label needs to be measured by itself."""

    floors: bool = False
    """Also measure the training split, the VAE's reconstruction of the held-out images if the
    pipeline has a VAE, and the held-out images shrunk to 8 px and back, against the held-out
    images."""

    memorisation: bool = False
    """Find the nearest training image of every sample, and of every held-out image to compare."""

    memorisation_images: int | None = None
    """Number of training images searched; null for all."""

    prompts: bool = False
    """Also measure whether the samples of a pipeline with a text encoder show what their prompts,
    captions of the reference images, say; includes memorisation, and fits its probes on the same
    training images."""

    keep_images: bool = True
    """Keep the samples as PNGs in the output folder, from which an interrupted run resumes."""

    report: bool = True
    """Write report.html into the output folder."""

    save_statistics: bool = False
    """Write the statistics of the reference into the output folder (reference.npz), for a later
    --reference."""

    cache: bool = True
    """Keep features of real images in the user's cache folder."""

    overwrite: bool = False
    """Replace a result in the output folder, and samples of other settings."""

    quiet: bool = False
    """Do not print the table."""

    def __post_init__(self) -> None:
        """Raise a `UserError` for a value out of range."""
        check_types(self)
        check_range(
            self, "[2, inf)", "num_images", "label_min", "memorisation_images", "kid_subset_size"
        )
        check_range(self, "[1, inf)", "kid_subsets")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UserError(f"bootstrap is {self.bootstrap}; expected 0 for none, or at least 2")
        if not self.measures or set(self.measures) - set(get_args(Measure)):
            known = ", ".join(get_args(Measure))
            raise UserError(f"measures is {self.measures}; expected some of {known}")

    @classmethod
    def brief(cls, **fields: Any) -> "EvalConfig":
        """FID and KID only, as every other measure takes minutes of a core; then `fields`."""
        brief = {
            "measures": ["fid", "kid"], "bootstrap": 0, "curve": False, "label_field": None,
            "report": False,
        }  # fmt: skip
        return cls(**(brief | fields))


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    max_images: int = 32
    """Pictures."""

    max_steps: int = 100
    """Denoising steps."""

    max_side: int = 512
    """Height and width in pixels."""

    max_guidance: float = 20.0
    """Guidance scale."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "[1, inf)", "max_images", "max_steps", "max_side", "max_guidance")


@dataclass
class AppConfig:
    """Address, device and limits of the gallery."""

    host: str = "127.0.0.1"
    """Address to listen on: by default only this machine, 0.0.0.0 for all of its networks. There is
    no password."""

    port: int = 7860
    """Port to listen on."""

    root_path: str = ""
    """Address of the gallery behind a proxy that removes its path, such as
    https://example.org/gallery; empty if there is none."""

    queue_size: int = 8
    """Requests that may wait while one is served; more are refused."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    max_images: int = Limits.max_images
    """Largest number of pictures of a request."""

    max_steps: int = Limits.max_steps
    """Largest number of denoising steps of a request."""

    max_side: int = Limits.max_side
    """Largest height and width of a request, in pixels."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.port < 65536:
            raise UserError(f"port {self.port} must be from 1 to 65535")
        if self.root_path and not urlsplit(self.root_path).hostname:
            raise UserError(
                f"root_path {self.root_path!r} must be the whole address that visitors type, such "
                "as https://example.org/gallery"
            )
        check_range(self, "[1, inf)", "queue_size", "max_images", "max_steps", "max_side")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_images, self.max_steps, self.max_side)
