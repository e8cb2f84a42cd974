"""What `auto` stands for in a run: chosen at its first start, recorded, and kept by a resumed run.

Both settings change the bits of a step, so a choice is a function of the machine and the settings,
never of a measured time, and a resumed run does not choose again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from inl_core.run.errors import UserError
from inl_core.run.launcher import check_compiler

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

AUTO = "auto"
COMPILE_SECONDS = 60
"""What compiling costs at the start of a run, about, on a CPU and on a GPU."""

CPU_RATE, CPU_SAVED = 55e9, 0.15
"""FLOP/s of a thread of eager training, and the share of a step that compiling saves.

`bench_dit`, tiny/2 with dynamics in fp32 on one thread: 54 images/s of 1.04 GFLOP eager, 63
compiled. With bf16 units a step is shorter and the share larger; the product changes little.
"""

GPU_RATE, GPU_SAVED = 20e12, 0.3
"""The same of a GPU, on the low side; there are committed rows of compiled steps only."""


class Choice(NamedTuple):
    """What `auto` stands for, and why."""

    value: Any
    reason: str


def bf16_units(device: torch.device) -> str | None:
    """What of this device computes bf16 products, in words; None if it would emulate them.

    A CPU has them with `amx_bf16` or `avx512_bf16`. Both pay: with the latter alone a compiled step
    of tiny/2 is 1.6 times as fast as in fp32 (rows of `benchmarks.speed.bench_dit`).
    """
    import torch

    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        names = [name for name in ("amx_bf16", "avx512_bf16") if found.get(name)]
        return f"the CPU has {names[0]}" if names and torch.backends.mkldnn.is_available() else None
    query = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    return f"{device.type} computes in it" if query and query(including_emulation=False) else None


def choose_precision(device: torch.device) -> Choice:
    """bf16 where the device has units for it, or what accelerate's launcher asks for; else fp32."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked != "no":  # also what the launcher says if nobody asked
        return Choice(asked, "accelerate's launcher asks for it")
    return choose_by_units(device)


def choose_by_units(device: torch.device) -> Choice:
    """bf16 where the device has units for it, else fp32."""
    units = bf16_units(device)
    return Choice("bf16", units) if units else Choice("no", f"this {device.type} has no bf16 units")


def choose_compile(flops: float, device: torch.device) -> Choice:
    """Whether a run is long enough to pay back the time of compiling, and can be compiled.

    Args:
        flops: Of the whole run on this device; 6 per weight and token is near enough.
        device: Of the run.
    """
    import torch

    on_cpu = device.type == "cpu"
    rate = CPU_RATE * torch.get_num_threads() if on_cpu else GPU_RATE
    saved = (CPU_SAVED if on_cpu else GPU_SAVED) * flops / rate
    times = f"saves about {_minutes(saved)} of the run and costs about {_minutes(COMPILE_SECONDS)}"
    if saved < COMPILE_SECONDS:
        return Choice(False, f"it {times}")
    try:
        check_compiler()
    except UserError:
        return Choice(False, f"it {times}, but there is no compiler: apt install g++")
    return Choice(True, f"it {times}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.2g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def settled(name: str, choice: Choice) -> Any:
    """Log what `auto` stands for; returns the value."""
    value = choice.value if isinstance(choice.value, str) else str(choice.value).lower()
    logger.info("%s auto: %s (%s)", name, value, choice.reason)
    return choice.value


def warn_without_units(precision: str, device: torch.device) -> None:
    """Say that a run in bf16 is slow here, if it is: the numbers are those of bf16 all the same."""
    if precision == "bf16" and bf16_units(device) is None:
        logger.warning(
            "this run is in bf16, and this %s has no units for it: it works, but slower than fp32",
            device.type,
        )


def kept(
    saved: Mapping[str, Any], resolved: Mapping[str, Any], former: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a checkpoint, with what `auto` stood for.

    Args:
        saved: Its settings as the user wrote them.
        resolved: What it recorded of `auto`; empty for versions that had no `auto`.
        former: The defaults of those versions, by name.
    """
    settings = {**saved, **{name: resolved[name] for name in former if name in resolved}}
    missing = {name: v for name, v in former.items() if settings.get(name, AUTO) == AUTO}
    return settings | missing


def kept_settings(current: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resumed run, with the checkpoint's values in place of `auto`.

    Args:
        current: As the user wrote them now.
        saved: Those of the checkpoint, see `kept`.
    """
    return {
        name: saved[name] if value == AUTO and name in saved else value
        for name, value in current.items()
    }
