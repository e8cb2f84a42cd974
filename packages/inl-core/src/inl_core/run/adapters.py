"""Settings of PEFT in an adapter that anyone may have written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from inl_core.run.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

_SETTINGS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "lora_dropout",
)  # fmt: skip
"""The settings of an adapter that its effect depends on, besides its tensors."""

_LITERAL, _PART = re.compile(r"\^?[\w.%]+"), re.compile(r"\.lo(?:ra|kr)[._]")


def checked_settings(
    settings: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], network: nn.Module
) -> dict[str, Any] | None:
    """PEFT's settings of an adapter that anyone may have written, for its tensors.

    PEFT reads `target_modules` and the keys of its patterns as regular expressions, which may never
    end, imports the module that `megatron_core` names, and allocates the rank that is claimed. So
    the layers are those of the tensors, by their full names, and all but `_SETTINGS` is dropped.

    Raises:
        UserError: A tensor belongs to no layer of the network or has another rank than the settings
            say, or a setting is of another type.
    """
    layers = {_PART.split(key)[0] for key in tensors}
    if unknown := sorted(layers - {name for name, _ in network.named_modules()}):
        raise UserError(
            f"the adapter has a tensor for {unknown[0]!r}, which the network has not: it was "
            "trained on another network"
        )
    if not settings or any(".lokr_" in key for key in tensors):
        return None  # diffusers derives them from the tensors
    kept = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    for key, value in kept.items():
        is_pattern = key.endswith("_pattern")
        numbers = value.values() if is_pattern and isinstance(value, dict) else [value]
        if is_pattern != isinstance(value, dict) or not all(
            isinstance(n, int | float) and math.isfinite(n) for n in numbers
        ):
            raise UserError(f"the adapter's settings have {key} {value!r}: not what PEFT writes")
        if is_pattern and (wrong := [name for name in value if not _LITERAL.fullmatch(name)]):
            raise UserError(
                f"the adapter's settings have {key} for {wrong[0]!r}: expected names of layers, "
                "not regular expressions"
            )
    from peft.utils.other import get_pattern_key

    patterns = kept.get("rank_pattern", {})
    for key, tensor in tensors.items():
        if ".lora_A." in key and tensor.ndim > 1:
            layer = _PART.split(key)[0]
            claimed = patterns.get(get_pattern_key(patterns, layer), kept.get("r", 8))
            if claimed != len(tensor):
                raise UserError(
                    f"the adapter's settings have rank {claimed} for {layer}, and its tensors "
                    f"have {len(tensor)}"
                )
    return kept | {"target_modules": sorted(layers)}
