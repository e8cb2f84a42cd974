"""The loss curve: one row a step, written in batches, exact across resumes."""

import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from complexity_dit.config import TrainConfig
from complexity_dit.sharding import whole
from inl_core.run.checkpoints import latest_checkpoint
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError

LOG_FIELDS = ("step", "loss", "grad_norm", "lr", "skipped")


class TrainLog:
    """Losses of every step, kept on the device until a flush writes them out.

    Asking for each loss at once would make the device wait for the host at every step.
    """

    def __init__(
        self, out: Path, start_step: int, accelerator: Accelerator, skipped: int = 0
    ) -> None:
        self.out, self.accelerator, self.skipped = out, accelerator, skipped
        self.pending: list[tuple[int, Tensor, Tensor, float, bool]] = []
        self.start_step, self.start_time = start_step, time.perf_counter()
        self.file = None
        if accelerator.is_main_process:
            self.file = CsvLog(out / "train_log.csv", LOG_FIELDS, start_step)

    def add(
        self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, *, skipped: bool = False
    ) -> None:
        """Keep one step; `skipped` says that the spike guard did not take it."""
        self.pending.append((step, loss, whole(grad_norm), lr, skipped))

    def flush(self, config: TrainConfig) -> dict[str, str]:
        """Write pending rows; stop the run if one of them is not finite.

        Returns:
            Text for the progress bar.

        Raises:
            UserError: Naming the first step whose loss or gradient norm is not finite.
        """
        mean = self.accelerator.reduce(torch.stack([loss for _, loss, *_ in self.pending]), "mean")
        rows = [
            (step, loss, float(norm), lr, int(skipped))
            for (step, _, norm, lr, skipped), loss in zip(self.pending, mean.tolist(), strict=True)
        ]
        self.pending.clear()
        self._stop_if_not_finite(rows, config)
        step, _, grad_norm, lr, _ = rows[-1]
        self.skipped += sum(row[-1] for row in rows)
        seconds = time.perf_counter() - self.start_time
        speed = (step - self.start_step) * config.batch_size / seconds
        if self.file is not None:
            self.file.write(rows)
        finite = [row[1] for row in rows if math.isfinite(row[1])]  # all but skipped steps'
        average = sum(finite) / len(finite) if finite else math.nan
        self.accelerator.log(
            {
                "loss": average,
                "grad_norm": grad_norm,
                "lr": lr,
                "images_per_second": speed,
                "skipped_steps": self.skipped,
            },
            step,
        )
        return {"loss": f"{average:.4f}", "images/s": f"{speed:.0f}"}

    def _stop_if_not_finite(self, rows: list[tuple], config: TrainConfig) -> None:
        for step, loss, grad_norm, _, skipped in rows:
            if skipped:
                continue
            # fp16's gradient scaler meets infinite norms by design and skips those steps.
            bad_norm = config.mixed_precision != "fp16" and not math.isfinite(grad_norm)
            if bad_norm or not math.isfinite(loss):
                kept = latest_checkpoint(self.out / "checkpoints")
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}; training stopped. The "
                    f"last good checkpoint is {kept or 'none'}: lower --optim.lr (now "
                    f"{config.optim.lr:g}) or raise --optim.warmup_steps, then --resume auto"
                )
