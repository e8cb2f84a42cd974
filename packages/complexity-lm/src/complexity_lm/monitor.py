"""Watching the dynamics during training: a fixed text, seen through the model every n steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inl_core import DYNAMICS_COLUMNS, read_dynamics
from inl_core.run.csv_log import CsvLog


class DynamicsMonitor(TrainerCallback):
    """Every `every` steps: a row a layer into a CSV, and the same numbers to the tracker.

    Args:
        path: The CSV; columns are step, layer and inl_core's `DYNAMICS_COLUMNS`.
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
        fields = ("step", "layer", *DYNAMICS_COLUMNS)
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
            probe = {"input_ids": self.probe.to(model.device), "use_cache": False}
            found = read_dynamics(model, probe)
        if self.file and found:
            self.file.write(
                [state.global_step, name, *(stats[key] for key in DYNAMICS_COLUMNS)]
                for name, stats in found.items()
            )
            self.log(
                {
                    f"dynamics/{name}/{key}": value
                    for name, stats in found.items()
                    for key, value in stats.items()
                }
            )
