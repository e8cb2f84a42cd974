"""Muon with AdamW, and the spike guard: which weights are updated, and exact resume."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from complexity_dit.config import OptimConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.training.network import build_model
from complexity_dit.training.optimizer import (
    SpikeGuard,
    StackedMuon,
    build_optimizer,
    orthogonalise,
)
from complexity_dit.training.state import build_state
from complexity_dit.training.train import train
from inl_core.run.checkpoints import all_checkpoints
from inl_core.run.errors import UserError
from support.outcomes import tensor_files
from support.processes import torchrun

MUON = OptimConfig(name="muon", lr=1e-3, muon_lr=2e-2, warmup_steps=2)


def test_muon_updates_the_hidden_matrices_only(small_run):
    config = dataclasses.replace(small_run, optim=MUON)
    model = build_model(config, load_data(config.data, "train"))
    optimizer = build_state(model, config).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in g["params"]} for g in optimizer.param_groups]
    assert sorted(n for g in groups for n in g) == sorted(names.values())  # all, once
    assert all(".attn.to_" in name or ".mlp." in name for name in groups[2])
    assert {"blocks.0.attn.to_q.weight", "blocks.1.attn.to_out.0.weight"} <= groups[2]
    assert not any(word in name for name in groups[2] for word in ("adaln", "dynamics", "norm"))
    assert len(groups[2]) == 2 * (4 + 3)  # two blocks
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_the_combined_optimizer_equals_the_two_of_torch():
    def network():
        torch.manual_seed(0)
        block = nn.Module()
        block.attn, block.adaln = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        model = nn.Module()
        model.blocks = nn.ModuleList([block])
        return model, block

    model, block = network()
    both = build_optimizer(model, MUON)
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


SHAPES = [(12, 12), (20, 12), (12, 20), (12, 12), (20, 12), (12, 12), (1, 12)]


def matrices(seed: int, scale: float = 1.0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(scale * torch.randn(shape, generator=draw)) for shape in SHAPES]


def with_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Gradients that depend on the step; the last square matrix has none at every third."""
    for parameter, gradient in zip(parameters, matrices(100 + step, 1e-3), strict=True):
        parameter.grad = gradient.detach()
    if step % 3 == 2:
        parameters[5].grad = None


def test_stacked_matrices_are_updated_as_each_by_torch():
    """Also from a state that torch's own has saved, as runs of earlier versions did."""
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    ours, theirs = matrices(0), matrices(0)
    theirs_muon = torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    muon = StackedMuon(ours, **options)
    for step in range(6):
        if step == 3:
            muon = StackedMuon(ours, **options)
            muon.load_state_dict(copy.deepcopy(theirs_muon.state_dict()))  # not the same buffers
        before = [p.detach().clone() for p in ours]
        for parameters, optimizer in ((ours, muon), (theirs, theirs_muon)):
            with_gradients(parameters, step)
            optimizer.step()
        for one, other, old in zip(ours, theirs, before, strict=True):
            moved = (other - old).norm()
            assert (one - other).norm() <= 2**-7 * (step + 1) * moved  # 8 bits of a bf16 number
            if one.grad is not None:
                assert torch.equal(
                    muon.state[one]["momentum_buffer"], theirs_muon.state[other]["momentum_buffer"]
                )
    mine, torchs = muon.state_dict(), theirs_muon.state_dict()
    assert mine["param_groups"] == torchs["param_groups"]
    assert {i: s.keys() for i, s in mine["state"].items()} == {
        i: s.keys() for i, s in torchs["state"].items()
    }


def test_a_stack_is_orthogonalised_as_its_singular_values_say():
    """In fp64 against the polynomial of Newton and Schulz on the values of an SVD."""
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    for shape in ((4, 12, 12), (3, 20, 12), (3, 12, 20), (2, 1, 7)):
        stack = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
        stack[0] *= 1e-3
        left, values, right = torch.linalg.svd(stack, full_matrices=False)
        values = values / values.norm(dim=1, keepdim=True)
        for _ in range(5):
            values = a * values + b * values**3 + c * values**5
        expected = left @ (values[..., None] * right)
        found = orthogonalise(stack, coefficients, 5, 1e-7)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        rounded = orthogonalise(stack.bfloat16(), coefficients, 5, 1e-7)
        assert (rounded - expected).norm() < 0.05 * expected.norm()
    zeros = torch.zeros(2, 3, 4)
    assert torch.equal(orthogonalise(zeros, coefficients, 5, 1e-7), zeros)


SHARDED = """
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from complexity_dit.distributed import own_process_group
from complexity_dit.training.optimizer import StackedMuon
from dit.training.test_optim import matrices, with_gradients


def check():
    whole, model = matrices(0), nn.ParameterList(matrices(0))
    fully_shard(model)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    both = StackedMuon(whole, **options), StackedMuon(model.parameters(), **options)
    for step in range(4):
        with_gradients(whole, step)
        for shard, one in zip(model.parameters(), whole):
            shard.grad = None
            if one.grad is not None:
                shard.grad = distribute_tensor(one.grad, shard.device_mesh, shard.placements)
        for muon in both:
            muon.step()
        for shard, one in zip(model.parameters(), whole):
            assert shard.to_local().numel() < one.numel() or one.shape[0] == 1
            torch.testing.assert_close(shard.full_tensor(), one.detach(), rtol=0, atol=1e-3)


with own_process_group():
    distributed.init_process_group("gloo")
    check()
    distributed.barrier()  # no process leaves while another one waits for it
"""


