"""Needs of a run before it starts: parameters, FLOPs, memory, steps and an estimated time.

The network is built and run without numbers, on the meta device and with fake tensors, and what
torch counts there is printed. No data is read except the shape in the description of a latent
cache.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.config import OptimConfig, PlanConfig, TextEncoderConfig, TrainConfig
from complexity_dit.data.clusters import CLUSTER_FIELD
from complexity_dit.data.latents import read_cache
from complexity_dit.distributed import pick_device
from complexity_dit.models.text import outline_text_encoder, text_width
from complexity_dit.models.tokens import kept_count
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.training.batches import images_per_pass
from complexity_dit.training.network import build_model
from complexity_dit.training.optimizer import build_optimizer
from complexity_dit.training.text import PromptedNetwork
from inl_core.run.automatic import AUTO, choose_compile, choose_precision
from inl_core.run.errors import UserError

Config = Mapping[str, Any]


def token_count(config: Config) -> int:
    """Number of tokens of an image of the training size."""
    return (config["sample_size"] // config["patch_size"]) ** 2


class Networks(NamedTuple):
    """The network of a run, and the text encoder that is trained with it.

    Attributes:
        network: The network.
        encoder: None without text, or with an encoder that is frozen: it reads each caption once.
        text_tokens: Tokens of a caption, at most; 0 without text.
    """

    network: ComplexityDiTTransformer2DModel
    encoder: Any = None
    text_tokens: int = 0

    @classmethod
    def built(cls, config: Config, text: TextEncoderConfig | None) -> "Networks":
        """Those of a network's config, where torch is told to build them."""
        network = ComplexityDiTTransformer2DModel.from_config(config)
        if text is None or text.source == "none":
            return cls(network)
        encoder = outline_text_encoder(text) if text.trains else None
        return cls(network, encoder, text.max_length)

    def trained(self) -> nn.Module:
        """What the optimizer updates, as one module."""
        if self.encoder is None:
            return self.network
        return PromptedNetwork(self.network, self.encoder)


def count_flops(
    config: Config, kept: int | None = None, text: TextEncoderConfig | None = None
) -> tuple[int, int]:
    """FLOPs of the matrix products for one image, two per multiply-add: forward, and both passes.

    Recomputation is not counted. `kept` is the number of tokens that go through the middle blocks;
    None means all. With `text`, captions have as many tokens as they may have.
    """
    with torch.device("meta"):
        networks = Networks.built(config, text)
        # The counter does not know the fused attention of a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = _loss(networks, 1, kept)
            forward = counter.get_total_flops()
            loss.backward()
    return forward, counter.get_total_flops()


def activation_bytes(
    config: Config,
    precision: str,
    kept: int | None = None,
    checkpointing: bool = False,
    text: TextEncoderConfig | None = None,
) -> int:
    """Bytes per image that autograd keeps between forward and backward pass.

    For eager PyTorch and the reference operations, so it is an upper bound: compiled code and the
    GPU kernels keep inputs of an operation and no intermediate results. `precision` is "no" (fp32)
    or "bf16" (autocast). With `checkpointing` only the inputs of blocks are kept, and one block
    while it is recomputed.
    """
    with FakeTensorMode():
        networks = Networks.built(config, text)
        # As on an accelerator: in bf16 on a CPU attention keeps its weights up to 512 tokens.
        networks.network.set_attention_backend("native")
        # What does not grow with the batch, copies of weights in bf16, cancels out.
        (total, block), (total_of_two, block_of_two) = (
            _saved_bytes(networks, images, precision, kept) for images in (1, 2)
        )
        if not checkpointing:
            return total_of_two - total
        networks.network.enable_gradient_checkpointing()
        (total, _), (total_of_two, _) = (
            _saved_bytes(networks, images, precision, kept) for images in (1, 2)
        )
        return total_of_two - total + block_of_two - block


def state_bytes(
    config: Config,
    precision: str,
    optim: OptimConfig,
    averages: int = 1,
    text: TextEncoderConfig | None = None,
) -> dict[str, int]:
    """Bytes that do not depend on the batch.

    Weights, gradients, moments and averages in fp32, and copies of the weights in bf16 under
    autocast; of a frozen text encoder the weights.
    """
    frozen = {}
    with FakeTensorMode():
        trained = Networks.built(config, text).trained()
        moments = sum(
            4 * p.numel() * (2 if "betas" in group else 1)  # Muon has a single moment
            for group in build_optimizer(trained, optim).param_groups
            for p in group["params"]
        )
        parameters = sum(p.numel() for p in trained.parameters())
        if text is not None and text.source != "none" and not text.trains:
            frozen = {"text encoder": 4 * outline_text_encoder(text).num_parameters()}
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": moments,
        "average" if averages == 1 else "averages": 4 * parameters * averages,
        "weights in bf16": 0 if precision == "no" else 2 * parameters,
        **frozen,
    }


