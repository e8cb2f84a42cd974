"""Muon beside AdamW, and the spike guard: what is moved, what is skipped, and exact resume."""

import csv
import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from complexity_dit.config import OptimConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.network import build_model
from complexity_dit.training.optimizer import SpikeGuard, build_guard, build_optimizer
from complexity_dit.training.state import build_state
from complexity_dit.training.train import train
from inl_core.run.checkpoints import all_checkpoints, latest_checkpoint
from inl_core.run.errors import UserError

MUON = OptimConfig(name="muon", lr=1e-3, muon_lr=2e-2, warmup_steps=2)


def rows_of(run):
    with (Path(run) / "train_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files_of(checkpoint):
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for path in checkpoint.rglob("*.safetensors")
    }


def resumed_equals_straight(config, tmp_path):
    """Run 12 steps at once, and again from the checkpoint of step 6: the same bits."""
    config = dataclasses.replace(config, steps=12, checkpoint_every=6, keep_last=0)
    straight = dataclasses.replace(config, out=str(tmp_path / "straight"))
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    train(straight)
    shutil.copytree(straight.out, stopped.out)
    shutil.rmtree(all_checkpoints(Path(stopped.out) / "checkpoints")[1])
    shutil.rmtree(Path(stopped.out) / "pipeline")
    train(dataclasses.replace(stopped, resume="auto"))
    assert rows_of(straight.out) == rows_of(stopped.out)
    ours, theirs = (
        files_of(latest_checkpoint(Path(run.out) / "checkpoints")) for run in (straight, stopped)
    )
    assert len(ours) == 3
    assert ours == theirs
    return rows_of(straight.out)


def test_muon_takes_the_hidden_matrices_and_nothing_else(small_run):
    experts = dataclasses.replace(small_run.model, routing="position", num_experts=2)
    for settings in (small_run.model, experts):
        config = dataclasses.replace(small_run, model=settings, optim=MUON)
        model = build_model(config, load_data(config.data, "train"))
        optimizer = build_state(model, config).optimizer
        names = {id(p): name for name, p in model.named_parameters()}
        groups = [{names[id(p)] for p in g["params"]} for g in optimizer.param_groups]
        assert sorted(n for g in groups for n in g) == sorted(names.values())  # all, once
        assert all(".attn.to_" in name or ".mlp." in name for name in groups[2])
        assert {"blocks.0.attn.to_q.weight", "blocks.1.attn.to_out.0.weight"} <= groups[2]
        assert not any(word in name for name in groups[2] for word in ("adaln", "dynamics", "norm"))
        expected = 2 * (4 + 3)  # two blocks; with experts, the stacked ones stay with AdamW
        assert len(groups[2]) == expected
        assert optimizer.param_groups[1]["weight_decay"] == 0


def test_one_optimizer_moves_as_the_two_of_torch_would():
    def network():
        torch.manual_seed(0)
        block = nn.Module()
        block.attn, block.adaln = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        model = nn.Module()
        model.blocks = nn.ModuleList([block])
        return model, block

    ours, block = network()
    both = build_optimizer(ours, MUON)
    _, other = network()
    adamw = torch.optim.AdamW(
        [{"params": [other.adaln.weight]}, {"params": [other.adaln.bias], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True,
    )  # fmt: skip
    muon = torch.optim.Muon(
        [other.attn.weight], lr=2e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda step: 1 / (1 + step))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (adamw, muon)
    ]
    for step in range(6):
        if step == 3:  # through a checkpoint and back, in a new optimizer
            both.load_state_dict(both.state_dict())
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        for part in (block, other):
            (part.attn(x).tanh() * part.adaln(x)).square().mean().backward()
        for optimizer in (both, adamw, muon):
            optimizer.step()
            optimizer.zero_grad()
        for each in (schedule, *schedules):
            each.step()
        assert all(
            torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True)
        )
    assert schedule.get_last_lr()[0] == pytest.approx(1e-3 / 7)
    assert schedule.get_last_lr()[2] == pytest.approx(2e-2 / 7)


def test_resume_with_muon_is_bit_identical(small_run, tmp_path):
    rows = resumed_equals_straight(dataclasses.replace(small_run, optim=MUON), tmp_path)
    assert len(rows) == 12


def test_resume_with_another_optimizer_is_refused(small_run):
    train(small_run)
    with pytest.raises(UserError, match=r"written by another optimizer.*--optim\.name"):
        train(dataclasses.replace(small_run, optim=MUON, resume="auto", steps=9))


def test_muon_rates_that_make_no_sense_are_refused():
    model = nn.Linear(2, 2)
    for wrong, words in (({"muon_lr": 0.0}, "muon_lr 0.0"), ({"muon_momentum": 1.0}, "must be in")):
        with pytest.raises(UserError, match=words):
            build_optimizer(model, dataclasses.replace(MUON, **wrong))


