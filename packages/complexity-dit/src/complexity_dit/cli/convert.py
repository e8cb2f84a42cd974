"""From a checkpoint of the authors' research code to a pipeline folder to train on from.

The layout is that of `ComplexityDiT` in github.com/Complexity-ML/complexity-diffusion (read at
commits 9ad94a0 and 18f6e8b). Their network is another function than ours: the dynamics stand
between attention and MLP, every expert of the MLP sees every token, a cross-attention reads text,
and a contextual mu goes from layer to layer. So a conversion gives a *start for training*: what has
a counterpart here computes there what it computed, the rest is named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from complexity_dit.config import ObjectiveConfig
from complexity_dit.models.transformer import SIZES, ComplexityDiTTransformer2DModel, swiglu_width
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.training.objective import build_scheduler
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder

# Parts without a counterpart: what a key contains, and why. The first that fits speaks.
_LEFT_OUT: tuple[tuple[str, str], ...] = (
    ("t_embed.", "the time embedding has another width"),
    (".cross_attn.", "there is no cross-attention; of a context of zeros its output is zero"),
    (".norm2.", "the norm before the cross-attention"),
    (".norm_context.", "the norm of the text"),
    ("null_embedding", "the text of no text"),
    (".self_attn.mu_to_", "no mu goes from layer to layer"),
    (".dynamics.mu_proj.", "mu does not depend on the token"),
    (".mlp.router.", "all experts see all tokens there: there is no such MLP here"),
    (".mlp.mu_router.", "all experts see all tokens there: there is no such MLP here"),
    (".mlp.experts_", "all experts see all tokens there: there is no such MLP here"),
    ("rope.inv_freq", "computed, not stored"),
)
_FRESH: tuple[tuple[str, str], ...] = (
    ("time_embed.", "starts anew: theirs has another width"),
    (".mlp.", "starts anew: their experts have no counterpart"),
)


_LARGER, _SMALL = 4, 10_000_000
"""Ours may be so many times larger than their checkpoint, and a small one anyway."""


@dataclass
class Conversion:
    """What became of a checkpoint.

    Attributes:
        network: Ours, with what could be taken over.
        taken: Our parameter -> the tensors it was made of.
        left_out: Their tensor -> why it has no counterpart.
        fresh: Our parameter -> why it starts anew.
    """

    network: ComplexityDiTTransformer2DModel
    taken: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for the terminal, and the settings that training on needs."""
        config = self.network.config
        size = {shape: name for name, shape in SIZES.items()}.get(
            (config.hidden_size, config.num_layers, config.num_attention_heads)
        )
        lines = [f"taken over: {len(self.taken)} parameters"]
        for title, parts in (("left out", self.left_out), ("new", self.fresh)):
            for why in dict.fromkeys(parts.values()):
                names = [name for name, reason in parts.items() if reason == why]
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                lines.append(f"{title}: {names[0]}{more}: {why}")
        lines += [
            "different by design: the dynamics act after the MLP (theirs: before it), and tokens",
            "know where on the canvas they are. Train on with",
            f"  --model.size {size or 'S'} --model.patch_size {config.patch_size} "
            "--model.dynamics_placement stream --model.dynamics_adaptive token",
            f"  --model.overrides '{_overrides(config, size)}' --objective.prediction_type epsilon",
        ]
        return "\n".join(lines)


def convert(
    checkpoint: str | Path, out: str | Path, num_attention_heads: int | None = None
) -> Conversion:
    """Read a checkpoint, write a pipeline folder for `train --init_from`.

    Args:
        checkpoint: Their state dict as one safetensors file (their `convert_to_safetensors.py`
            makes it). Pickles are refused.
        out: The folder to write; must not be there.
        num_attention_heads: Theirs; not needed for their sizes, nor where heads are normalised.

    Raises:
        UserError: For a pickle, a file that cannot be read, tensors of another layout, sizes that
            do not fit each other, or a folder that is there.
    """
    tensors, out = _read(Path(checkpoint)), Path(out)
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    conversion = from_state_dict(tensors, num_attention_heads)
    scheduler = build_scheduler(ObjectiveConfig(prediction_type="epsilon"))
    with atomic_folder(out) as folder:
        ComplexityDiTPipeline(conversion.network, scheduler).save_pretrained(folder)
    return conversion


