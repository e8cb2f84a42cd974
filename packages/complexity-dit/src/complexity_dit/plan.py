"""What a run will need, before it starts: parameters, FLOPs, memory, steps, and an estimated time.

All from the config and the formulas in `costs`; no weights are made and no data is read, but for
the shape of a cache of latents that is there.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from complexity_dit.build import build_model
from complexity_dit.config import PlanConfig, TrainConfig
from complexity_dit.costs import (
    activation_bytes,
    count_parameters,
    forward_flops,
    state_bytes,
    token_count,
    training_flops,
)
from complexity_dit.models.tokens import kept_count
from inl_core.run.errors import UserError


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
