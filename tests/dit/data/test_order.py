"""The order in which training reads its pictures."""

import dataclasses

import pytest
import torch

from complexity_dit.config import ObjectiveConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.training.batches import BalancedOrder, StepBatches, random_batch_indices
from inl_core.run.errors import UserError


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


def test_balanced_labels_are_read_equally_often_and_missing_ones_at_their_own_rate() -> None:
    ids = torch.tensor([0] * 20 + [2] * 3 + [3] * 7 + [-1] * 10)  # no item has label 1
    order = BalancedOrder(ids, seed=3)
    indices = order.indices(0, 400)
    counts = torch.bincount(ids[indices] + 1, minlength=5).tolist()
    assert counts == [100, 100, 0, 100, 100]  # a quarter missing, as in the data
    assert torch.bincount(ids[indices[:40]] + 1, minlength=5).tolist() == [10, 10, 0, 10, 10]
    for label in (0, 2, 3, -1):
        members = (ids == label).nonzero().flatten().tolist()
        read = [i for i in indices.tolist() if ids[i] == label]
        for epoch in range(len(read) // len(members)):
            part = read[epoch * len(members) : (epoch + 1) * len(members)]
            assert sorted(part) == members
    pieces = [BalancedOrder(ids, 3).indices(start, 80) for start in range(0, 400, 80)]
    assert torch.equal(indices, torch.cat(pieces))
    assert torch.equal(order.indices(7, 5), indices[7:12])  # backwards too
    assert not torch.equal(indices, BalancedOrder(ids, 4).indices(0, 400))


def test_the_balanced_order_never_changes() -> None:
    order = BalancedOrder(torch.tensor([0, 0, 0, 1, -1]), seed=0, seeding=1)
    assert order.indices(0, 15).tolist() == [1, 3, 3, 2, 4, 3, 0, 3, 1, 4, 3, 0, 3, 2, 4]


def test_balanced_training_reads_every_label_equally_often(small_run) -> None:
    data = load_data(small_run.data, "train")
    config = dataclasses.replace(
        small_run,
        batch_size=len(data.label_names["style"]),
        data=dataclasses.replace(small_run.data, balanced_labels="style"),
        objective=ObjectiveConfig(label_dropout=0.0),
    )
    batches = StepBatches(data, config, 0, 1)
    present = sorted(set(data.labels[:, 0].tolist()))
    read = torch.cat([batches[step]["labels"][:, 0] for step in range(len(present))])
    counts = torch.bincount(read)[present]
    assert counts.max() - counts.min() <= 1
    wrong = dataclasses.replace(config.data, balanced_labels="artist")
    with pytest.raises(UserError, match=r"balanced_labels 'artist' is not a label field.*style"):
        StepBatches(data, dataclasses.replace(config, data=wrong), 0, 1)


def test_labels_that_are_all_missing_cannot_be_balanced() -> None:
    with pytest.raises(UserError, match="every label of that field is missing"):
        BalancedOrder(torch.tensor([-1, -1]), 0)
