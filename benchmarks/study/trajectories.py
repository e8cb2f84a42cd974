"""The layer across time: decoders that turn one observation into a chunk of actions.

    python -m benchmarks.study.trajectories --rows benchmarks/results.csv

A policy observes position q, velocity q', a goal and the time left for it, and returns the
positions of the next `CHUNK` steps, which a PD controller tracks; after `REPLAN` steps it observes
again. A chunk continues the position that was asked for last: q lags behind it, as the controller
damps the velocity itself. The policy imitates an expert that moves with the least jerk (Flash &
Hogan, J. Neurosci. 5(7), 1985), and comes back to its way likewise when off it. Goals change every
`SPAN` steps. Measured over 64 and 256 steps in closed loop: root mean square distance to the
expert, at the end of each goal to the goal, and jerk over the expert's, with all observations and
with half of them dropped (never the first of a goal; the policy follows its chunk, then holds its
last action).

arm    joints of a two-link arm with an unknown payload of 0.5 to 1.5 kg
maze   a mass in a square with a wall, whose gap the way between the halves leads through, in the
       manner of D4RL's maze2d

The decoders read the same features of the observation, from a perceptron whose width gives all of
them the parameters of `MLP`:

MLP           a linear map to all positions
transformer   learned queries, one a step, through a causal transformer layer
low-pass      `MLP` through a first-order filter with a learned coefficient per channel
oscillators   damped linear oscillators that the features drive, read by a linear map; as D-LinOSS
acceleration  a linear map to accelerations, integrated by Euler steps from the position that was
              asked for last, and its velocity
velocity      `LoopedDynamics` with a spring over the steps, started likewise; accelerations and
              equilibrium are linear in the features
no carry      `velocity` whose velocity starts at zero in each step; the map is to velocities

Runs with rows are not repeated.
"""

import argparse
import math
import time

import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import read_rows, run_missing
from benchmarks.study.trajectories_report import DECODERS, TASKS, table
from benchmarks.theory.physics_report import known_of
from benchmarks.theory.physics_systems import arm_acceleration
from torch import nn

from inl_core import LoopedDynamics, apply_bounds, defer_bounds

CHUNK, REPLAN, SPAN, STEPS = 32, 8, 64, (64, 256)
MOVING = 48
"""Steps in which the expert moves; then it holds the goal."""
INTERVAL, SUBSTEPS = 0.05, 10
DROPPED = 0.5
NOISE = 10.0
"""Standard deviation of the push that disturbs the demonstrations, against KP a unit of length."""
OFF = 0.03, 0.1
"""Standard deviations of position and velocity that demonstrations are off the way."""
KP, KD = 200.0, 40.0
CHANNELS, WIDTH = 2, 64
GAP = 0.4
"""The wall at x = 0 ends at this y."""


# Tasks


def uniform(draw, count, low, high):
    return low + (high - low) * torch.rand(count, CHANNELS, generator=draw)


def drawn_goals(task, count, spans, draw):
    """Start and goals, (count, spans + 1, 2); in the maze the halves take turns, either first."""
    points = torch.stack([uniform(draw, count, -1.0, 1.0) for _ in range(spans + 1)], 1)
    if task == "maze":
        side = torch.where(torch.arange(spans + 1) % 2 == 0, -1.0, 1.0) * points[:, :1, 0].sign()
        points[..., 0] = side * (0.2 + 0.8 * points[..., 0].abs())
        points[..., 1] = points[..., 1] * 0.6 - 0.4  # below the end of the wall, or little above
    return points


def path_of(task, start, goal):
    """The expert's positions at steps 0 to SPAN - 1 + CHUNK of a goal, (B, SPAN + CHUNK, 2)."""
    legs = [start, goal]
    if task == "maze":
        legs.insert(1, torch.tensor([0.0, (GAP + 1) / 2]).expand_as(start))
    way = torch.linspace(0, len(legs) - 1, MOVING + 1)
    share = 10 * way.frac() ** 3 - 15 * way.frac() ** 4 + 6 * way.frac() ** 5
    index = way.floor().long().clamp(max=len(legs) - 2)
    share = torch.where(way >= len(legs) - 1, 1.0, share)[None, :, None]
    points = torch.stack(legs, 1)
    moving = points[:, index] + share * (points[:, index + 1] - points[:, index])
    still = goal[:, None].expand(-1, SPAN + CHUNK - MOVING - 1, -1)
    return torch.cat([moving, still], 1)


def way_back(off, rate):
    """The least jerk from `off` its way, at `rate` a second, to the way, (B, CHUNK, 2)."""
    t = torch.arange(1, CHUNK + 1)[:, None] / CHUNK
    place = 1 - 10 * t**3 + 15 * t**4 - 6 * t**5
    slope = CHUNK * INTERVAL * (t - 6 * t**3 + 8 * t**4 - 3 * t**5)
    return off[:, None] * place + rate[:, None] * slope


