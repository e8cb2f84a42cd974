"""Looking at the dynamics of a whole model: which modules there are, and what a forward does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from inl_core.dynamics import DYNAMICS_STATS, INLDynamics, INLDynamicsLite, collect_dynamics_stats
from inl_core.stability import spectral_radius

__all__ = ["DYNAMICS_COLUMNS", "dynamics_modules", "read_dynamics", "run_watched"]

DYNAMICS_COLUMNS = (*DYNAMICS_STATS, "spectral_radius")
"""What `read_dynamics` gives for a module, in a fixed order: the columns of a log."""


def dynamics_modules(model: nn.Module) -> dict[str, INLDynamics | INLDynamicsLite]:
    """The dynamics of a model by their names, in the order in which they are registered."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (INLDynamics, INLDynamicsLite))
    }


@torch.no_grad()
def run_watched(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> None:
    """One forward in evaluation mode, without gradients, that collects statistics.

    Collecting also keeps the dynamics out of fused calls, which would pass their hooks by.

    Args:
        model: The bare model: a compiled forward collects nothing.
        inputs: Arguments of the forward: keywords as a mapping, positional ones as a sequence.
    """
    was_training = model.training
    model.eval()
    try:
        with collect_dynamics_stats(model):
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs)
    finally:
        model.train(was_training)


def read_dynamics(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]
) -> dict[str, dict[str, float]]:
    """What every dynamics module of a model does with some inputs.

    A forward of its own: a training step stays untouched, and with the same inputs every time a
    curve of these numbers shows the model and not the data.

    Args:
        model: The bare model, not compiled.
        inputs: Arguments of one forward, as in `certify`.

    Returns:
        For each module `DYNAMICS_COLUMNS`: what `get_dynamics_stats` reports, and
        ``spectral_radius``, that of the transition matrix frozen at the mean coefficients. Below 1
        that update shrinks; it is no certificate for varying ones. Empty without dynamics.
    """
    modules = dynamics_modules(model)
    if not modules:
        return {}
    run_watched(model, inputs)
    found = {}
    for name, module in modules.items():
        stats = module.get_dynamics_stats()
        means = (stats["alpha_mean"], stats["beta_mean"], stats["gate_mean"])
        stats["spectral_radius"] = float(spectral_radius(*means, module.dt))
        found[name] = stats
    return found
