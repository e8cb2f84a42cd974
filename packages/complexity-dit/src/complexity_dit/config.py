"""One full run as dataclasses; every field's sentence is its `--help`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from complexity_dit.data import DataConfig
from complexity_dit.objective import ObjectiveConfig


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
