"""What a run will need, before it starts: parameters, FLOPs, memory, steps, and an estimated time.

All from the config and the formulas in `costs`; no weights are made and no data is read, but for
the shape of a cache of latents that is there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from complexity_dit.config import PlanConfig, TrainConfig
from complexity_dit.models.tokens import kept_count
from complexity_dit.models.transformer import middle_blocks, swiglu_width
from complexity_dit.training.network import build_model
from inl_core.run.errors import UserError

# Costs by formula. Tests compare the parameters with the network itself, the FLOPs with torch's
# counter and the activations with the tensors that autograd saves. Letters: N tokens · D hidden ·
# H heads · K width of keys and values · F inner width of the MLP · C width of the dynamics'
# controller · P numbers in a patch.

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Widths:
    """The letters of a network's config."""

    layers: int
    hidden: int
    heads: int
    key_value: int
    inner: int
    controller: int
    patch_in: int
    patch_out: int

    @classmethod
    def of(cls, config: Config) -> "Widths":
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        cells = config["patch_size"] ** 2
        return cls(
            layers=config["num_layers"],
            hidden=hidden,
            heads=heads,
            key_value=(config["num_key_value_heads"] or heads) * (hidden // heads),
            inner=swiglu_width(hidden, config["mlp_ratio"]),
            controller=config["dynamics_controller_hidden"],
            patch_in=config["in_channels"] * cells,
            patch_out=(config["out_channels"] or config["in_channels"]) * cells,
        )


def token_count(config: Config) -> int:
    """Tokens of a picture of the training size."""
    return (config["sample_size"] // config["patch_size"]) ** 2


def count_parameters(config: Config) -> int:
    """Parameters of the network, exactly."""
    w = Widths.of(config)
    D = w.hidden
    attention = 2 * D * D + 2 * D * w.key_value + 2 * (D // w.heads)
    adaln = 6 * D * D + 6 * D
    block = attention + _mlp_parameters(config, w) + adaln + _dynamics_parameters(config, w)
    embeddings = sum(count + 1 for count in config["num_classes"]) * D
    time = (256 * D + D) + (D * D + D)
    ends = (w.patch_in * D + D) + (2 * D * D + 2 * D) + (D * w.patch_out + w.patch_out)
    mixes = (w.layers - 1) if config["value_residual"] else 0
    return w.layers * block + embeddings + time + ends + mixes


def _mlp_parameters(config: Config, w: Widths) -> int:
    if _is_routed(config):  # the experts and the shared one, each half as wide
        return 3 * w.hidden * (w.inner // 2) * (config["num_experts"] + 1)
    return 3 * w.hidden * w.inner


def _dynamics_parameters(config: Config, w: Widths) -> int:
    D, C = w.hidden, w.controller
    coefficients = {
        "token": 2 * D * C + C + 3 * D * C + 3 * D,
        "channel": 3 * D,
        "layer": 3,
        "lite": 0,
    }[config["dynamics_adaptive"]]
    return _dynamics_in_a_block(config) * (D + coefficients)


def _dynamics_in_a_block(config: Config) -> int:
    placements = {"none": 0, "branch": 1, "stream": 1, "force": 2, "force_mlp": 1}
    return placements[config["dynamics_placement"]]


def _is_routed(config: Config) -> bool:
    return config["routing"] != "none"


def forward_flops(config: Config, kept: int | None = None) -> int:
    """FLOPs of the matrix products of one picture's forward pass, two for a multiply-add.

    Args:
        config: Of the transformer.
        kept: Tokens that go through the middle blocks; None means all.
    """
    w, N = Widths.of(config), token_count(config)
    D = w.hidden
    total = 2 * N * w.patch_in * D + 2 * (256 * D + D * D)  # patches in, timestep
    for layer in range(w.layers):
        total += _block_flops(config, w, _tokens_at(config, layer, N, kept), first=layer == 0)
    return total + 2 * D * 2 * D + 2 * N * D * w.patch_out  # last modulation, patches out


def _block_flops(config: Config, w: Widths, N: int, first: bool) -> int:
    D = w.hidden
    attention = 2 * N * (2 * D * D + 2 * D * w.key_value) + 4 * N * N * D
    mlp = 2 * N * 3 * D * (2 * (w.inner // 2) if _is_routed(config) else w.inner)
    dynamics = 0
    if config["dynamics_adaptive"] == "token":
        # (a, b, c) from h and v; the first step of all has no velocity to read.
        each = 2 * N * w.controller * (2 * D + 3 * D)
        steps = _dynamics_in_a_block(config)
        dynamics = steps * each - (2 * N * w.controller * D if first and steps else 0)
    return attention + mlp + dynamics + 2 * D * 6 * D


def _tokens_at(config: Config, layer: int, tokens: int, kept: int | None) -> int:
    if kept is None:
        return tokens
    start, end = middle_blocks(config)
    return kept if start <= layer < end else tokens


def training_flops(config: Config, kept: int | None = None) -> int:
    """FLOPs of one picture's forward and backward pass; recomputation is not counted.

    The backward of a product is two products, for its input and for its weight; pictures need no
    gradient.
    """
    w = Widths.of(config)
    no_input_gradient = 2 * token_count(config) * w.patch_in * w.hidden
    return 3 * forward_flops(config, kept) - no_input_gradient


# Tensors that autograd keeps in a block, in units of 4 bytes, from the definitions in plain PyTorch
# (which runs on a CPU): of width D, of width K, of width F; then what dynamics add: of width D, of
# width C. bf16 is autocast: products in bf16, norms and dynamics in fp32.
_KEPT = {"no": (12.0, 4.0, 4.0), "bf16": (10.0, 3.0, 3.5)}
_KEPT_BY_DYNAMICS = {
    "no": {"token": (12, 2), "channel": (3, 0), "layer": (3, 0), "lite": (1, 0)},
    "bf16": {"token": (11, 1), "channel": (4, 0), "layer": (4, 0), "lite": (1, 0)},
}


def activation_bytes(
    config: Config, precision: str, kept: int | None = None, checkpointing: bool = False
) -> int:
    """Bytes that autograd keeps for one picture between forward and backward.

    Eager PyTorch, operations as their definitions: an upper bound for the compiled network and for
    the kernels, which keep the inputs of an operation and not its intermediate results. A routed
    MLP is taken as the dense one of the same active width.

    Args:
        config: Of the transformer.
        precision: "no" (fp32) or "bf16" (autocast).
        kept: Tokens that go through the middle blocks; None means all.
        checkpointing: Only the inputs of blocks are kept, and one block while it is recomputed.
    """
    w, N = Widths.of(config), token_count(config)
    D = w.hidden
    blocks = [
        _block_bytes(config, w, precision, _tokens_at(config, layer, N, kept))
        for layer in range(w.layers)
    ]
    if checkpointing:
        carried = 1 + (config["dynamics_placement"] != "none")
        inputs = 4 * D * sum(_tokens_at(config, i, N, kept) for i in range(w.layers)) * carried
        kept_of_blocks = inputs + max(blocks)
    else:
        kept_of_blocks = sum(blocks)
    width = 4 if precision == "no" else 2
    ends = width * N * w.patch_in + (8 + width) * N * D + 4 * N * w.patch_out
    return int(kept_of_blocks + ends)


def _block_bytes(config: Config, w: Widths, precision: str, N: int) -> float:
    D = w.hidden
    of_d, of_k, of_f = _KEPT[precision]
    if config["value_residual"]:  # the difference to the first block's values
        of_k += 1.0 if precision == "no" else 0.5
    more_d, of_c = _KEPT_BY_DYNAMICS[precision][config["dynamics_adaptive"]]
    steps = _dynamics_in_a_block(config)
    per_token = of_d * D + of_k * w.key_value + of_f * w.inner
    per_token += steps * (more_d * D + of_c * w.controller)
    if config["dynamics_adaptive"] == "token":
        # A force replaces the gated sum that would have kept its branch.
        per_token -= {"force": 2, "force_mlp": 1}.get(config["dynamics_placement"], 0) * D
    per_token += 2 * w.heads + w.heads * w.key_value // D + 2  # norms of q and k, log-sum-exp
    return 4 * (N * per_token + 10 * D)  # and the modulation of the picture


def state_bytes(config: Config, precision: str, optimizer: str) -> dict[str, int]:
    """Bytes that do not depend on the batch.

    Weights, gradients, moments and the average in fp32, and autocast's copies of the weights.
    """
    parameters, w = count_parameters(config), Widths.of(config)
    moments = 8 * parameters
    if optimizer == "muon":  # one moment for the matrices of attention and MLP
        attention = 2 * w.hidden * (w.hidden + w.key_value)
        mlp = 0 if _is_routed(config) else 3 * w.hidden * w.inner
        moments -= 4 * w.layers * (attention + mlp)
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": moments,
        "average": 4 * parameters,
        "weights in bf16": 0 if precision == "no" else 2 * parameters,
    }


@dataclass(frozen=True)
class _DataShape:
    """What `build_model` reads of a dataset."""

    label_names: dict[str, list[str]]
    channels: int
    sample_size: int


def plan(config: TrainConfig, options: PlanConfig) -> str:
    """The table that the command prints.

    Args:
        config: The run.
        options: What it does not say.

    Returns:
        Lines of text, a quantity each.

    Raises:
        UserError: The model of the config cannot be built, the batch cannot be split, or a shape or
            half of an estimate is missing.
    """
    if config.lora.rank:
        raise UserError(
            "plan counts whole networks: leave lora.rank at 0 for the base's numbers; an adapter "
            "has the base's activations and next to no state"
        )
    shape = _data_shape(config, options)
    devices = options.processes * config.gradient_accumulation_steps
    if options.processes < 1 or config.batch_size % devices:
        raise UserError(
            f"batch_size {config.batch_size} must be divisible by processes x accumulation steps, "
            f"{options.processes} x {config.gradient_accumulation_steps}"
        )
    # On the meta device a network has shapes and no numbers: this checks the config, whatever size.
    # Overrides, because a training set says its shape itself.
    size = {"in_channels": shape.channels, "sample_size": shape.sample_size}
    model_config = replace(config.model, overrides=size | config.model.overrides)
    with torch.device("meta"):
        network = build_model(replace(config, model=model_config), shape).config  # pyright: ignore

    counted = zip(network["label_fields"], network["num_classes"], strict=True)
    labels = ", ".join(f"{count:,} of {field}" for field, count in counted)
    tokens, parameters = token_count(network), count_parameters(network)
    rate = config.model.token_drop_rate
    kept = kept_count(tokens, rate) if rate else None
    flops = training_flops(network, kept)
    images = config.steps * config.batch_size
    lines = [
        ("tokens an image", f"{tokens:,}" + (f", {kept:,} of them in the middle" if kept else "")),
        ("labels", labels or "none counted; give --num_classes"),
        ("parameters", f"{parameters:,}"),
        ("forward", f"{forward_flops(network) / 1e9:,.4g} GFLOP an image"),
        ("training", f"{flops / 1e9:,.4g} GFLOP an image (forward and backward)"),
        ("steps", f"{config.steps:,} of {config.batch_size:,} images: {images:,} images"),
        ("whole run", f"{images * flops:.3g} FLOP"),
    ]
    if options.train_images is not None:
        epochs = images / options.train_images
        lines.append(("epochs", f"{epochs:,.4g} of {options.train_images:,} images"))
    lines += _memory_lines(config, options, network, kept)
    lines += _time_lines(options, flops, images)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _data_shape(config: TrainConfig, options: PlanConfig) -> _DataShape:
    """From the options, or what the data tells without being read."""
    channels, cells, counts = options.channels, options.cells, dict(options.num_classes)
    scheme, _, path = config.data.source.partition(":")
    cache = Path(path) / "cache.json"
    if scheme == "latents" and cache.is_file():
        info = json.loads(cache.read_text())
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
    # Names are not asked for: any will do.
    names = {field: [str(i) for i in range(count)] for field, count in counts.items()}
    return _DataShape(names, channels, cells)


def _memory_lines(
    config: TrainConfig, options: PlanConfig, network: dict, kept: int | None
) -> list[tuple[str, str]]:
    precision = "no" if config.mixed_precision == "no" else "bf16"
    state = state_bytes(network, precision, config.optim.name)
    local = config.batch_size // options.processes // config.gradient_accumulation_steps
    activations = local * activation_bytes(network, precision, kept, config.gradient_checkpointing)
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
    if not speed > 0:
        raise UserError(f"an estimate of the time needs a speed above 0, got {speed:g} images/s")
    hours = images / speed / 3600
    took = f"{hours:,.3g} h" if hours < 48 else f"{hours / 24:,.3g} days"
    return [("time, an estimate", f"{took} at {speed:,.4g} images/s, {source}")]


def _size(count: float) -> str:
    return f"{count / 2**30:,.3g} GiB" if count >= 2**30 else f"{count / 2**20:,.3g} MiB"