def test_sharded_matrices_are_updated_as_whole_ones(tmp_path):
    """On two processes: three stacks that do not divide by two, and one row for both."""
    (tmp_path / "worker.py").write_text(SHARDED)
    torchrun(2, tmp_path / "worker.py")


def test_resume_with_muon_is_bit_identical(small_run, resumed_as_straight):
    resumed_as_straight(dataclasses.replace(small_run, optim=MUON, steps=12))


def test_resume_with_another_optimizer_is_refused(small_run):
    train(small_run)
    with pytest.raises(UserError, match=r"give --optim.name adamw, or"):
        train(dataclasses.replace(small_run, optim=MUON, resume="auto", steps=9))


# The spike guard.

GUARDED = OptimConfig(spike_factor=3.0, spike_window=10, spike_limit=2)


def test_the_guard_skips_spikes_and_follows_a_lasting_change():
    guard = SpikeGuard(GUARDED)
    assert all(guard.admits(norm) for norm in (50.0, *[1.0 + 0.1 * i for i in range(9)]))
    assert guard.threshold() == pytest.approx(3 * 1.8)  # 50 is the one above the 0.9 quantile
    assert guard.admits(5.3)
    assert not guard.admits(5.5)  # the window has now two above 1.8
    assert guard.admits(15.8)
    lasting = SpikeGuard(GUARDED)
    assert all(lasting.admits(1.0) for _ in range(10))
    verdicts = [lasting.admits(100.0) for _ in range(5)]
    assert verdicts == [False, False, True, True, True]


def test_the_guard_never_admits_a_norm_that_is_not_finite_and_stops_in_the_end():
    guard = SpikeGuard(GUARDED)  # an empty window: also then
    for norm in (math.nan, math.inf, 1.0, math.nan, -math.inf):
        assert guard.admits(norm) == math.isfinite(norm)
    assert list(guard.norms) == [1.0]
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row \(spike_limit is 2\)"):
        guard.admits(math.nan)


def test_the_guard_is_restored_from_its_state():
    one, other = SpikeGuard(GUARDED), SpikeGuard(GUARDED)
    norms = torch.rand(60, generator=torch.Generator().manual_seed(0)).exp().pow(3).tolist()
    for norm in norms[:30]:
        one.admits(norm)
    other.load_state_dict(one.state_dict())
    assert [one.admits(n) for n in norms[30:]] == [other.admits(n) for n in norms[30:]]
    assert one.state_dict() == other.state_dict()


@pytest.fixture
def poisoned(on_batch):
    """Multiply the targets of some steps: `{step: factor}`."""
    return lambda factors: on_batch(lambda step, b: b["target"].mul_(factors.get(step, 1.0)))


def test_skipped_steps_are_counted_and_resume_exactly(small_run, poisoned, resumed_as_straight):
    """Spikes at step 3 (before the checkpoint of the resume) and 10, a NaN at step 8."""
    poisoned({3: 1000.0, 8: math.nan, 10: 1000.0})
    optim = OptimConfig(warmup_steps=2, spike_factor=5.0, spike_window=2)
    rows = resumed_as_straight(dataclasses.replace(small_run, optim=optim, steps=12))
    assert [int(row["step"]) for row in rows if row["skipped"] == "1"] == [4, 9, 11]
    assert len({row["lr"] for row in rows[3:]}) > 5  # the schedule advances


def test_a_skipped_step_leaves_weights_moments_and_average(small_run, poisoned):
    poisoned({5: math.inf})
    optim = OptimConfig(warmup_steps=2, spike_factor=1e6)
    run = dataclasses.replace(
        small_run, optim=optim, steps=6, checkpoint_every=5, keep_last=0, log_every=1
    )
    train(run)
    before, after = (tensor_files(c) for c in all_checkpoints(Path(run.out) / "checkpoints"))
    assert before == after


def test_the_guard_stops_a_run_that_does_not_recover(small_run, poisoned):
    poisoned(dict.fromkeys(range(4, 8), math.nan))
    optim = OptimConfig(warmup_steps=2, spike_factor=5.0, spike_limit=2)
    with pytest.raises(UserError, match="not finite for 3 steps in a row"):
        train(dataclasses.replace(small_run, optim=optim))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"muon_lr": 0.0}, "muon_lr is 0.0; expected more than 0"),
        ({"muon_momentum": 1.0}, "expected a number in"),
        ({"spike_factor": 0.5}, "spike_factor 0.5 must be 0"),
        ({"spike_factor": math.nan}, "spike_factor nan"),
        ({"spike_factor": 5.0, "spike_window": 1}, "spike_window is 1; expected at least 2"),
        ({"spike_factor": 5.0, "spike_limit": -1}, "spike_limit is -1; expected at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        OptimConfig(**settings)


def test_the_guard_is_off_by_default_and_refuses_fp16(small_run):
    model = build_model(small_run, load_data(small_run.data, "train"))
    assert build_state(model, dataclasses.replace(small_run, mixed_precision="fp16")).guard is None
    with pytest.raises(UserError, match="does not work with mixed_precision fp16"):
        dataclasses.replace(small_run, mixed_precision="fp16", optim=GUARDED)
