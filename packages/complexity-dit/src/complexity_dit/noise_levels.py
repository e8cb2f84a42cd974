"""The loss by noise level: which part of the way from noise to image is learned how well."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS
from inl_core.run.csv_log import CsvLog


class NoiseLevels:
    """Mean squared error in equal bins of the noise level t in [0, 1], between two flushes.

    Sums stay on the device: no step waits for it. Columns of `noise_levels.csv` are the step and,
    for each bin, the mean since the row before; a bin without an image is empty.

    Args:
        bins: How many; 0 switches it off.
        out: Folder of the run.
        start_step: The step that a resumed run starts behind.
        accelerator: Sums over the processes.
    """

    def __init__(self, bins: int, out: Path, start_step: int, accelerator: Accelerator) -> None:
        self.bins, self.accelerator = bins, accelerator
        self.names = [f"t_{i / bins:.2f}_{(i + 1) / bins:.2f}" for i in range(bins)]
        self.sums = torch.zeros(2, bins, device=accelerator.device)
        self.file = None
        if bins and accelerator.is_main_process:
            self.file = CsvLog(out / "noise_levels.csv", ["step", *self.names], start_step)

    @torch.no_grad()
    def add(self, timestep: Tensor, prediction: Tensor, target: Tensor) -> None:
        """Count images: timestep in [0, 1000] (B,), prediction and target (B, C, Y, X)."""
        if not self.bins:
            return
        errors = (prediction.to(self.sums) - target.to(self.sums)).square().flatten(1).mean(1)
        level = timestep.float() / NUM_TRAIN_TIMESTEPS * self.bins
        chosen = level.long().clamp(0, self.bins - 1)
        self.sums.index_add_(1, chosen, torch.stack([errors, torch.ones_like(errors)]))

    def flush(self, step: int) -> None:
        """Write the means since the last flush, and forget them."""
        if not self.bins:
            return
        sums, counts = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        means = [
            total / count if count else None for total, count in zip(sums, counts, strict=True)
        ]
        if self.file is not None:
            self.file.write([(step, *means)])
        seen = zip(self.names, means, strict=True)
        self.accelerator.log({f"loss/{n}": mean for n, mean in seen if mean is not None}, step)