# --- the spike guard -----------------------------------------------------------------------------

GUARDED = OptimConfig(spike_factor=3.0, spike_window=10, spike_limit=2)


def test_the_guard_skips_spikes_and_follows_a_lasting_change():
    guard = SpikeGuard(GUARDED)
    assert all(guard.admits(norm) for norm in (50.0, *[1.0 + 0.1 * i for i in range(9)]))
    assert guard.threshold() == pytest.approx(3 * 1.8)  # 50 is the one above the 0.9 quantile
    assert guard.admits(5.3)
    assert not guard.admits(5.5)  # the window has now two above 1.8
    assert guard.admits(15.8)
    assert guard.skipped == 1
    lasting = SpikeGuard(GUARDED)
    assert all(lasting.admits(1.0) for _ in range(10))
    verdicts = [lasting.admits(100.0) for _ in range(5)]
    assert verdicts == [False, False, True, True, True]


def test_the_guard_never_admits_what_is_not_finite_and_gives_up_in_the_end():
    guard = SpikeGuard(GUARDED)  # an empty window: also then
    for bad in (math.nan, math.inf, 1.0, math.nan, -math.inf):
        assert guard.admits(bad) == math.isfinite(bad)
    assert list(guard.norms) == [1.0]
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row \(spike_limit is 2\)"):
        guard.admits(math.nan)


def test_the_guard_goes_on_from_its_state():
    one, other = SpikeGuard(GUARDED), SpikeGuard(GUARDED)
    norms = torch.rand(60, generator=torch.Generator().manual_seed(0)).exp().pow(3).tolist()
    for norm in norms[:30]:
        one.admits(norm)
    other.load_state_dict(one.state_dict())
    assert [one.admits(n) for n in norms[30:]] == [other.admits(n) for n in norms[30:]]
    assert one.skipped == other.skipped > 0


@pytest.fixture
def poisoned(monkeypatch):
    """Make the targets of some steps 1000 times too large, or not finite."""

    def poison(values):
        real = StepBatches.__getitem__

        def item(self, step):
            batch = real(self, step)
            if step in values:
                batch["target"] = batch["target"] * values[step]
            return batch

        monkeypatch.setattr(StepBatches, "__getitem__", item)

    return poison


def test_skipped_steps_change_nothing_and_are_counted(small_run, tmp_path, poisoned):
    """Spikes at step 3 (before the checkpoint of the resume) and 10, a NaN at step 8."""
    poisoned({3: 1000.0, 8: math.nan, 10: 1000.0})
    optim = OptimConfig(warmup_steps=2, spike_factor=5.0, spike_window=2)
    run = dataclasses.replace(small_run, optim=optim)
    rows = resumed_equals_straight(run, tmp_path)
    assert [int(row["step"]) for row in rows if row["skipped"] == "1"] == [4, 9, 11]
    assert len({row["lr"] for row in rows[3:]}) > 5  # the schedule goes on


def test_a_skipped_step_leaves_weights_moments_and_average(small_run, poisoned):
    poisoned({5: math.inf})
    optim = OptimConfig(warmup_steps=2, spike_factor=1e6)
    run = dataclasses.replace(
        small_run, optim=optim, steps=6, checkpoint_every=5, keep_last=0, log_every=1
    )
    train(run)
    before, after = (files_of(c) for c in all_checkpoints(Path(run.out) / "checkpoints"))
    assert before == after


def test_the_guard_stops_a_run_that_is_lost(small_run, poisoned):
    poisoned(dict.fromkeys(range(4, 8), math.nan))
    optim = OptimConfig(warmup_steps=2, spike_factor=5.0, spike_limit=2)
    with pytest.raises(UserError, match="not finite for 3 steps in a row"):
        train(dataclasses.replace(small_run, optim=optim))


@pytest.mark.parametrize(
    ("settings", "precision", "words"),
    [
        ({"spike_factor": 0.5}, "no", "spike_factor 0.5 must be 0"),
        ({"spike_factor": math.nan}, "no", "spike_factor nan"),
        ({"spike_factor": 5.0, "spike_window": 1}, "no", "spike_window 1 must be at least 2"),
        ({"spike_factor": 5.0, "spike_limit": -1}, "no", "spike_limit -1 at least 0"),
        ({"spike_factor": 5.0}, "fp16", "does not go with mixed_precision fp16"),
    ],
)
def test_guards_that_make_no_sense_are_refused(settings, precision, words):
    with pytest.raises(UserError, match=words):
        build_guard(OptimConfig(**settings), precision)


def test_no_guard_by_default():
    assert build_guard(OptimConfig(), "fp16") is None
