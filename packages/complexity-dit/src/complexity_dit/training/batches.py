"""The input of a training step, as a pure function of (seed, step)."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from complexity_dit.config import TrainConfig
from complexity_dit.data.latents import TrainingData
from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.seeding import SEEDING, generator_for
from complexity_dit.training.objective import drop_labels, noisy_input_and_target, sample_times
from inl_core.run.errors import UserError
from inl_core.run.workers import allow_open_files


def random_batch_indices(
    num_items: int, seed: int, start: int, count: int, seeding: int = SEEDING
) -> torch.Tensor:
    """The items that samples `start` to `start + count - 1` of a run read: int64 (count,).

    Sample k is item `permutation(seed, k // num_items)[k % num_items]`: every epoch reads each
    item once, in its own order. The order depends on the arguments alone, so a run that resumes at
    sample k, or splits a batch over processes, needs no sampler state.
    """
    if num_items < 1 or start < 0 or count < 0:
        raise ValueError(
            f"num_items {num_items} must be at least 1, start {start} and count {count} at least 0"
        )
    parts, position, end = [torch.empty(0, dtype=torch.int64)], start, start + count
    while position < end:
        epoch, offset = divmod(position, num_items)
        take = min(num_items - offset, end - position)
        parts.append(_permutation(num_items, seed, epoch, seeding)[offset : offset + take])
        position += take
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(num_items: int, seed: int, epoch: int, seeding: int) -> torch.Tensor:
    if seeding > 1:
        return torch.randperm(num_items, generator=generator_for(seed, "order", epoch))
    # Hashed, so that (seed, epoch + 1) and (seed + 1, epoch) are unrelated.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_items, generator=generator)


_BLOCK = 2**18
"""Values per block of images: a block and what is computed from it fit in the processor's cache,
and their memory is reused rather than allocated at every step."""


class StepBatches(Dataset):
    """Item s is this process's share of the input of step s: a pure function of (seed, s).

    Random numbers are drawn for the global batch and then sliced, so any number of processes gets
    the same data, noise, times and dropped labels, and so does a resumed run.
    """

    def __init__(
        self,
        data: TrainingData,
        config: TrainConfig,
        rank: int,
        world: int,
        seeding: int = SEEDING,
    ) -> None:
        self.data, self.config, self.mine = data, config, slice(rank, None, world)
        self.seeding = seeding
        self.dropouts = config.objective.label_dropouts(list(data.label_names))

    def __len__(self) -> int:
        return self.config.steps

    def _draw(self, purpose: str, step: int) -> torch.Generator:
        return generator_for(self.config.seed, purpose, step, version=self.seeding)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        config, count, mine = self.config, self.config.batch_size, self.mine
        indices = random_batch_indices(
            len(self.data), config.seed, step * count, count, self.seeding
        )
        draw = self._draw("train", step)
        flips = torch.rand(count, generator=draw) < (0.5 if config.data.flip else 0.0)
        times = sample_times(count, config.objective, draw)
        labels = drop_labels(self.data.labels[indices], self.dropouts, draw)
        size = self.data.sample_size
        shape = (count, self.data.channels, size, size)
        noise = torch.randn(shape, generator=draw)[mine].contiguous()
        posterior = None
        if self.data.samples_posterior:
            draw = self._draw("posterior", step)
            posterior = torch.randn(shape, generator=draw)[mine]
        shifts = None
        if config.data.crop == "random":  # from a generator of its own, as with dropped tokens
            shifts = torch.rand(count, generator=self._draw("crop", step))[mine]
        batch = {"labels": labels[mine]}
        batch |= self._mixed(indices[mine], flips[mine], times[mine], noise, posterior, shifts)
        rate = config.model.token_drop_rate
        if rate and step < config.model.token_drop_until * config.steps:
            # From a generator of its own: noise and times are the same with and without dropping.
            draw = self._draw("tokens", step)
            tokens = (size // config.model.patch_size) ** 2
            batch["kept_tokens"] = draw_kept_tokens(count, tokens, rate, draw)[mine]
        return batch

    def _mixed(
        self, indices: Tensor, flips: Tensor, times: Tensor, noise: Tensor,
        posterior: Tensor | None, shifts: Tensor | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Input, timestep and target of the images; the target overwrites the noise."""
        noisy, timesteps = torch.empty_like(noise), []
        pictures = max(1, _BLOCK // noise[0].numel())
        for start in range(0, len(noise), pictures):
            block = slice(start, start + pictures)
            clean = self.data.clean(
                indices[block],
                flips[block],
                None if posterior is None else posterior[block],
                None if shifts is None else shifts[block],
            )
            noisy[block], timestep, noise[block] = noisy_input_and_target(
                clean, noise[block], times[block], self.config.objective
            )
            timesteps.append(timestep)
        return {"x": noisy, "timestep": torch.cat(timesteps), "target": noise}


def images_per_pass(config: TrainConfig, processes: int) -> int:
    """Images of one forward pass of one process; a UserError if the batch cannot be split."""
    parts = processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} must be divisible by processes x accumulation steps, "
            f"{processes} x {config.gradient_accumulation_steps}"
        )
    return config.batch_size // parts


def step_loader(batches: StepBatches, steps: Sequence[int], device: torch.device) -> DataLoader:
    """The batches of these steps in order, prepared ahead by `config.loader_workers` processes.

    For a GPU they are in pinned memory, so that copies are asynchronous.
    """
    workers, pinned = batches.config.loader_workers, device.type == "cuda"
    if workers:
        allow_open_files(workers)
    return DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers, pin_memory=pinned
    )
