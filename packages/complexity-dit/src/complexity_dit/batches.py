"""The whole input of a training step, as a pure function of (seed, step)."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from complexity_dit.balance import BalancedOrder
from complexity_dit.config import TrainConfig
from complexity_dit.data import random_batch_indices
from complexity_dit.errors import UserError
from complexity_dit.latents import TrainingData
from complexity_dit.objective import drop_labels, noisy_input_and_target, sample_times
from complexity_dit.seeding import generator_for
from complexity_dit.tokens import draw_kept_tokens


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
        noise = torch.randn(shape, generator=draw)
        posterior = None
        if self.data.samples_posterior:
            draw = generator_for(config.seed, "posterior", step)
            posterior = torch.randn(shape, generator=draw)[mine]
        clean = self.data.clean(indices[mine], flips[mine], posterior)
        noisy, timestep, target = noisy_input_and_target(
            clean, noise[mine], times[mine], config.objective
        )
        batch = {"x": noisy, "timestep": timestep, "labels": labels[mine], "target": target}
        rate = config.model.token_drop_rate
        if rate and step < config.model.token_drop_until * config.steps:
            # A stream of its own: the same noise and times with and without dropping.
            draw = generator_for(config.seed, "tokens", step)
            height, width = noisy.shape[-2:]
            tokens = (height // config.model.patch_size) * (width // config.model.patch_size)
            batch["kept_tokens"] = draw_kept_tokens(count, tokens, rate, draw)[mine]
        return batch
