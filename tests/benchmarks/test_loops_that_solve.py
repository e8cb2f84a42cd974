"""The study of loops: its problems are what it says, and its arms differ in the loop alone."""

import math

import pytest
import torch
from benchmarks.common.memory import parameters
from benchmarks.study import loops, loops_report


def regressions(kappa=10, batch=4, dimensions=8, points=32):
    return loops.regressions(kappa, dimensions, points, batch, torch.Generator().manual_seed(0))


def linear(arm):
    """An arm of `linear` whose block is exactly a step of gradient descent."""
    model = loops.build("linear", arm, 0)
    with torch.no_grad():
        for block in model.loop.blocks:
            block.product.copy_(torch.eye(8))
    return model


@pytest.mark.parametrize("kappa", [10, 100])
def test_points_have_exactly_the_condition_number(kappa):
    x, y = regressions(kappa)
    points = x[:, :-1].double()
    eigenvalues = torch.linalg.eigvalsh(points.mT @ points / 32)
    expected = torch.logspace(-math.log10(kappa), 0, 8).double().expand(4, 8)
    torch.testing.assert_close(eigenvalues, expected, rtol=1e-4, atol=0)
    weights = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(x @ weights, y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [1, 4, 8])
def test_the_end_of_a_path_is_its_length_away(length):
    """Every query is followed by hand, in training at most as far."""
    generator, taken, ends = torch.Generator().manual_seed(0), set(), set()
    for training in (False, True):
        x, y = loops.paths(length, 8, 16, 64, generator, training)
        assert (y[:, :-1] != 0).sum() == 2 * 64
        for nodes, values in zip(x.unflatten(-1, (2, 4)).tolist(), y[..., 0].tolist(), strict=True):
            followed = {tuple(own): tuple(then) for own, then in nodes[:-1]}
            assert len(followed) == 16
            place, edges = tuple(nodes[-1][1]), 1
            while followed[place] != place:
                place, edges = followed[place], edges + 1
            taken.add((training, edges))
            value = dict(zip((tuple(own) for own, _ in nodes[:-1]), values, strict=False))[place]
            assert value == values[-1]
            ends.add(value)
    expected = {(False, length)} | {(True, edges) for edges in range(1, length + 1)}
    assert (taken, ends) == (expected, {-1.0, 1.0})


@torch.no_grad()
def test_the_plain_loop_is_gradient_descent():
    x, y = regressions()
    points, values = x[:, :-1], y[:, :-1]
    weights = torch.zeros(4, 8, 1)
    for found in linear("plain")(x, y, 5):
        weights = weights - points.mT @ (points @ weights - values) / 32
        torch.testing.assert_close(found, (x[:, -1:] @ weights)[:, 0, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_carried_velocity_is_heavy_ball():
    """h' = h + f + alpha (h - h_before), with alpha 0.5 and no spring at the start."""
    x, y = regressions()
    plain, before = linear("plain"), None
    h = torch.cat([y[:, :-1], torch.zeros(4, 1, 1)], 1)
    block = plain.loop.blocks[0]
    arms = [linear(arm)(x, y, 12) for arm in ("momentum", "velocity", "spring")]
    for momentum, *others in zip(*arms, strict=True):
        h, before = h + block(h, x) + (0 if before is None else 0.5 * (h - before)), h
        torch.testing.assert_close(momentum, -h[:, -1, 0], rtol=0, atol=1e-5)
        for found in others:
            torch.testing.assert_close(found, momentum, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("arm", ["step sizes", "no carry", "unshared"])
def test_other_arms_start_as_the_plain_loop(arm):
    x, y = regressions()
    for found, expected in zip(linear(arm)(x, y, 12), linear("plain")(x, y, 12), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arm", loops_report.ARMS)
def test_networks_of_softmax_blocks_have_equal_parameters(arm):
    mine, ours = (parameters(loops.build("softmax", name, 0)) for name in (arm, "velocity"))
    if arm == "unshared":
        mine -= 7 * parameters(loops.build("softmax", arm, 0).loop.blocks[0])
    assert mine == pytest.approx(ours, rel=0.005)


@torch.no_grad()
def test_a_prediction_does_not_see_the_value_of_its_query():
    for kind, task in loops.TASKS.items():
        x, y = task.problems(
            task.levels[0], task.dimensions, task.points, 4, torch.Generator().manual_seed(0)
        )
        model, other = loops.build(kind, "velocity", 0), y.clone()
        other[:, -1] = 9.0
        for found, expected in zip(model(x, other, 3), model(x, y, 3), strict=True):
            assert torch.equal(found, expected)


def test_a_run_learns_and_is_measured(monkeypatch):
    monkeypatch.setattr(loops.TASKS["linear"], "steps", 60)
    monkeypatch.setattr(loops, "LONGEST", 64)
    result = loops.run("linear", 10, "velocity", 0)
    errors = [result[f"error, {k} loops"][0] for k in (1, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert result["parameters"][0] == 66
    assert (result["loops to solve"][0] <= 8) == (errors[2] <= loops_report.SOLVED)


def test_the_table_has_means_and_says_what_diverged():
    known = {}
    for arm, errors in (("plain", (0.2, 0.4)), ("velocity", (0.1, math.inf))):
        for seed, error in enumerate(errors):
            known[f"linear κ=10 / {arm} / seed {seed}"] = {
                **{f"error, {k} loops": error for k in loops_report.MEASURED},
                "loops to solve": 20.0, "parameters": 64, "forward": 0.01,
            }  # fmt: skip
    lines = loops_report.curves(known)
    assert lines[2].startswith("| linear κ=10 | plain | 0.3 ± 0.1 |")
    assert "| infinite in 1 of 2 |" in lines[3]
    assert loops_report.loops([]) == ""
