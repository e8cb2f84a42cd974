"""The study of trajectories: its expert, plants and decoders are what it says."""

import sys

import pytest
import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import read_rows
from benchmarks.study import trajectories
from benchmarks.study.trajectories import CHANNELS, CHUNK, INTERVAL, MOVING, SPAN
from benchmarks.study.trajectories_report import DECODERS, TASKS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_starts_and_ends_at_rest(task):
    start, goal = trajectories.drawn_goals(task, 16, 1, generator()).unbind(1)
    path = trajectories.path_of(task, start, goal)
    assert path.shape == (16, SPAN + CHUNK, CHANNELS)
    torch.testing.assert_close(path[:, 0], start)
    torch.testing.assert_close(
        path[:, MOVING:], goal[:, None].expand(-1, SPAN + CHUNK - MOVING, -1)
    )
    speed = path.diff(dim=1).norm(dim=-1)
    assert float(speed[:, 0].max()) < 0.02 * float(speed.max())
    if task == "maze":  # through the gap
        assert bool((start[:, 0] * goal[:, 0] < 0).all())
        assert 0 < int((start[:, 0] < 0).sum()) < len(start)  # in both directions
        crossing = path[path[..., 0].abs() < 0.005]
        assert float(crossing[:, 1].min()) > trajectories.GAP


def test_the_wall_stops_what_runs_into_it():
    q, speed = torch.tensor([[-0.1, 0.0], [-0.1, 0.7]]), torch.zeros(2, 2)
    target = torch.tensor([[0.5, 0.0], [0.5, 0.7]])
    for _ in range(40):
        q, speed = trajectories.plant_step("maze", q, speed, target, None)
    assert -0.1 <= float(q[0, 0]) < 0.0
    torch.testing.assert_close(q[1], target[1], rtol=0, atol=0.01)


@pytest.mark.parametrize("task", TASKS)
def test_chunks_leave_from_what_was_asked_for_and_come_back_to_the_way(task):
    observed, chunks = trajectories.demonstrations(task, 64, generator())
    asked, rate = observed[:, : 2 * CHANNELS].chunk(2, -1)
    start, goal = trajectories.drawn_goals(task, 64, 1, generator()).unbind(1)
    path = trajectories.path_of(task, start, goal)
    off = asked - path[:, :SPAN].transpose(0, 1).flatten(0, 1)
    assert float(off.std()) == pytest.approx(trajectories.OFF[0], rel=0.05)
    ends = path[:, CHUNK : SPAN + CHUNK].transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(chunks[:, -1], ends, rtol=0, atol=1e-5)
    first = chunks[:, 0] - asked - INTERVAL * rate
    assert float(first.abs().max()) < 0.03  # accelerations of 8, and the way back


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_equal_parameters_and_every_one_has_a_gradient(name):
    policy = trajectories.build(name, 0)
    wanted = parameters(trajectories.Policy("MLP"))
    assert parameters(policy) == pytest.approx(wanted, rel=0.02)
    observed, chunks = trajectories.demonstrations("arm", 2, generator())
    found = policy(observed)
    assert found.shape == chunks.shape
    torch.nn.functional.mse_loss(found, chunks).backward()
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None, key
        if "gate" not in key and (name, key) != ("no carry", "decoder.dynamics.alpha"):
            assert bool(parameter.grad.any()), key  # a gate at its bound may be pushed out of it


@torch.no_grad()
def test_integrating_decoders_leave_with_the_velocity_that_was_asked_for():
    observed = torch.randn(1, 5 * CHANNELS + 1, generator=generator())
    q, speed = observed[:, :CHANNELS], observed[:, CHANNELS : 2 * CHANNELS]
    for name in ("acceleration", "velocity"):
        policy = trajectories.build(name, 0)
        for parameter in policy.decoder.out.parameters():
            parameter.zero_()
        if name == "velocity":
            policy.decoder.dynamics.alpha.fill_(1.0)
            policy.decoder.dynamics.beta.zero_()
        steps = torch.arange(1, CHUNK + 1)[None, :, None]
        expected = q[:, None] + INTERVAL * steps * speed[:, None]
        torch.testing.assert_close(policy(observed), expected)


def test_a_perfect_policy_follows_the_expert_and_dropping_is_survived():
    """With the expert's own chunk as the policy the error is 0, with drops too."""
    points = trajectories.drawn_goals("arm", 8, 2, generator())
    payload = torch.ones(8)
    asked = []

    def policy(observed):
        k = trajectories.REPLAN * len(asked)
        asked.append(k)
        span = k // SPAN
        return trajectories.path_of("arm", points[:, span], points[:, span + 1])[
            :, k % SPAN + 1 : k % SPAN + 1 + CHUNK
        ]

    expert = trajectories.driven("arm", points, payload)
    torch.testing.assert_close(trajectories.driven("arm", points, payload, policy), expert)
    dropped = torch.zeros(8, 2 * SPAN // trajectories.REPLAN, dtype=torch.bool)
    dropped[:, [0, 2, 3, 4]] = True  # the first of a goal arrives, three in a row are in the chunk
    asked.clear()
    found = trajectories.driven("arm", points, payload, policy, dropped)
    torch.testing.assert_close(found, expert)


def test_runs_are_measured_once(tmp_path, monkeypatch):
    rows = tmp_path / "rows.csv"
    command = [
        "trajectories", "--steps=30", "--demonstrations=8", "--seeds=1", "--tasks", "maze",
        "--decoders", "MLP", "velocity", "--rows", str(rows),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    trajectories.main()
    before = rows.read_bytes()
    assert {row["case"] for row in read_rows(rows)} == {
        "maze / MLP / seed 0", "maze / velocity / seed 0",
    }  # fmt: skip
    monkeypatch.setattr(trajectories, "run", None)  # or a call would raise
    trajectories.main()
    assert rows.read_bytes() == before
