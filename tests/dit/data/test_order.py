"""The order in which training reads its pictures."""

import pytest
import torch

from complexity_dit.training.batches import random_batch_indices


def test_the_order_is_a_function_of_the_position() -> None:
    order = random_batch_indices(10, seed=3, start=0, count=35)
    pieces = [random_batch_indices(10, 3, start, 5) for start in range(0, 35, 5)]
    assert torch.equal(order, torch.cat(pieces))
    assert order.dtype == torch.int64
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    assert not torch.equal(order, random_batch_indices(10, 4, 0, 35))
    assert random_batch_indices(10, 3, 7, 0).shape == (0,)
    assert random_batch_indices(1, 0, 5, 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="num_items 0"):
        random_batch_indices(0, 0, 0, 1)


def test_the_order_never_changes() -> None:
    # A resumed run must continue where an older version stopped.
    assert random_batch_indices(8, 0, 0, 16, seeding=1).tolist() == [
        0, 3, 5, 1, 7, 6, 2, 4, 0, 6, 5, 1, 3, 7, 2, 4,
    ]  # fmt: skip