@torch.no_grad()
def from_state_dict(
    tensors: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> Conversion:
    """Convert tensors by their names; see `convert`."""
    try:
        return _converted(tensors, num_attention_heads)
    except UserError:
        raise
    # A tensor of another rank or size than its fellows, wherever it is first noticed.
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the checkpoint's tensors do not fit each other: {error}") from error


def _converted(tensors: Mapping[str, Tensor], num_attention_heads: int | None) -> Conversion:
    config = _config_of(tensors, num_attention_heads)
    _check_size(config, tensors)
    conversion = Conversion(ComplexityDiTTransformer2DModel(**config))
    left = dict(tensors)

    def take(name: str, make: Callable[..., Tensor], *sources: str) -> None:
        missing = [source for source in sources if source not in tensors]
        if missing:
            raise UserError(f"the checkpoint has no {missing[0]}: it is of another layout")
        try:
            value = make(*(tensors[source].float() for source in sources))
            parameter = conversion.network.get_parameter(name)
            if value.shape != parameter.shape:  # copy_ would repeat a smaller one
                raise RuntimeError(f"{tuple(value.shape)} in place of {tuple(parameter.shape)}")
            parameter.copy_(value)
        except RuntimeError as error:
            shapes = ", ".join(f"{s} {tuple(tensors[s].shape)}" for s in sources)
            raise UserError(f"{shapes} cannot become {name}: {error}") from error
        conversion.taken[name] = list(sources)
        for source in sources:
            left.pop(source, None)

    patch, channels = config["patch_size"], config["in_channels"]
    take("patch_embed.weight", lambda w: w.flatten(1), "patch_embed.proj.weight")
    take("patch_embed.bias", _same, "patch_embed.proj.bias")
    for i in range(config["num_layers"]):
        _take_block(take, f"blocks.{i}", config, tensors)
    _take_modulation(take, "adaln_out", "final_layer.adaLN_modulation.1", ["final_layer.norm"], 2)

    # Rows are (row, column, channel) there and (channel, row, column) here.
    def rows(x: Tensor) -> Tensor:
        return x.unflatten(0, (patch, patch, channels)).movedim(2, 0).flatten(0, 2)

    take("proj_out.weight", rows, "final_layer.linear.weight")
    take("proj_out.bias", rows, "final_layer.linear.bias")

    for name in left:
        conversion.left_out[name] = _why(name, _LEFT_OUT, "the checkpoint is of another layout")
    for name, _ in conversion.network.named_parameters():
        if name not in conversion.taken:
            conversion.fresh[name] = _why(name, _FRESH, "no counterpart was found")
    return conversion


def _take_block(
    take: Callable[..., None], block: str, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = hidden // heads
    # Pairs that rotate together are neighbours there and half a head apart here.
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])

    def turned(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, width))[:, order].flatten(0, 1)

    for letter, change in (("q", turned), ("k", turned), ("v", _same)):
        source = f"{block}.self_attn.{letter}_proj.weight"
        take(f"{block}.attn.to_{letter}.weight", change, source)
    take(f"{block}.attn.to_out.0.weight", _same, f"{block}.self_attn.out_proj.weight")
    for letter in "qk":
        source = f"{block}.self_attn.{letter}_norm.weight"
        take(f"{block}.attn.norm_{letter}.weight", turned, source)
    _take_modulation(
        take, f"{block}.adaln", f"{block}.adaLN_modulation.1", [f"{block}.norm1", f"{block}.norm3"],
        3,
    )  # fmt: skip
    dynamics = f"{block}.dynamics"
    take(f"{dynamics}.mu", _same, f"{dynamics}.mu")
    first, second = f"{dynamics}.controller.0", f"{dynamics}.controller.2"
    take(f"{dynamics}.weight_in_h", lambda w: w[:, :hidden], f"{first}.weight")
    take(f"{dynamics}.weight_in_v", lambda w: w[:, hidden:], f"{first}.weight")
    take(f"{dynamics}.bias_in", _same, f"{first}.bias")
    take(f"{dynamics}.weight_out", _same, f"{second}.weight")
    take(f"{dynamics}.bias_out", _same, f"{second}.bias")
    if f"{block}.mlp.gate_proj.weight" in tensors:
        for name in ("gate", "up", "down"):
            take(f"{block}.mlp.{name}.weight", _same, f"{block}.mlp.{name}_proj.weight")


