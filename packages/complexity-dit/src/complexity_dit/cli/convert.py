"""`complexity-dit convert`: a pipeline to train from, from a checkpoint of the research code.

The layout is that of `ComplexityDiT` in github.com/Complexity-ML/complexity-diffusion (read at
commits 9ad94a0 and 18f6e8b). That network is a different function: its dynamics act between
attention and MLP, every expert of its MLP processes every token, a cross-attention reads text, and
a contextual mu is passed from layer to layer. So the result is an *initialisation for training*:
parts with a counterpart here compute the same as there, and the others are listed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from complexity_dit.config import ObjectiveConfig
from complexity_dit.models.loading import load_tensors
from complexity_dit.models.transformer import SIZES, ComplexityDiTTransformer2DModel, swiglu_width
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.objective import build_scheduler
from inl_core.run.errors import UserError
from inl_core.run.folders import new_folder

# Source tensors without a counterpart: part of the name and the reason; the first match counts.
_NO_MLP = "every expert processes every token: there is no such MLP here"
_LEFT_OUT = (
    ("t_embed.", "the time embedding has another width"),
    (".cross_attn.", "there is no cross-attention; its output for a context of zeros is zero"),
    (".norm2.", "the norm before the cross-attention"),
    (".norm_context.", "the norm of the text"),
    ("null_embedding", "the embedding of the empty text"),
    (".self_attn.mu_to_", "mu is not passed from layer to layer"),
    (".dynamics.mu_proj.", "mu does not depend on the token"),
    (".mlp.router.", _NO_MLP),
    (".mlp.mu_router.", _NO_MLP),
    (".mlp.experts_", _NO_MLP),
    ("rope.inv_freq", "computed, not stored"),
)
_INITIALISED = (
    ("time_embed.", "initialised: the source has another width"),
    (".mlp.", "initialised: the source's experts have no counterpart"),
)

_MAX_RATIO, _ALWAYS_ALLOWED = 4, 10_000_000
"""A network may have this many times the numbers of its checkpoint, or a few of its own."""


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        network: The network, with the converted parameters.
        taken: Parameter -> the source tensors it was made of.
        left_out: Source tensor -> why it has no counterpart.
        fresh: Parameter -> why it was initialised.
    """

    network: ComplexityDiTTransformer2DModel
    taken: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A report of a few lines, with the settings that further training needs."""
        config = self.network.config
        size = {shape: name for name, shape in SIZES.items()}.get(
            (config.hidden_size, config.num_layers, config.num_attention_heads)
        )
        lines = [f"converted: {len(self.taken)} parameters"]
        for title, parts in (("left out", self.left_out), ("new", self.fresh)):
            for reason in dict.fromkeys(parts.values()):
                names = [name for name in parts if parts[name] == reason]
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                lines.append(f"{title}: {names[0]}{more}: {reason}")
        lines += [
            "different by design: the dynamics act after the MLP, not before it, and tokens have",
            "absolute positions. Continue training with",
            f"  --model.size {size or 'S'} --model.patch_size {config.patch_size} "
            "--model.dynamics_placement stream --model.dynamics_adaptive token",
            f"  --model.overrides '{_overrides(config, size)}' --objective.prediction_type epsilon",
        ]
        return "\n".join(lines)


def convert(
    checkpoint: str | Path, out: str | Path, num_attention_heads: int | None = None
) -> Conversion:
    """Write a pipeline folder for `train --init_from` from a checkpoint.

    Args:
        checkpoint: State dict as one safetensors file (the research code's
            `convert_to_safetensors.py` writes it). Pickles are refused.
        out: The folder to write; must not exist.
        num_attention_heads: Heads of the source, to compare with its QK-norm.

    Raises:
        UserError: For a pickle, an unreadable file, tensors of another layout, sizes that do not
            fit each other, or a folder that exists.
    """
    tensors, out = _read(Path(checkpoint)), Path(out)
    with new_folder(out) as folder:
        conversion = from_state_dict(tensors, num_attention_heads)
        scheduler = build_scheduler(ObjectiveConfig(prediction_type="epsilon"))
        ComplexityDiTPipeline(conversion.network, scheduler).save_pretrained(folder)
    return conversion


@torch.no_grad()
def from_state_dict(
    tensors: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> Conversion:
    """Convert a state dict; see `convert`."""
    try:
        return _converted(tensors, num_attention_heads)
    except UserError:
        raise
    # Any operation can meet a tensor of the wrong rank or size first.
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the checkpoint's tensors do not fit each other: {error}") from error


def _converted(tensors: Mapping[str, Tensor], num_attention_heads: int | None) -> Conversion:
    config = _config_of(tensors, num_attention_heads)
    _check_size(config, tensors)
    conversion = Conversion(ComplexityDiTTransformer2DModel(**config))
    for name, make, *sources in _rules(config, tensors):
        if missing := [source for source in sources if source not in tensors]:
            raise UserError(f"the checkpoint has no {missing[0]}: it has another layout")
        try:
            value = make(*(tensors[source].float() for source in sources))
            parameter = conversion.network.get_parameter(name)
            if value.shape != parameter.shape:  # copy_ would broadcast
                raise RuntimeError(f"{tuple(value.shape)} in place of {tuple(parameter.shape)}")
            parameter.copy_(value)
        except RuntimeError as error:
            shapes = ", ".join(f"{s} {tuple(tensors[s].shape)}" for s in sources)
            raise UserError(f"{shapes} cannot become {name}: {error}") from error
        conversion.taken[name] = sources

    used = {source for sources in conversion.taken.values() for source in sources}
    for name in tensors:
        if name not in used:
            reason = _reason(name, _LEFT_OUT, "the checkpoint has another layout")
            conversion.left_out[name] = reason
    for name, _ in conversion.network.named_parameters():
        if name not in conversion.taken:
            conversion.fresh[name] = _reason(name, _INITIALISED, "no counterpart was found")
    return conversion


def _rules(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[Any, ...]]:
    """For each parameter with a counterpart: (name, function of the sources, *source names)."""
    hidden, patch, channels = (config[n] for n in ("hidden_size", "patch_size", "in_channels"))
    width = hidden // config["num_attention_heads"]
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])

    def same(x: Tensor) -> Tensor:
        return x

    def reordered(x: Tensor) -> Tensor:
        """Channels that rotate as a pair are adjacent there and half a head apart here."""
        return x.unflatten(0, (-1, width))[:, order].flatten(0, 1)

    def permuted(x: Tensor) -> Tensor:
        """Output rows are (row, column, channel) there and (channel, row, column) here."""
        return x.unflatten(0, (patch, patch, channels)).movedim(2, 0).flatten(0, 2)

    def modulation(parts: int) -> Callable[..., Tensor]:
        """Fold the weights w of the norms, which have none here, into the scale s of AdaLN.

        w * n * (1 + s) + t = n * (1 + s') + t with s' = w * s + w - 1, linear in the condition.
        Each norm has a group of `parts` chunks: shift, scale and, if there are three, a gate.
        """

        def folded(x: Tensor, *weights: Tensor) -> Tensor:
            chunks = list(x.chunk(parts * len(weights)))
            for i, weight in enumerate(weights):
                scale = chunks[i * parts + 1]
                is_bias = scale.ndim == 1
                scale = weight * scale + weight - 1 if is_bias else weight[:, None] * scale
                chunks[i * parts + 1] = scale
            return torch.cat(chunks)

        return folded

    yield "patch_embed.weight", lambda w: w.flatten(1), "patch_embed.proj.weight"
    yield "patch_embed.bias", same, "patch_embed.proj.bias"
    for i in range(config["num_layers"]):
        block = f"blocks.{i}"
        attention, dynamics = f"{block}.self_attn", f"{block}.dynamics"
        for letter, change in (("q", reordered), ("k", reordered), ("v", same)):
            yield f"{block}.attn.to_{letter}.weight", change, f"{attention}.{letter}_proj.weight"
        yield f"{block}.attn.to_out.0.weight", same, f"{attention}.out_proj.weight"
        for letter in "qk":
            name = f"{block}.attn.norm_{letter}.weight"
            yield name, reordered, f"{attention}.{letter}_norm.weight"
        norms = f"{block}.norm1.weight", f"{block}.norm3.weight"
        for kind in ("weight", "bias"):
            source = f"{block}.adaLN_modulation.1.{kind}"
            yield f"{block}.adaln.{kind}", modulation(3), source, *norms
        yield f"{dynamics}.mu", same, f"{dynamics}.mu"
        first, second = f"{dynamics}.controller.0", f"{dynamics}.controller.2"
        yield f"{dynamics}.weight_in_h", lambda w: w[:, :hidden], f"{first}.weight"
        yield f"{dynamics}.weight_in_v", lambda w: w[:, hidden:], f"{first}.weight"
        yield f"{dynamics}.bias_in", same, f"{first}.bias"
        yield f"{dynamics}.weight_out", same, f"{second}.weight"
        yield f"{dynamics}.bias_out", same, f"{second}.bias"
        if f"{block}.mlp.gate_proj.weight" in tensors:
            for name in ("gate", "up", "down"):
                yield f"{block}.mlp.{name}.weight", same, f"{block}.mlp.{name}_proj.weight"
    for kind in ("weight", "bias"):
        source = f"final_layer.adaLN_modulation.1.{kind}"
        yield f"adaln_out.{kind}", modulation(2), source, "final_layer.norm.weight"
    yield "proj_out.weight", permuted, "final_layer.linear.weight"
    yield "proj_out.bias", permuted, "final_layer.linear.bias"


def _config_of(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The config of the network, from the shapes of the tensors."""
    try:
        hidden, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        keys = tensors["blocks.0.self_attn.k_proj.weight"].shape[0]
        controller = tensors["blocks.0.dynamics.controller.0.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"not a checkpoint of the research code ({error}): expected patch_embed.proj.weight, "
            "blocks.0.self_attn.k_proj.weight and blocks.0.dynamics.controller.0.weight"
        ) from error
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    norm = tensors.get("blocks.0.self_attn.q_norm.weight")
    if norm is None:
        raise UserError("the checkpoint has no QK-norm, which the attention here always has")
    width = norm.shape[0]
    if heads not in (None, hidden // width):
        raise UserError(
            f"num_attention_heads {heads} must be {hidden // width}: heads are {width} wide"
        )
    ratio = 8 / 3
    if (gate := tensors.get("blocks.0.mlp.gate_proj.weight")) is not None:
        ratio = gate.shape[0] / hidden
        if swiglu_width(hidden, ratio) != gate.shape[0]:
            raise UserError(
                f"the MLP is {gate.shape[0]} wide and must be a multiple of 64 wide to be converted"
            )
    return {
        "sample_size": 32,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_attention_heads": hidden // width,
        "num_key_value_heads": keys // width,
        "mlp_ratio": ratio,
        "rope_theta": 10000.0,
        "dynamics_placement": "stream",
        "dynamics_adaptive": "token",
        "dynamics_controller_hidden": controller,
        "dynamics_mu_min": None,  # unbounded in the source
        "dynamics_mu_max": None,
    }


def _check_size(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a small file whose shapes describe a huge network."""
    if config["num_layers"] > len(tensors):
        raise UserError(f"{len(tensors)} tensors cannot form {config['num_layers']} blocks")
    try:
        with torch.device("meta"):
            network = ComplexityDiTTransformer2DModel(**config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"the sizes do not form a network: {error}") from error
    expected = sum(p.numel() for p in network.parameters())
    current = sum(t.numel() for t in tensors.values())
    if expected > _MAX_RATIO * current + _ALWAYS_ALLOWED:
        raise UserError(
            f"the checkpoint has {current} numbers, and its shapes describe a network of "
            f"{expected}: tensors are missing"
        )


def _overrides(config: Mapping[str, Any], size: str | None) -> str:
    names = ["num_key_value_heads", "mlp_ratio", "rope_theta", "dynamics_controller_hidden",
             "dynamics_mu_min", "dynamics_mu_max"]  # fmt: skip
    if size is None:
        names += ["hidden_size", "num_layers", "num_attention_heads"]
    values = ("null" if config[n] is None else config[n] for n in names)
    return "{" + ", ".join(f"{n}: {v}" for n, v in zip(names, values, strict=True)) + "}"


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a safetensors file, and pickles are not loaded: if you trust it, "
            "convert it with the research code's convert_to_safetensors.py"
        )
    try:
        return load_tensors(path)
    except Exception as error:  # of safetensors, OSError, ValueError, MemoryError, …
        raise UserError(f"cannot read {path}: {error}") from error


def _reason(name: str, reasons: tuple[tuple[str, str], ...], default: str) -> str:
    return next((reason for part, reason in reasons if part in name), default)
