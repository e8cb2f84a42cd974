"""Properties of configs, shapes, labels, splits, routing tables, batches and shards."""

import contextlib
import hashlib
import json
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from complexity_dit import __main__ as dit
from complexity_dit import distributed
from complexity_dit.config import TrainConfig
from complexity_dit.data.dataset import in_split, read_labels
from complexity_dit.labels import resolve_label
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import NetworkBatches
from complexity_dit.training.batches import random_batch_indices
from inl_core import build_routing_table, make_routing_plan
from inl_core.run.errors import UserError
from inl_core.run.json_files import parse_json
from inl_core.run.settings import dump_settings

NAMES = st.text(min_size=1, max_size=8)


@given(
    steps=st.integers(1, 10**9), lr=st.floats(1e-8, 1e3), flip=st.booleans(),
    source=st.text(min_size=1, max_size=20), fields=st.none() | st.lists(NAMES, max_size=3),
    labels=st.dictionaries(NAMES, NAMES, max_size=2), decay=st.floats(0, 1),
)  # fmt: skip
def test_a_config_survives_a_round_trip_through_yaml(
    tmp_path, steps, lr, flip, source, fields, labels, decay
):
    config = TrainConfig(steps=steps)
    config.optim.lr, config.ema.decay, config.data.flip = lr, decay, flip
    config.data.source, config.data.label_fields, config.lora.labels = source, fields, labels
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(asdict(config)), encoding="utf-8")
    _, (read,), _ = dit.PROGRAM.parse(["train", "--config", str(path)])
    assert asdict(read) == asdict(config)


@given(st.recursive(st.none() | st.booleans() | st.integers() | NAMES,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner),
                    max_leaves=10))  # fmt: skip
def test_parse_json_inverts_json_dumps(value):
    assert parse_json(json.dumps(value)) == value


@given(
    height=st.integers(1, 5), width=st.integers(1, 5), patch=st.sampled_from([1, 2, 3]),
    batch=st.integers(1, 3), channels=st.integers(1, 4),
    placement=st.sampled_from(["stream", "branch", "force", "force_mlp", "none"]),
)  # fmt: skip
def test_the_output_has_the_shape_of_the_input(height, width, patch, batch, channels, placement):
    network = ComplexityDiTTransformer2DModel(
        sample_size=6, patch_size=patch, in_channels=channels, hidden_size=16, num_layers=1,
        num_attention_heads=2, label_fields=["style"], num_classes=[2],
        dynamics_placement=placement,
    ).eval()  # fmt: skip
    x = torch.randn(batch, channels, height * patch, width * patch)
    with torch.no_grad():
        out = network(x, torch.full((batch,), 500.0), torch.zeros(batch, 1, dtype=torch.long))
    assert out.sample.shape == x.shape
    assert out.sample.isfinite().all()


@given(st.lists(NAMES, min_size=1, max_size=12, unique=True))
def test_every_name_and_id_of_a_table_resolves(names):
    for i, name in enumerate(names):
        assert resolve_label(names, name, "style") == i
        assert resolve_label(names, i, "style") == i
    for outside in (-1, len(names)):
        with pytest.raises(UserError):
            resolve_label(names, outside, "style")


@given(st.lists(NAMES, max_size=8, unique=True), st.text(max_size=8) | st.integers() | st.none())
def test_any_value_resolves_to_an_id_or_raises(names, value):
    with contextlib.suppress(UserError):
        assert -1 <= resolve_label(names, value, "style") < max(len(names), 1)


@given(st.lists(st.none() | st.sampled_from(["", " a", "a", "b ", "é", "-1"]), min_size=1))
def test_read_labels_numbers_the_names_of_a_column(column):
    present = sorted({text.strip() for text in column if text and text.strip()})
    assume(present)
    rows = datasets.Dataset.from_dict({"style": column})
    names, ids = read_labels(rows, ["style"])
    assert names == {"style": present}
    for text, number in zip(column, ids[:, 0].tolist(), strict=True):
        stripped = (text or "").strip()
        assert (present[number] == stripped) if stripped else number == -1


