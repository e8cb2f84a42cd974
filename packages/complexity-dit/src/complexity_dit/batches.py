"""The whole input of a training step, as a pure function of (seed, step)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from complexity_dit.balance import BalancedOrder
from complexity_dit.config import TrainConfig
from complexity_dit.data import random_batch_indices
from complexity_dit.latents import TrainingData
from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.objective import drop_labels, noisy_input_and_target, sample_times
from complexity_dit.seeding import generator_for
from inl_core.run.errors import UserError

_BLOCK = 2**18
"""Numbers that are worked on at a time, as far as they are whole pictures: a block and what is
computed from it stay in the processor's cache, and no step asks the system for their memory."""


class StepBatches(Dataset):
    """Item s is this process's share of the whole input of step s: a pure function of (seed, s).

    Numbers are drawn for the global batch and then sliced, so any number of processes sees the same
    data, noise, times and dropped labels, and a resumed run reads on as if it had never stopped.
    """

    def __init__(self, data: TrainingData, config: TrainConfig, rank: int, world: int) -> None:
        self.data, self.config, self.mine = data, config, slice(rank, None, world)
        self.order = self._balanced_order()
        self.dropouts = config.objective.label_dropouts(list(data.label_names))

    def _balanced_order(self) -> BalancedOrder | None:
        field, fields = self.config.data.balanced_labels, list(self.data.label_names)
        if field is None:
            return None
        if field not in fields:
            raise UserError(
                f"balanced_labels {field!r} is not a label field of the data, which has "
                f"{', '.join(fields) or 'none'}; name one of them, or null"
            )
        return BalancedOrder(self.data.labels[:, fields.index(field)], self.config.seed)

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        config, count, mine = self.config, self.config.batch_size, self.mine
        if self.order is None:
            indices = random_batch_indices(len(self.data), config.seed, step * count, count)
        else:
            indices = self.order.indices(step * count, count)
        draw = generator_for(config.seed, "train", step)
        flips = torch.rand(count, generator=draw) < (0.5 if config.data.flip else 0.0)
        times = sample_times(count, config.objective, draw)
        labels = drop_labels(self.data.labels[indices], self.dropouts, draw)
        size = self.data.sample_size
        shape = (count, self.data.channels, size, size)
        noise = torch.randn(shape, generator=draw)[mine].contiguous()
        posterior = None
        if self.data.samples_posterior:
            draw = generator_for(config.seed, "posterior", step)
            posterior = torch.randn(shape, generator=draw)[mine]
        batch = {"labels": labels[mine]}
        batch |= self._mixed(indices[mine], flips[mine], times[mine], noise, posterior)
        rate = config.model.token_drop_rate
        if rate and step < config.model.token_drop_until * config.steps:
            # A stream of its own: the same noise and times with and without dropping.
            draw = generator_for(config.seed, "tokens", step)
            tokens = (size // config.model.patch_size) ** 2
            batch["kept_tokens"] = draw_kept_tokens(count, tokens, rate, draw)[mine]
        return batch

    def _mixed(
        self, indices: Tensor, flips: Tensor, times: Tensor, noise: Tensor, posterior: Tensor | None
    ) -> dict[str, Tensor]:
        """Input, timestep and target of the pictures; the target takes the place of the noise."""
        noisy, timesteps = torch.empty_like(noise), []
        pictures = max(1, _BLOCK // noise[0].numel())
        for start in range(0, len(noise), pictures):
            block = slice(start, start + pictures)
            clean = self.data.clean(
                indices[block], flips[block], None if posterior is None else posterior[block]
            )
            noisy[block], timestep, noise[block] = noisy_input_and_target(
                clean, noise[block], times[block], self.config.objective
            )
            timesteps.append(timestep)
        return {"x": noisy, "timestep": torch.cat(timesteps), "target": noise}


def step_loader(batches: StepBatches, steps: Sequence[int], device: torch.device) -> DataLoader:
    """The batches of these steps in order, read ahead in `config.loader_workers` processes.

    For a GPU they are pinned, so that their copy need not wait.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=batches.config.loader_workers,
        pin_memory=device.type == "cuda",
    )