def _loss(networks: Networks, images: int, kept: int | None) -> Tensor:
    network, encoder, length = networks
    config, text = network.config, {}
    if encoder is not None:
        ids = torch.zeros(images, length, dtype=torch.int64)
        text = {"encoder_hidden_states": encoder(input_ids=ids).last_hidden_state}
    elif length:
        text = {"encoder_hidden_states": torch.empty(images, length, config.caption_channels)}
    x = torch.empty(images, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.zeros(images, len(config.label_fields), dtype=torch.int64)
    tokens = None if kept is None else torch.zeros(images, kept, dtype=torch.int64)
    outputs = network(
        x, torch.empty(images), labels, kept_tokens=tokens, return_dict=False,
        return_auxiliary=config.auxiliary_layer > 0, **text,
    )  # fmt: skip
    first, *others = (
        F.mse_loss(o.float(), torch.empty_like(o, dtype=torch.float32)) for o in outputs
    )
    return sum(others, first)


def _saved_bytes(
    networks: Networks, images: int, precision: str, kept: int | None
) -> tuple[int, int]:
    """Bytes of the storages that autograd keeps other than weights: of all, and of one block."""
    weights = {p.untyped_storage()._cdata for p in networks.trained().parameters()}
    saved: dict[int, tuple[int, Tensor]] = {}  # with the tensor, so that no address is used twice
    at_block: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    def total() -> int:
        return sum(size for size, _ in saved.values())

    def note(*_: object) -> None:
        at_block.append(total())

    hooks = [
        register(note)
        for block in networks.network.blocks
        for register in (block.register_forward_pre_hook, block.register_forward_hook)
    ]
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        _loss(networks, images, kept)
    for hook in hooks:
        hook.remove()
    blocks = zip(at_block[::2], at_block[1::2], strict=True)
    return total(), max(after - before for before, after in blocks)


def plan(config: TrainConfig, options: PlanConfig) -> str:
    """The table that the command prints, one line per quantity."""
    if config.lora.rank:
        raise UserError(
            "plan counts full networks: leave lora.rank at 0 for the numbers of the base; an "
            "adapter has the activations of the base and next to no state"
        )
    shape = _data_shape(config, options)
    # As overrides, because `build_model` takes the shape from the data otherwise.
    size = {"in_channels": shape.channels, "sample_size": shape.sample_size}
    text, captions = config.text_encoder, []
    with torch.device("meta"):
        if text.source != "none":
            encoder = outline_text_encoder(text)
            size["caption_channels"] = text_width(encoder)
            how = "trained along" if text.trains else "frozen: it reads each caption once"
            captions = [("text encoder", f"{encoder.num_parameters():,} parameters, {how}")]
        model_config = replace(config.model, overrides=size | config.model.overrides)
        model = build_model(replace(config, model=model_config), shape)
    network = model.config

    counted = zip(network["label_fields"], network["num_classes"], strict=True)
    labels = ", ".join(f"{count:,} of {field}" for field, count in counted)
    tokens, rate = token_count(network), config.model.token_drop_rate
    kept = kept_count(tokens, rate) if rate else None
    forward, flops = count_flops(network, text=text)
    flops = flops if kept is None else count_flops(network, kept, text)[1]
    images = config.steps * config.batch_size
    config, automatic = _automatic(config, options, images * flops)
    lines = [
        (
            "tokens an image",
            f"{tokens:,}"
            + (f", {kept:,} of them in the middle" if kept else "")
            + (f", and up to {text.max_length:,} of its caption" if captions else ""),
        ),
        ("labels", labels or ("none counted" if captions else "none counted; give --num_classes")),
        ("parameters", f"{model.num_parameters():,}"),
        *captions,
        ("forward", f"{forward / 1e9:,.4g} GFLOP an image"),
        ("training", f"{flops / 1e9:,.4g} GFLOP an image (forward and backward)"),
        ("steps", f"{config.steps:,} of {config.batch_size:,} images: {images:,} images"),
        ("whole run", f"{images * flops:.3g} FLOP"),
        *automatic,
    ]
    if options.train_images is not None:
        epochs = images / options.train_images
        lines.append(("epochs", f"{epochs:,.4g} of {options.train_images:,} images"))
    lines += _memory_lines(config, options, network, kept)
    lines += _time_lines(options, flops, images)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _automatic(
    config: TrainConfig, options: PlanConfig, flops: int
) -> tuple[TrainConfig, list[tuple[str, str]]]:
    """The config with what `auto` would be on this machine, and a line for each of these."""
    device, lines = pick_device("auto"), []
    if config.mixed_precision == AUTO:
        choice = choose_precision(device)
        config = replace(config, mixed_precision=choice.value)
        lines.append(("mixed_precision", f"{choice.value} on this machine: {choice.reason}"))
    if config.compile == AUTO:
        choice = choose_compile(flops / options.processes, device)
        config = replace(config, compile="regional" if choice.value else "no")
        lines.append(("compile", f"{config.compile} on this machine: {choice.reason}"))
    return config, lines


def _data_shape(config: TrainConfig, options: PlanConfig) -> Any:
    """What `build_model` reads of a dataset: options, else the cache of latents or the config."""
    channels, cells, counts = options.channels, options.cells, dict(options.num_classes)
    scheme, _, path = config.data.source.partition(":")
    cache = Path(path) / "cache.json"
    if scheme == "latents" and cache.is_file():
        info = read_cache(Path(path))
        channels, cells = channels or info["shape"][0], cells or info["shape"][1]
        fields = config.data.label_fields
        names = info["label_names"]
        counts = counts or {f: len(names[f]) for f in (names if fields is None else fields)}
    elif scheme != "latents":
        channels, cells = channels or 3, cells or config.data.resolution
    if channels is None or cells is None:
        raise UserError(
            f"there is no cache {path} to read the shape of its latents from: give --channels and "
            "--cells (4 and 32 for 256 px with the VAE of Stable Diffusion)"
        )
    if config.data.clusters:
        counts[CLUSTER_FIELD] = config.data.clusters
    # Only the number of names matters.
    names = {field: [str(i) for i in range(count)] for field, count in counts.items()}
    return SimpleNamespace(label_names=names, channels=channels, sample_size=cells)


def _memory_lines(
    config: TrainConfig, options: PlanConfig, network: dict, kept: int | None
) -> list[tuple[str, str]]:
    precision = "no" if config.mixed_precision == "no" else "bf16"
    averages, text = 1 + len(config.ema.kept_lengths), config.text_encoder
    state = state_bytes(network, precision, config.optim, averages, text)
    parts = config.gradient_accumulation_steps
    local = images_per_pass(config.batch_size, options.processes, parts)
    activations = local * activation_bytes(
        network, precision, kept, config.gradient_checkpointing, text
    )
    total = sum(state.values())
    parts = ", ".join(f"{name} {_size(size)}" for name, size in state.items() if size)
    lines = [
        ("state", f"{_size(total)}: {parts}"),
        (
            "activations",
            f"{_size(activations)} for {local:,} images at once"
            + (", recomputed" if config.gradient_checkpointing else "")
            + " (eager; compiled or with kernels less)",
        ),
        ("memory of a device", f"{_size(total + activations)}"),
    ]
    if options.processes > 1:
        shared = total / options.processes + activations
        lines.append(("with FSDP", f"{_size(shared)}: state shared by {options.processes}"))
    return lines


def _time_lines(options: PlanConfig, flops: int, images: int) -> list[tuple[str, str]]:
    if options.images_per_second is not None:
        speed, source = options.images_per_second, "at the speed given"
    elif options.mfu is not None and options.peak_tflops is not None:
        peak = 1e12 * options.peak_tflops * options.processes
        speed = options.mfu * peak / flops
        devices = f"{options.processes} x {options.peak_tflops:g} TFLOP/s"
        source = f"if {devices} are used at {options.mfu:.0%}"
    elif options.mfu is not None or options.peak_tflops is not None:
        raise UserError("an estimate of the time needs --mfu and --peak_tflops together")
    else:
        return [("time", "give --images_per_second, or --mfu and --peak_tflops, for an estimate")]
    hours = images / speed / 3600
    took = f"{hours:,.3g} h" if hours < 48 else f"{hours / 24:,.3g} days"
    return [("time, an estimate", f"{took} at {speed:,.4g} images/s, {source}")]


def _size(count: float) -> str:
    return f"{count / 2**30:,.3g} GiB" if count >= 2**30 else f"{count / 2**20:,.3g} MiB"
