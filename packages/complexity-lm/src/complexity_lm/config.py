"""Settings of every command as dataclasses; the sentence under a field is its `--help`."""

from dataclasses import dataclass, field
from typing import Literal

from inl_core.run.errors import UserError
from inl_core.run.settings import Scalar, Setting, check_range, check_types

Split = Literal["train", "heldout", "all"]

SHIPPED = {"lm-stories": "complexity-models/lm-stories"}
"""Names of the models in `checkpoints/` of the repository, with their Hub ids."""

RUN_KIND = "complexity-lm-run"
"""Mark of the folder of a training, see `inl_core.run.folders`."""


@dataclass
class DataConfig:
    """The text."""

    source: str = "stdlib"
    """stdlib (the source code of Python's standard library), text:PATH, or hub:NAME (streamed)."""

    format: Literal["text", "chat"] = "text"
    """chat: each document is a conversation, a line of JSON in files, a row of a dataset, read into
    memory; loss is on the answers that the tokenizer's chat template marks. Needs text: or hub:."""

    messages_column: str = "messages"
    """chat: key or column of the messages, a list of {role: ..., content: ...}."""

    heldout_source: str | None = None
    """Source of the held-out text; by default a part of `source`."""

    holdout: float = 0.1
    """Fraction of the documents held out, chosen by a hash of their bytes; unused with
    `heldout_source`."""

    context: int = 256
    """Tokens per training block."""

    separate_documents: bool = False
    """Keep attention within each document of a block, with positions from its beginning; with
    format chat it is anyway."""

    piece_bytes: int | None = None
    """text: cut files into documents of about this many bytes, at line ends, and lines of more than
    four times as many at spaces; 0 keeps files whole; null cuts a single file (8192) and keeps the
    files of a folder whole."""

    document_separator: str | None = None
    """text: the lines between the documents of a file, such as <|endoftext|>; they are left out,
    and `piece_bytes` cuts longer documents only where it is set."""

    files: str = "*"
    """text: glob pattern of the files to read in a folder, such as *.txt."""

    text_column: str = "text"
    """hub: column that contains the text."""

    hub_subset: str | None = None
    """hub: configuration of the dataset, such as sample-10BT."""

    hub_split: str = "train"
    """hub: split to read."""

    heldout_documents: int = 256
    """hub: number of held-out documents used for evaluation, the first of the stream."""

    sample_documents: int = 10000
    """hub: number of training documents that the tokenizer and the routing counts are made from."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout is {self.holdout}; expected a fraction in [0, 1)")
        if self.context < 2:
            raise UserError(f"data.context is {self.context}; a block needs at least 2 tokens")
        if self.format == "chat" and "stdlib" in (self.source, self.heldout_source):
            raise UserError("data.format chat reads text:PATH (JSON lines) or hub:NAME, not stdlib")
        check_range(self, "[0, inf)", "piece_bytes")
        separator = self.document_separator
        if separator is not None and (not separator.strip() or len(separator.splitlines()) > 1):
            raise UserError(
                f"data.document_separator is {separator!r}; expected the text of one line, such as "
                "<|endoftext|>"
            )
        check_range(self, "[1, inf)", "heldout_documents", "sample_documents")


@dataclass
class TokenizerConfig:
    """The tokenizer."""

    path: str | None = None
    """Tokenizer to use, a folder or Hub id; null trains a byte-level BPE on the training text."""

    vocab_size: int = 4096
    """Size of the vocabulary to train; a short text may give fewer ids."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "[1, inf)", "vocab_size")


