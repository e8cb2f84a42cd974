"""The curve of a run's steps: gathered on the device, written in batches."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from inl_core.run.csv_log import CsvLog


class StepLog:
    """Loss and gradient norm of every step, kept on the device until a flush writes them out.

    Asking for each loss at once would make the device wait for the host at every step.

    Args:
        path: The CSV, a row a step.
        accelerator: Averages the losses of the processes.
        start_step: The step that the run starts behind.
    """

    fields = ("step", "loss", "grad_norm", "lr")

    def __init__(self, path: Path, accelerator: Accelerator, start_step: int) -> None:
        self.accelerator = accelerator
        self.file = CsvLog(path, self.fields, start_step) if accelerator.is_main_process else None
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        self.pending.append((step, loss, grad_norm, lr))

    def flush(self) -> list[tuple[int, float, float, float]]:
        """Write what was added and return it, losses averaged over the processes.

        Rows from the first that is not finite on are returned but not written.
        """
        if not self.pending:
            return []
        numbers = torch.stack(
            [torch.stack([loss, norm.to(loss)]) for _, loss, norm, _ in self.pending]
        ).double()
        means: Any = self.accelerator.reduce(numbers, "mean")
        rows = [
            (step, loss, norm, lr)
            for (step, _, _, lr), (loss, norm) in zip(self.pending, means.tolist(), strict=True)
        ]
        self.pending.clear()
        finite = means.isfinite().all(dim=1).tolist()
        if self.file:
            self.file.write(rows[: finite.index(False)] if False in finite else rows)
        return rows