@given(st.lists(st.binary(max_size=4)), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_splits_are_disjoint_covering_and_stable(files, holdout, more):
    hashes = [hashlib.sha256(data).hexdigest() for data in files]
    held = {sha for sha in hashes if in_split(sha, holdout, "heldout")}
    train = {sha for sha in hashes if in_split(sha, holdout, "train")}
    assert not held & train
    assert held | train == set(hashes)
    assert all(in_split(sha, holdout, "all") for sha in hashes)
    # A larger hold-out only adds images to it.
    larger = max(holdout, more)
    assert held <= {sha for sha in hashes if in_split(sha, larger, "heldout")}


@given(
    count=st.integers(1, 40), seed=st.integers(0, 2**31), start=st.integers(0, 100),
    parts=st.lists(st.integers(0, 30), max_size=4),
)  # fmt: skip
def test_the_data_order_does_not_depend_on_interruptions(count, seed, start, parts):
    expected = random_batch_indices(count, seed, start, sum(parts))
    pieces, at = [], start
    for part in parts:
        pieces.append(random_batch_indices(count, seed, at, part))
        at += part
    assert torch.equal(expected, torch.cat([expected[:0], *pieces]))
    epoch = random_batch_indices(count, seed, count * (start // count), count)
    assert sorted(epoch.tolist()) == list(range(count))


@given(
    experts=st.integers(1, 6), weights=st.lists(st.integers(0, 50), min_size=1, max_size=30),
    tokens=st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
    scheme=st.sampled_from(["modulo", "balanced"]),
)  # fmt: skip
def test_each_token_has_one_expert_and_the_order_inverts(experts, weights, tokens, scheme):
    assume(scheme == "modulo" or sum(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about one token that outweighs all others
        counts = weights if scheme == "balanced" else None
        table = build_routing_table(len(weights), experts, scheme, counts)
    assert table.shape == (len(weights),)
    assert table.min() >= 0
    assert table.max() < experts
    ids = table[torch.tensor(tokens) % len(weights)]
    plan = make_routing_plan(ids, experts)
    order, inverse = plan.order.long(), plan.inverse.long()
    n = len(tokens)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order[inverse], torch.arange(n))
    assert torch.equal(ids[order], ids.sort(stable=True).values)
    ends = plan.offsets[-experts:].tolist()
    assert ends == [int((ids <= expert).sum()) for expert in range(experts)]


@given(
    count=st.integers(1, 20), chunk=st.integers(1, 8), offset=st.integers(0, 20),
    cut=st.integers(0, 20),
)  # fmt: skip
def test_fixed_batches_give_every_row_once_however_they_are_split(count, chunk, offset, cut):
    rows, sizes = torch.arange(count, dtype=torch.float64)[:, None], []

    def network(x):
        sizes.append(len(x))
        return 2 * x

    assert torch.equal(NetworkBatches(chunk, offset).run(network, rows), 2 * rows)
    assert set(sizes) == {chunk}
    cut = min(cut, count)
    parts = [(rows[:cut], offset), (rows[cut:], offset + cut)]
    outputs = [NetworkBatches(chunk, at).run(network, part) for part, at in parts if len(part)]
    assert torch.equal(torch.cat(outputs), 2 * rows)


@given(count=st.integers(0, 60), block=st.integers(1, 9), world=st.integers(1, 5))
def test_own_blocks_partition_the_images(monkeypatch, count, block, world):
    numbers = []
    for rank in range(world):
        state = SimpleNamespace(process_index=rank, num_processes=world)
        monkeypatch.setattr(distributed, "process_state", lambda state=state: state)
        runs = distributed.own_blocks(count, block)
        assert all(run[0] % block == 0 and len(run) <= block for run in runs)
        numbers += [number for run in runs for number in run]
    assert sorted(numbers) == list(range(count))
