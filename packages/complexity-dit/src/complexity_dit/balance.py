"""An order of the data in which every label of a field comes equally often."""

from functools import lru_cache

import torch
from torch import Tensor

from complexity_dit.labels import MISSING
from complexity_dit.seeding import generator_for
from inl_core.run.errors import UserError


class BalancedOrder:
    """Which item each sample of a training run reads, as `data.random_batch_indices`, balanced.

    Items without the label keep their natural share: they are spread evenly over the run. All other
    samples come in rounds: a round holds one item of each label, in an order of its own, and
    the items of a label come as epochs of permutations. So the labels' counts never differ by more
    than one, whatever the stretch of rounds, and no item of a label is read twice before all of
    them were read once. Everything is a function of (seed, position): no sampler state.

    Args:
        ids: Label ids of one field, (N,), -1 where missing. Labels without items are left out.
        seed: Seed of the order.

    Raises:
        UserError: If every label is missing.
    """

    def __init__(self, ids: Tensor, seed: int) -> None:
        self.seed, self.size = seed, len(ids)
        self.missing = (ids == MISSING).nonzero().flatten()
        names = ids[ids != MISSING].unique().tolist()
        if not names:
            raise UserError(
                "balanced_labels: every label of that field is missing in the training data"
            )
        self.members = [(ids == name).nonzero().flatten() for name in names]
        # One shuffled epoch of each label at hand; of an order by rounds no more is ever needed.
        self._shuffled = lru_cache(maxsize=2 * len(names) + 2)(self._shuffle)

    def indices(self, start: int, count: int) -> Tensor:
        """The items that samples `start` to `start + count - 1` read: int64 (count,)."""
        return torch.tensor([self._item(k) for k in range(start, start + count)], dtype=torch.int64)

    def _item(self, k: int) -> int:
        # Of the first k samples floor(k * M / N) are unlabelled ones, for M of N items.
        before, after = ((n * len(self.missing)) // self.size for n in (k, k + 1))
        if after > before:
            return self._member(-1, self.missing, before)
        turn, place = divmod(k - before, len(self.members))
        label = int(self._shuffled("labels", len(self.members), turn)[place])
        return self._member(label, self.members[label], turn)

    def _member(self, label: int, items: Tensor, visit: int) -> int:
        epoch, place = divmod(visit, len(items))
        return int(items[self._shuffled(f"items of {label}", len(items), epoch)[place]])

    def _shuffle(self, what: str, count: int, epoch: int) -> Tensor:
        return torch.randperm(count, generator=generator_for(self.seed, f"order {what}", epoch))