@dataclass
class ModelConfig:
    """The network."""

    preset: str = "15m"
    """Named size: 15m, 50m, 150m, 350m, 760m, 1b, 3b, 7b (with a vocabulary of 32000)."""

    dynamics_placement: Literal["stream", "branch", "force", "force_mlp", "none"] = "force_mlp"
    """Where INL dynamics act in a layer; none is the plain transformer, stream and branch are those
    of the paper."""

    dynamics_adaptive: Literal["token", "channel", "layer", "lite"] = "channel"
    """What the coefficients of the dynamics depend on; with lite they are fixed."""

    num_experts: int = 0
    """Number of experts of the token-routed MLP; 0 for a dense MLP."""

    routing_scheme: Literal["modulo", "balanced"] = "balanced"
    """How token ids are assigned to experts: by their counts in the training text, or by id modulo
    number of experts; unused by a dense MLP."""

    num_loops: int = 1
    """How often the layers in the middle are applied, with the same weights and a velocity that is
    carried from one repetition to the next; 1 is the plain stack."""

    overrides: dict[str, Setting | dict[str, Scalar]] = field(default_factory=dict)
    """Any other field of DeepConfig, e.g. {hidden_size: 192, num_hidden_layers: 6}."""

    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Data type of the weights; bf16 training usually keeps float32 weights with autocast."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "[0, inf)", "num_experts")
        check_range(self, "[1, inf)", "num_loops")


@dataclass
class OptimConfig:
    """AdamW and the learning-rate schedule."""

    lr: float = 2e-3
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay rate of the first moment."""

    beta2: float = 0.95
    """Decay rate of the second moment."""

    weight_decay: float = 0.1
    """Weight decay of the matrices of the backbone; vectors and the dynamics have none."""

    warmup_steps: int = 100
    """Steps of linear warm-up."""

    schedule: Literal[
        "constant_with_warmup", "cosine", "cosine_with_min_lr", "linear", "warmup_stable_decay"
    ] = "cosine"
    """Learning-rate schedule after the warm-up (names of transformers)."""

    schedule_options: dict[str, Scalar] = field(default_factory=dict)
    """Options of the schedule, e.g. {min_lr_rate: 0.1} or {num_decay_steps: 2000}."""

    grad_clip: float = 1.0
    """Maximum global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "[0, inf)", "lr", "weight_decay", "warmup_steps", "grad_clip")
        check_range(self, "[0, 1)", "beta1", "beta2")


@dataclass
class LoraOptions:
    """An adapter to train in place of the network: low-rank matrices beside frozen weights."""

    rank: int = 0
    """Rank of the matrices that are added to the frozen weights of `init_from` (LoRA, arXiv
    2106.09685); the run then writes an adapter folder. 0 trains the full network."""

    alpha: float | None = None
    """Scale of the product of the matrices, times the rank; by default the rank, a scale of 1."""

    dropout: float = 0.0
    """Dropout of the input of the matrices."""

    targets: list[str] = field(
        default_factory=lambda: [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
        ]
    )  # fmt: skip
    """Linear layers that get matrices, by the end of their names."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "(0, inf)", "alpha")
        check_range(self, "[0, inf)", "rank")
        check_range(self, "[0, 1)", "dropout")
        if self.rank and not self.targets:
            raise UserError("lora.targets is empty: name layers, e.g. [q_proj, v_proj]")


@dataclass
class TrainConfig:
    """A training run."""

    out: str = "runs/train-lm"
    """Folder of the run."""

    resume: str = "none"
    """auto (continue from the last checkpoint in `out`, if any), none, or a checkpoint folder."""

    init_from: str | None = None
    """Model folder, checkpoint, folder of a run, or Hub id whose weights, sizes and tokenizer a new
    run starts from (fine-tuning). Ignored when a run is resumed, unless it trains an adapter
    (`lora`) of that model."""

    seed: int = 0
    """Seed of the initial weights and of the data order."""

    steps: int = 2000
    """Optimizer steps."""

    batch_size: int = 16
    """Blocks per step, over all processes."""

    gradient_accumulation_steps: int = 1
    """Number of parts that the batch of a step is split into, to save memory."""

    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast of the forward pass; weights and optimizer state keep their type. auto is bf16 where
    the device has units for it (a GPU, a CPU with amx_bf16 or avx512_bf16), else no; a resumed run
    keeps what it started with."""

    compile: Literal["auto"] | bool = "auto"
    """Compile the model with torch.compile, which takes a minute or more at the start; auto does so
    in runs that are long enough to save more. A resumed run keeps what auto was. A model with a
    loop is compiled layer by layer, once for any number of repetitions."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""

    loop_sampling: Literal["fixed", "uniform", "poisson"] = "fixed"
    """Repetitions of a training step of a model with a loop: always num_loops, or a number drawn
    for each step with that mean, from 1 to 2 num_loops - 1 (uniform) or of 1 + Poisson. Held-out
    text is measured at num_loops."""

    log_every: int = 20
    """Steps between writes to train_log.csv (one row per step) and to the tracker."""

    eval_every: int = 200
    """Steps between measurements of the held-out loss; 0 measures at the end only."""

    eval_blocks: int = 64
    """Held-out blocks per measurement; the end of the run measures all held-out text."""

    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always writes one."""

    keep_last: int = 2
    """Number of checkpoints to keep; 0 keeps all."""

    keep_best: bool = False
    """Also keep the checkpoint of the lowest held-out loss, measured every `eval_every` steps and
    after the last; `model/` is then that one, else the last."""

    dynamics_every: int = 100
    """Steps between records of the dynamics (dynamics.csv and the tracker); 0 for none."""

    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Tracker that gets the curves in addition to the CSV files; tensorboard writes `logs/` in
    `out`."""

    push_to_hub: str | None = None
    """Hub id, such as NAME/MODEL, that `model/` or `adapter/` is uploaded to at the end; needs the
    login of `hf auth login`, which is checked at the start."""

    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s at the run's precision, for the share of it that training
    reaches (MFU); null knows that of some GPUs in bf16, and shows no share on others."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    """An adapter to train in place of the network."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(
            self, "[1, inf)", "steps", "batch_size", "gradient_accumulation_steps", "log_every",
            "eval_blocks", "checkpoint_every",
        )  # fmt: skip
        check_range(self, "[0, inf)", "eval_every", "keep_last", "dynamics_every")
        check_range(self, "(0, inf)", "peak_tflops")
        if self.keep_best and not self.eval_every:
            raise UserError("keep_best needs measurements: set eval_every above 0")
        if self.lora.rank and self.init_from is None:
            raise UserError(
                f"lora.rank {self.lora.rank} trains an adapter of a model: name it with --init_from"
            )
        usual = ModelConfig(dtype=self.model.dtype)
        if self.init_from is not None and self.model != usual:
            name = next(
                name for name, value in vars(usual).items() if getattr(self.model, name) != value
            )
            raise UserError(
                f"model.{name} is {getattr(self.model, name)!r}, but the network is that of "
                "init_from: leave the settings of model out, except its dtype"
            )


