"""Watching the dynamics during training: a fixed text, seen through the model every n steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from complexity_lm.train_log import CsvLog
from inl_core import (
    DYNAMICS_STATS,
    INLDynamics,
    INLDynamicsLite,
    collect_dynamics_stats,
    spectral_radius,
)


def dynamics_modules(model: nn.Module) -> dict[str, INLDynamics | INLDynamicsLite]:
    """The dynamics of a model by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (INLDynamics, INLDynamicsLite))
    }


@torch.no_grad()
def read_dynamics(model: nn.Module, probe: Tensor) -> dict[str, dict[str, float]]:
    """Send a text through the model and read what every dynamics module did with it.

    A forward of its own, in evaluation mode and never compiled: the training step stays untouched,
    and because the text is the same every time, curves show the model and not the data.

    Args:
        model: The bare model.
        probe: Token ids (B, N).

    Returns:
        For each module its `DYNAMICS_STATS` and ``spectral_radius``: of the transition matrix
        frozen at the mean coefficients. Below 1 that update shrinks; it is no certificate for
        varying ones.
    """
    modules = dynamics_modules(model)
    if not modules:
        return {}
    was_training = model.training
    model.eval()
    try:
        with collect_dynamics_stats(model):
            model(input_ids=probe, use_cache=False)
    finally:
        model.train(was_training)
    found = {}
    for name, module in modules.items():
        stats = module.get_dynamics_stats()
        means = (stats["alpha_mean"], stats["beta_mean"], stats["gate_mean"])
        stats["spectral_radius"] = float(spectral_radius(*means, module.dt))
        found[name] = stats
    return found


class DynamicsMonitor(TrainerCallback):
    """Every `every` steps: a row a layer into a CSV, and the same numbers to the tracker.

    Args:
        path: The CSV; columns are step, layer, `DYNAMICS_STATS` and spectral_radius.
        probe: Token ids (B, N), the same at every look.
        every: Steps between looks.
        start_step: The step that a resumed run starts behind.
        log: Sends numbers to the tracker.
        autocast: Makes the context of the training's forward.
        is_main: Whether this process writes; all of them run the forward, which may be sharded.
    """

    def __init__(
        self,
        path: Path,
        probe: Tensor,
        every: int,
        start_step: int,
        log: Callable[[dict[str, float]], None],
        autocast: Callable[[], AbstractContextManager],
        is_main: bool,
    ) -> None:
        self.probe, self.every, self.log, self.autocast = probe, every, log, autocast
        self.columns = (*DYNAMICS_STATS, "spectral_radius")
        fields = ("step", "layer", *self.columns)
        self.file = CsvLog(path, fields, start_step) if is_main else None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look, if it is time."""
        if state.global_step % self.every:
            return
        model = kwargs["model"]
        with self.autocast():
            found = read_dynamics(model, self.probe.to(model.device))
        if self.file and found:
            self.file.write(
                [state.global_step, name, *(stats[key] for key in self.columns)]
                for name, stats in found.items()
            )
            self.log(
                {
                    f"dynamics/{name}/{key}": value
                    for name, stats in found.items()
                    for key, value in stats.items()
                }
            )
