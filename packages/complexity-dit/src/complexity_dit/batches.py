"""The whole input of a training step, as a pure function of (seed, step)."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from complexity_dit.config import TrainConfig
from complexity_dit.data import random_batch_indices
from complexity_dit.latents import TrainingData
from complexity_dit.objective import drop_labels, noisy_input_and_target, sample_times
from complexity_dit.seeding import generator_for


class StepBatches(Dataset):
    """Item s is this process's share of the whole input of step s: a pure function of (seed, s).

    Numbers are drawn for the global batch and then sliced, so any number of processes sees the same
    data, noise, times and dropped labels, and a resumed run reads on as if it had never stopped.
    """

    def __init__(self, data: TrainingData, config: TrainConfig, rank: int, world: int) -> None:
        self.data, self.config, self.mine = data, config, slice(rank, None, world)

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        config, count, mine = self.config, self.config.batch_size, self.mine
        indices = random_batch_indices(len(self.data), config.seed, step * count, count)
        draw = generator_for(config.seed, "train", step)
        flips = torch.rand(count, generator=draw) < (0.5 if config.data.flip else 0.0)
        times = sample_times(count, config.objective, draw)
        labels = drop_labels(self.data.labels[indices], config.objective.label_dropout, draw)
        size = self.data.sample_size
        shape = (count, self.data.channels, size, size)
        noise = torch.randn(shape, generator=draw)
        posterior = None
        if self.data.samples_posterior:
            draw = generator_for(config.seed, "posterior", step)
            posterior = torch.randn(shape, generator=draw)[mine]
        clean = self.data.clean(indices[mine], flips[mine], posterior)
        noisy, timestep, target = noisy_input_and_target(
            clean, noise[mine], times[mine], config.objective
        )
        return {"x": noisy, "timestep": timestep, "labels": labels[mine], "target": target}
