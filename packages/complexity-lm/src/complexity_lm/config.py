"""One full run as dataclasses; every field's sentence is its `--help`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from complexity_lm.data import DataConfig
from complexity_lm.tokenizer import TokenizerConfig


@dataclass
class ModelConfig:
    """The network."""

    preset: str = "15m"
    """Named size: 15m, 50m, 150m, 350m, 760m, 1b, 3b, 7b (with a vocabulary of 32000)."""

    dynamics_placement: Literal["stream", "branch", "force", "force_mlp", "none"] = "force_mlp"
    """Where INL dynamics act in a layer; none is the plain transformer, stream and branch are the
    paper's."""

    dynamics_adaptive: Literal["token", "channel", "layer", "lite"] = "channel"
    """What the coefficients of the dynamics depend on; lite has fixed ones."""

    num_experts: int = 0
    """Experts of the token-routed MLP; 0 is the dense MLP."""

    routing_scheme: Literal["modulo", "balanced"] = "balanced"
    """How token ids get their expert: by their counts in the training text, or by id modulo number
    of experts; of no effect on a dense MLP."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Any other field of DeepConfig, e.g. {hidden_size: 192, num_hidden_layers: 6}."""

    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Type of the weights; training in bf16 usually keeps float32 weights and autocasts."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 2e-3
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the first moment."""

    beta2: float = 0.95
    """Decay of the second moment."""

    weight_decay: float = 0.1
    """Decay of the matrices of the backbone; not of vectors, nor of anything of the dynamics."""

    warmup_steps: int = 100
    """Steps of linear warm-up."""

    schedule: Literal[
        "constant_with_warmup", "cosine", "cosine_with_min_lr", "linear", "warmup_stable_decay"
    ] = "cosine"
    """Learning rate after the warm-up (transformers' names)."""

    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Options of that schedule, e.g. {min_lr_rate: 0.1} or {num_decay_steps: 2000}."""

    grad_clip: float = 1.0
    """Largest global gradient norm."""


@dataclass
class TrainConfig:
    """One full run."""

    out: str = "runs/train-lm"
    """Folder of the run."""

    resume: str = "none"
    """auto: go on from the last checkpoint in `out`, if any; none; or a checkpoint folder."""

    seed: int = 0
    """Seed of the initialisation and the data order."""

    steps: int = 2000
    """Optimizer steps."""

    batch_size: int = 16
    """Blocks a step, over all processes."""

    gradient_accumulation_steps: int = 1
    """Parts that a step's batch is split into, to save memory."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass; weights and optimizer stay as they are."""

    compile: bool = False
    """Compile the model (torch.compile); costs a minute or more at the start."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""

    log_every: int = 20
    """Steps between writes of train_log.csv (a row a step) and the tracker."""

    eval_every: int = 200
    """Steps between measurements of the held-out loss; 0 for the end only."""

    eval_blocks: int = 64
    """Held-out blocks of those measurements; the end of the run measures all held-out text."""

    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always makes one."""

    keep_last: int = 2
    """Checkpoints to keep; 0 keeps all."""

    dynamics_every: int = 100
    """Steps between looks at the dynamics (dynamics.csv and the tracker); 0 for none."""

    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where curves go besides the CSV files; tensorboard writes `logs/`."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which text."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How it becomes ids."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it learns."""