def plant_step(task, q, speed, target, payload, noise=0.0):
    """Position and velocity after INTERVAL seconds of tracking `target`."""
    for _ in range(SUBSTEPS):
        dt = INTERVAL / SUBSTEPS
        push = KP * (target - q) - KD * speed + noise
        if task == "arm":
            push = arm_acceleration(q, speed, push, payload)
        speed = speed + dt * push
        moved = q + dt * speed
        if task == "maze":
            hit = (moved[:, 0] * q[:, 0] < 0) & (moved[:, 1] < GAP)
            hit = torch.stack([hit, torch.zeros_like(hit)], 1) | (moved.abs() > 1.2)
            moved, speed = torch.where(hit, q, moved), torch.where(hit, 0.0, speed)
        q = moved
    return q, speed


def observation(q, speed, asked, rate, goal, step):
    """(B, 11) at a step of a goal; `asked` is the position asked for last, `rate` its velocity."""
    left = torch.full_like(q[:, :1], 1 - step / SPAN)
    return torch.cat([asked, rate, asked - q, speed, goal - asked, left], -1)


def demonstrations(task, count, draw):
    """Observations (M, 11) near the expert's way and chunks (M, CHUNK, 2) that come back to it."""
    start, goal = drawn_goals(task, count, 1, draw).unbind(1)
    path, payload = path_of(task, start, goal), 0.5 + torch.rand(count, generator=draw)
    q, speed = start, torch.zeros_like(start)
    observed, chunks = [], []
    for k in range(SPAN):
        off, slope = (s * torch.randn(count, CHANNELS, generator=draw) for s in OFF)
        rate = (path[:, k] - path[:, max(k - 1, 0)]) / INTERVAL + slope
        observed.append(observation(q, speed, path[:, k] + off, rate, goal, k))
        chunks.append(path[:, k + 1 : k + 1 + CHUNK] + way_back(off, slope))
        noise = NOISE * torch.randn(count, CHANNELS, generator=draw)
        q, speed = plant_step(task, q, speed, path[:, k + 1], payload, noise)
    return torch.cat(observed), torch.cat(chunks)


# Decoders: features (B, W), the position asked for last and its velocity (B, 2) -> (B, CHUNK, 2)


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.out = nn.Linear(width, CHUNK * CHANNELS)

    def forward(self, x, q, rate):
        return q[:, None] + self.out(x).unflatten(-1, (CHUNK, CHANNELS))


class Transformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(CHUNK, 24))
        self.enter = nn.Linear(width, 24)
        self.layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
        self.out = nn.Linear(24, CHANNELS)
        mask = nn.Transformer.generate_square_subsequent_mask(CHUNK)
        self.register_buffer("mask", mask)

    def forward(self, x, q, rate):
        tokens = self.queries + self.enter(x)[:, None]
        return q[:, None] + self.out(self.layer(tokens, self.mask))


class LowPass(MLP):
    def __init__(self, width):
        super().__init__(width)
        self.keep = nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x, q, rate):
        keep, y, found = self.keep.sigmoid(), q, []
        for step in super().forward(x, q, rate).unbind(1):
            y = keep * y + (1 - keep) * step
            found.append(y)
        return torch.stack(found, 1)


class Oscillators(nn.Module):
    def __init__(self, width, count=32):
        super().__init__()
        self.stiffness = nn.Parameter(torch.linspace(0, 4, count))
        self.damping = nn.Parameter(torch.ones(count))
        self.start, self.drive = nn.Linear(width, 2 * count), nn.Linear(width, count)
        self.out = nn.Linear(count, CHANNELS, bias=False)

    def forward(self, x, q, rate):
        place, moving = self.start(x).chunk(2, -1)
        first, push, found = place, self.drive(x), []
        for _ in range(CHUNK):
            pull = push - self.stiffness.square() * place
            damped = 1 + INTERVAL * nn.functional.softplus(self.damping)
            moving = (moving + INTERVAL * pull) / damped
            place = place + INTERVAL * moving
            found.append(self.out(place - first))
        return q[:, None] + torch.stack(found, 1)


class Acceleration(MLP):
    def forward(self, x, q, rate):
        found = []
        for push in self.out(x).unflatten(-1, (CHUNK, CHANNELS)).unbind(1):
            rate = rate + INTERVAL * push
            q = q + INTERVAL * rate
            found.append(q)
        return torch.stack(found, 1)


class Velocity(MLP):
    carried = True

    def __init__(self, width):
        super().__init__(width)
        self.goal = nn.Linear(width, CHANNELS)
        self.dynamics = LoopedDynamics(
            CHANNELS,
            init_alpha=0.98,
            init_beta=0.1,
            dt=INTERVAL,
            spring=True,
            learn_equilibrium=False,
        )

    def forward(self, x, q, rate):
        mu, found = q + self.goal(x), []
        for push in self.out(x).unflatten(-1, (CHUNK, CHANNELS)).unbind(1):
            force = INTERVAL * push if self.carried else push  # accelerations, or velocities
            q, rate = self.dynamics(q, rate if self.carried else None, force, mu)
            found.append(q)
        return torch.stack(found, 1)


class NoCarry(Velocity):
    carried = False


KINDS = dict(
    zip(
        DECODERS,
        (MLP, Transformer, LowPass, Oscillators, Acceleration, Velocity, NoCarry),
        strict=True,
    )
)