@dataclass
class GenerateConfig:
    """Generation settings that are not in transformers' `GenerationConfig`."""

    seed: int = 0
    """Seed of the sampling."""

    batch_size: int = 8
    """Number of prompts generated at once."""

    only_new: bool = False
    """Print the continuation without the prompt."""

    num_loops: int | None = None
    """Repetitions of the loop of a model that has one; null for those it was trained with."""

    device: str = "auto"
    """Device of the model: auto, cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "[1, inf)", "batch_size", "num_loops")


@dataclass
class EvalConfig:
    """What to measure, and how."""

    split: Literal["auto", "heldout", "train", "all"] = "auto"
    """Documents to measure; auto takes the held-out ones of the source that the model was trained
    on, and all of any other source."""

    max_documents: int | None = None
    """Number of documents to measure, the first of the split; null for all."""

    context: int | None = None
    """Tokens per window; null for the context of the model."""

    stride: int | None = None
    """Tokens scored by each window after the first of a document; null for the context (blockwise);
    a smaller stride gives tokens a longer past and takes more time."""

    batch_size: int = 16
    """Number of windows run at once."""

    num_loops: int | None = None
    """Repetitions of the loop of a model that has one; null for those it was trained with."""

    baselines: bool = False
    """Measure gzip -9 and an order-3 byte model (counted on the model's training text) on the same
    bytes too."""

    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks by name, or paths of task files; needs the extra [eval]."""

    task_limit: int | None = None
    """Documents per task; null for all."""

    tokenizer: str | None = None
    """Another tokenizer, as folder or Hub id; null for that of the model."""

    device: str = "auto"
    """Device of the model: auto, cpu, cuda, cuda:1."""

    overwrite: bool = False
    """Replace an existing result.json in the output folder."""

    quiet: bool = False
    """Print no table at the end."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(
            self, "[1, inf)", "batch_size", "max_documents", "task_limit", "context", "stride",
            "num_loops",
        )  # fmt: skip
