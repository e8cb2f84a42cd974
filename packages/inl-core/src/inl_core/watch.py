"""Statistics of all dynamics modules of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from inl_core.dynamics import DYNAMICS_STATS, Dynamics, collect_dynamics_stats
from inl_core.stability import spectral_radius

__all__ = ["DYNAMICS_COLUMNS", "dynamics_modules", "read_dynamics", "run_watched"]

DYNAMICS_COLUMNS = (*DYNAMICS_STATS, "spectral_radius")
"""Names in the result of `read_dynamics`, in order for the columns of a log."""


def dynamics_modules(model: nn.Module) -> dict[str, Dynamics]:
    """Dynamics modules of a model by name, in order of registration."""
    return {n: module for n, module in model.named_modules() if isinstance(module, Dynamics)}


def run_watched(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], gradients: bool = False
) -> None:
    """Run one forward in evaluation mode that collects statistics.

    Collecting also disables fused calls, which would bypass the hooks of the modules.

    Args:
        model: The bare model. What is compiled in place, such as its layers, runs as it was
            written: compiled code collects nothing.
        inputs: Arguments of the forward: keywords as a mapping, positional ones as a sequence.
        gradients: Whether autograd records the forward.
    """
    was_training = model.training
    model.eval()
    try:
        with (
            torch.set_grad_enabled(gradients),
            torch.compiler.set_stance("force_eager"),
            collect_dynamics_stats(model),
        ):
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs)
    finally:
        model.train(was_training)


def read_dynamics(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Statistics of every dynamics module for some inputs.

    Runs a separate forward: a training step is not affected, and with fixed inputs a curve of these
    numbers shows changes of the model and not of the data.

    Args:
        model: The bare model, as for `run_watched`.
        inputs: Arguments of one forward, as in `certify`.

    Returns:
        `DYNAMICS_COLUMNS` by module name: the values of `get_dynamics_stats`, and
        ``spectral_radius`` of the transition matrix at the mean coefficients. Below 1 that frozen
        update contracts; for varying coefficients it certifies nothing. NaN for what a module does
        not have: the equilibrium of a loop is its input. Empty without dynamics.
    """
    modules = dynamics_modules(model)
    if not modules:
        return {}
    run_watched(model, inputs)
    result = {}
    for name, module in modules.items():
        stats = module.get_dynamics_stats()
        means = (stats["alpha_mean"], stats["beta_mean"], stats["gate_mean"])
        stats["spectral_radius"] = float(spectral_radius(*means, module.dt))
        result[name] = dict.fromkeys(DYNAMICS_COLUMNS, math.nan) | stats
    return result