def _take_modulation(
    take: Callable[..., None], name: str, source: str, norms: list[str], parts: int
) -> None:
    """AdaLN: the norms' weights, which ours have not, go into the scale.

    w * n * (1 + s) + t = n * (1 + s') + t with s' = w * s + w - 1, linear in the condition as s is.
    A group of `parts` chunks, shift, scale and perhaps a gate, belongs to each norm.
    """

    def folded(x: Tensor, *weights: Tensor) -> Tensor:
        chunks = list(x.chunk(parts * len(weights)))
        for i, weight in enumerate(weights):
            scale = chunks[i * parts + 1]
            if scale.ndim == 2:
                chunks[i * parts + 1] = weight[:, None] * scale
            else:
                chunks[i * parts + 1] = weight * scale + weight - 1
        return torch.cat(chunks)

    for kind in ("weight", "bias"):
        take(f"{name}.{kind}", folded, f"{source}.{kind}", *(f"{norm}.weight" for norm in norms))


def _config_of(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The shape of our network, read off theirs."""
    try:
        hidden, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        keys = tensors["blocks.0.self_attn.k_proj.weight"].shape[0]
        controller = tensors["blocks.0.dynamics.controller.0.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"no checkpoint of their ComplexityDiT ({error}): expected patch_embed.proj.weight, "
            "blocks.0.self_attn.k_proj.weight and blocks.0.dynamics.controller.0.weight"
        ) from error
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    norm = tensors.get("blocks.0.self_attn.q_norm.weight")
    if norm is None:
        raise UserError(
            "the checkpoint was trained without QK-norm, which our attention always has"
        )
    width = norm.shape[0]
    if heads not in (None, hidden // width):
        raise UserError(f"num_attention_heads {heads}: heads of {width} make {hidden // width}")
    ratio = 8 / 3
    if (gate := tensors.get("blocks.0.mlp.gate_proj.weight")) is not None:
        ratio = gate.shape[0] / hidden
        if swiglu_width(hidden, ratio) != gate.shape[0]:
            raise UserError(
                f"their MLP is {gate.shape[0]} wide; ours have multiples of 64: it cannot be taken"
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
        "dynamics_mu_min": None,  # theirs has no bounds
        "dynamics_mu_max": None,
    }


def _check_size(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a few tensors that describe a network far larger than they are."""
    if config["num_layers"] > len(tensors):
        raise UserError(f"blocks of {len(tensors)} tensors cannot be {config['num_layers']}")
    try:
        with torch.device("meta"):
            network = ComplexityDiTTransformer2DModel(**config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"their sizes make no network of ours: {error}") from error
    ours = sum(p.numel() for p in network.parameters())
    theirs = sum(t.numel() for t in tensors.values())
    if ours > _LARGER * theirs + _SMALL:
        raise UserError(
            f"the checkpoint has {theirs} numbers, and its shapes describe a network of {ours}: "
            "tensors are missing"
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
            f"{path} is no safetensors file, and pickles are not loaded: convert it where you "
            "trust it, e.g. with the authors' convert_to_safetensors.py"
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own type, OSError, ValueError, MemoryError, …
        raise UserError(f"cannot read {path}: {error}") from error


def _same(x: Tensor) -> Tensor:
    return x


def _why(name: str, reasons: tuple[tuple[str, str], ...], otherwise: str) -> str:
    return next((why for part, why in reasons if part in name), otherwise)