class Policy(nn.Module):
    """Observations (B, 11) -> positions (B, CHUNK, 2)."""

    def __init__(self, name, width=WIDTH):
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(5 * CHANNELS + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.decoder = KINDS[name](width)

    def forward(self, observed):
        asked, rate = observed[:, : 2 * CHANNELS].chunk(2, -1)
        return self.decoder(self.features(observed), asked, rate)


def build(name, seed):
    """The policy with the number of parameters next to that of `MLP`."""
    wanted = parameters(Policy("MLP"))
    width = min(range(8, 2 * WIDTH), key=lambda w: abs(parameters(Policy(name, w)) - wanted))
    torch.manual_seed(seed)
    return Policy(name, width)


def trained(policy, observed, chunks, steps, seed):
    """Train with Adam on the mean squared error of the positions."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    defer_bounds(policy)  # to all steps of a chunk together
    for _ in range(steps):
        rows = torch.randint(len(observed), (256,), generator=draw)
        loss = nn.functional.mse_loss(policy(observed[rows]), chunks[rows])
        optimizer.zero_grad()
        loss.backward()
        apply_bounds(policy)
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return policy.eval()


# Closed loop


@torch.no_grad()
def driven(task, points, payload, policy=None, dropped=None):
    """Positions in closed loop, (B, steps + 1, 2), of a policy or, with None, of the expert.

    `dropped` (B, replans) marks the observations that do not arrive.
    """
    q, speed = points[:, 0], torch.zeros_like(points[:, 0])
    found, chunk, age = [q], None, torch.zeros(len(q), dtype=torch.long)
    rows, target, rate = torch.arange(len(q)), q, speed
    for k in range(SPAN * (points.shape[1] - 1)):
        goal, before = points[:, k // SPAN + 1], target
        if policy is None:
            target = path_of(task, points[:, k // SPAN], goal)[:, k % SPAN + 1]
        else:
            if k % REPLAN == 0:
                new = policy(observation(q, speed, target, rate, goal, k % SPAN))
                lost = torch.zeros(len(q), dtype=torch.bool)
                if dropped is not None and k % SPAN:
                    lost = dropped[:, k // REPLAN]
                chunk = new if chunk is None else torch.where(lost[:, None, None], chunk, new)
                age = torch.where(lost, age, 0)
            target = chunk[rows, age.clamp(max=CHUNK - 1)]
            age = age + 1
        rate = (target - before) / INTERVAL
        q, speed = plant_step(task, q, speed, target, payload)
        found.append(q)
    return torch.stack(found, 1)


def tried(task, policy, count=256):
    """Metrics on goals that are not in the training."""
    draw = torch.Generator().manual_seed(1_000_003)
    spans = STEPS[-1] // SPAN
    points = drawn_goals(task, count, spans, draw)
    payload = 0.5 + torch.rand(count, generator=draw)
    dropped = torch.rand(count, STEPS[-1] // REPLAN, generator=draw) < DROPPED
    expert = driven(task, points, payload)
    result = {}
    for about, lost in (("", None), (", half dropped", dropped)):
        path = driven(task, points, payload, policy, lost)
        wrong = (path - expert).square().sum(-1)
        for steps in STEPS:
            error = wrong[:, 1 : steps + 1].mean().sqrt()
            result[f"error, {steps} steps{about}"] = (float(error), "")
        ends = path[:, SPAN::SPAN] - points[:, 1:]
        result[f"goal error{about}"] = (float(ends.square().sum(-1).mean().sqrt()), "")
        jerks = [x.diff(n=3, dim=1).square().mean().sqrt() for x in (path, expert)]
        result[f"jerk{about}"] = (float(jerks[0] / jerks[1]), "x expert")
    return result


def run(task, name, seed, options):
    """Train one policy and return its metrics."""
    data = demonstrations(task, options.demonstrations, torch.Generator().manual_seed(1))
    start = time.perf_counter()
    policy = trained(build(name, seed), *data, options.steps, seed)
    seconds = time.perf_counter() - start
    result = tried(task, policy)
    return result | {"parameters": (parameters(policy), ""), "training": (seconds, "s")}


def main():
    """Run what has no rows yet and print the table of all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--demonstrations", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS), choices=DECODERS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this")
    parser.add_argument("--rows", help="CSV to add the rows to; runs that it has are skipped")
    options = parser.parse_args()
    shape = f"{options.demonstrations} demonstrations, {options.steps} steps of 256"
    known = known_of(
        row
        for row in read_rows(options.rows or "")
        if (row["bench"], row["shape"]) == ("trajectories", shape)
    )
    cases = [
        (
            f"{task} / {name} / seed {seed}",
            (task, name, seed, options),
            {"shape": shape},
        )
        for seed in range(options.seeds)
        for task in options.tasks
        for name in options.decoders
    ]
    command = "python -m benchmarks.study.trajectories"
    run_missing("trajectories", run, cases, known, options, command, "cpu")
    print("\n".join(table(known)))


if __name__ == "__main__":
    main()
