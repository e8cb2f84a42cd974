"""The input of a training step, as a pure function of (seed, step)."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from complexity_dit.config import AutoencoderConfig, TrainConfig
from complexity_dit.data.dataset import PaintingDataset
from complexity_dit.data.latents import TrainingData
from complexity_dit.labels import MISSING
from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.seeding import SEEDING, generator_for
from complexity_dit.training.objective import drop_labels, noisy_input_and_target, sample_times
from complexity_dit.training.text import caption_tokens
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
    the same data, noise, times and dropped labels, and so does a resumed run. With a tokenizer, a
    batch has the tokens of captions too.
    """

    def __init__(
        self,
        data: TrainingData,
        config: TrainConfig,
        rank: int,
        world: int,
        seeding: int = SEEDING,
        tokenizer: Any = None,
    ) -> None:
        self.data, self.config, self.mine = data, config, slice(rank, None, world)
        self.seeding, self.tokenizer = seeding, tokenizer
        self.dropouts = config.objective.label_dropouts(list(data.label_names))

    def __len__(self) -> int:
        return self.config.steps

    def _draw(self, purpose: str, step: int) -> torch.Generator:
        return generator_for(self.config.seed, purpose, step, version=self.seeding)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.mixed(self.drawn(step))

    def drawn(self, step: int) -> dict[str, Tensor]:
        """What is random in a batch, on the CPU: which images, their noise, times and labels.

        `mixed` makes the batch of it, on the device that it is given it on, without a random number
        and by operations that round alike on every device.
        """
        config, count, mine = self.config, self.config.batch_size, self.mine
        indices = random_batch_indices(
            len(self.data), config.seed, step * count, count, self.seeding
        )
        draw = self._draw("train", step)
        flips = torch.rand(count, generator=draw) < (0.5 if config.data.flip else 0.0)
        times = sample_times(count, config.objective, draw)
        labels = drop_labels(self.data.labels[indices], self.dropouts, draw)
        unconditional = torch.zeros(count, dtype=torch.bool)
        if config.objective.label_dropout_all:
            # From a generator of its own, as with dropped tokens.
            together = torch.rand(count, generator=self._draw("labels", step))
            unconditional = together < config.objective.label_dropout_all
            labels[unconditional] = MISSING
        size = self.data.sample_size
        shape = (count, self.data.channels, size, size)
        noise = torch.randn(shape, generator=draw)[mine].contiguous()
        drawn = {
            "indices": indices[mine], "flips": flips[mine], "times": times[mine], "noise": noise,
            "labels": labels[mine],
        }  # fmt: skip
        if self.data.samples_posterior:
            draw = self._draw("posterior", step)
            drawn["posterior"] = torch.randn(shape, generator=draw)[mine]
        if config.data.crop == "random":  # from a generator of its own, as with dropped tokens
            drawn["shifts"] = torch.rand(count, generator=self._draw("crop", step))[mine]
        rate = config.model.token_drop_rate
        if rate and step < config.model.token_drop_until * config.steps:
            # From a generator of its own: noise and times are the same with and without dropping.
            draw = self._draw("tokens", step)
            tokens = (size // config.model.patch_size) ** 2
            drawn["kept_tokens"] = draw_kept_tokens(count, tokens, rate, draw)[mine]
        if self.tokenizer is not None:
            assert self.data.captions is not None  # a run with a tokenizer reads them
            share = torch.rand(count, generator=self._draw("captions", step))
            left_out = unconditional | (share < config.text_encoder.caption_dropout)
            captions = self.data.captions.captions_of(indices.tolist(), config.seed, step)
            captions = ["" if out else text for text, out in zip(captions, left_out, strict=True)]
            # All of them, as they are as long as the longest one; CUDA graphs need one shape.
            cut, most = config.compile != "max", config.text_encoder.max_length
            ids, mask = caption_tokens(self.tokenizer, captions, most, cut)
            drawn |= {"input_ids": ids[mine], "attention_mask": mask[mine]}
        return drawn

    def mixed(self, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """Input, timestep, target, labels, and what else was drawn for the network.

        The target overwrites the noise.
        """
        noise = drawn["noise"]
        noisy, timesteps = torch.empty_like(noise), []
        pictures = len(noise)
        if noise.device.type == "cpu":
            pictures = max(1, _BLOCK // noise[0].numel())
        for start in range(0, len(noise), pictures):
            block = {name: value[start : start + pictures] for name, value in drawn.items()}
            clean = self.data.clean(
                block["indices"], block["flips"], block.get("posterior"), block.get("shifts")
            )
            noisy[start : start + pictures], timestep, block["noise"][:] = noisy_input_and_target(
                clean, block["noise"], block["times"], self.config.objective
            )
            timesteps.append(timestep)
        batch = {"x": noisy, "timestep": torch.cat(timesteps), "target": noise}
        others = ("labels", "kept_tokens", "input_ids", "attention_mask")
        return batch | {name: drawn[name] for name in others if name in drawn}


class PictureBatches(Dataset):
    """Item s is this process's share of the pictures of step s, {"pixels": (B, 3, Y, X)}.

    As `StepBatches`, a pure function of (seed, s). With `crop_size` a square of that many pixels is
    cut out of each, anywhere.
    """

    def __init__(
        self, pictures: PaintingDataset, config: AutoencoderConfig, rank: int, world: int
    ) -> None:
        self.data, self.config, self.mine = pictures, config, slice(rank, None, world)

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.mixed(self.drawn(step))

    def drawn(self, step: int) -> dict[str, Tensor]:
        """What is random in a batch: which pictures, whether mirrored, and where they are cut."""
        config, count, mine = self.config, self.config.batch_size, self.mine
        indices = random_batch_indices(len(self.data), config.seed, step * count, count)
        draw = generator_for(config.seed, "train", step)
        flips = torch.rand(count, generator=draw) < (0.5 if config.data.flip else 0.0)
        places = torch.rand(count, 3, generator=draw)
        return {"indices": indices[mine], "flips": flips[mine], "places": places[mine]}

    def mixed(self, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pictures in [-1, 1], {"pixels": (B, 3, Y, X)}."""
        shift, *place = drawn["places"].unbind(1)
        shifts = shift if self.config.data.crop == "random" else None
        pixels = self.data.clean(drawn["indices"], drawn["flips"], shifts=shifts)
        side = self.config.crop_size or self.data.resolution
        room = self.data.resolution - side + 1
        starts = zip(*((p * room).long().tolist() for p in place), strict=True)
        cut = [
            image[:, top : top + side, left : left + side]
            for image, (top, left) in zip(pixels, starts, strict=True)
        ]
        return {"pixels": torch.stack(cut)}


def images_per_pass(batch_size: int, processes: int, parts: int = 1) -> int:
    """Images of one forward pass of one process; a UserError if the batch cannot be split."""
    if batch_size % (processes * parts):
        raise UserError(
            f"batch_size {batch_size} must be divisible by processes x accumulation steps, "
            f"{processes} x {parts}"
        )
    return batch_size // (processes * parts)


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device; copies of pinned memory do not wait for it."""
    return {name: x.to(device, non_blocking=x.is_pinned()) for name, x in batch.items()}


def step_loader(
    batches: StepBatches | PictureBatches, steps: Sequence[int], device: torch.device
) -> Iterable[dict[str, Tensor]]:
    """The batches of these steps in order.

    For an accelerator they are prepared ahead, in pinned memory, so that copies are asynchronous:
    by `config.loader_workers` processes, or a thread if there are none or if the data are on the
    device, which then mixes what the thread draws.
    """
    workers, on_device = batches.config.loader_workers, batches.data.on_device
    if on_device or (device.type != "cpu" and not workers):
        return _drawn_ahead(batches, steps, device)
    if workers:
        allow_open_files(workers)
    return DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip


_AHEAD = 2
"""Batches that the thread has ready."""


def _drawn_ahead(
    batches: StepBatches | PictureBatches, steps: Sequence[int], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The batches of `step_loader` from a thread. torch draws without holding Python's lock."""
    on_device = batches.data.on_device

    def prepared(step: int) -> dict[str, Tensor]:
        batch = batches.drawn(step) if on_device else batches[step]
        return batch if device.type == "cpu" else {n: x.pin_memory() for n, x in batch.items()}

    start: tuple = ()
    if device.type != "cpu":  # a new thread would take the first one
        start = (torch.accelerator.set_device_index, (torch.accelerator.current_device_index(),))
    ahead, rest = deque[Future[dict[str, Tensor]]](), iter(steps)
    with ThreadPoolExecutor(1, "batches", *start) as thread:
        ahead.extend(thread.submit(prepared, step) for step in islice(rest, _AHEAD))
        while ahead:
            batch = moved(ahead.popleft().result(), device)
            ahead.extend(thread.submit(prepared, step) for step in islice(rest, 1))
            yield batches.mixed(batch) if on_device else batch
