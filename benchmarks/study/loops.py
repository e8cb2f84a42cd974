"""Loops that solve: the error of a block that is applied several times, over the repetitions.

    python -m benchmarks.study.loops --rows benchmarks/results.csv

In-context regression: 32 points in 8 dimensions with the values of a linear function, and a query.
The inputs of a problem have exactly the condition number κ and the largest eigenvalue 1, in a
random rotation: no fixed preconditioner solves it, and a plain loop is stable. Every network is
trained to be right after `LOOPS` repetitions of one block, and measured after 1 to four times as
many. The error is the mean square of the query's, in variances of the value.

linear κ     One linear-attention step (von Oswald et al., arXiv 2212.07677). The state of a token
             is what is left of its value, so that a repetition of the plain loop is one step of
             gradient descent.
softmax κ    A pre-norm block of softmax attention and MLP, width 32, which has to find its own
             algorithm. 4 dimensions, 16 points.

A path in a graph, for the same block: 16 nodes in two chains, each node with its own code and that
of its successor, and a value of ±1 at the end of each chain. The query points at a node, and is
asked for the value at the end of that node's chain. A repetition that hands values on by one edge
takes as many repetitions as the path has edges.

path L       Trained on paths of 1 to L edges, measured on paths of L.

The arms differ in how a repetition uses the output f of the block:

plain        h + f
1/N          h + f / N for N trained repetitions
step sizes   h + s_k f, a number for each trained repetition; later ones use the last
damped       a h + b x + f with a in (0, 1) and b per channel, and the input x; as in Parcae
recall       norm(h + f(h + W x)): the input is recalled, and the sum normalised. A norm of one
             channel is its sign, so that `linear` has no such arm
momentum     v = a v + f, h + v with one learned a
no carry     `LoopedDynamics` whose velocity starts at zero in each repetition
unshared     h + f_k with a block of its own for each trained repetition: more weights for the same
             FLOPs; later repetitions use the last
velocity     `LoopedDynamics`, momentum with coefficients per channel
spring       `LoopedDynamics` with a spring to the input

In `softmax` all but `unshared` have the parameters of `velocity`, by the width of the MLP; in
`linear` they differ by 1 to 8 numbers. Runs with rows are not repeated.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import read_rows, run_missing
from benchmarks.study.loop_arms import LoopArm
from benchmarks.study.loops_report import ARMS, LOOPS, MEASURED, SOLVED, curves, draw
from benchmarks.theory.physics_report import known_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from inl_core import RMSNorm

WIDTH, HEADS = 32, 4
LONGEST = 512
"""Repetitions within which `SOLVED` must be reached."""


def regressions(kappa, dimensions, points, batch, generator, training=False):
    """Inputs (batch, points + 1, dimensions) and their values (batch, points + 1, 1), query last.

    The covariance of the points has eigenvalues from 1 down to 1 / kappa, evenly in the logarithm.
    """

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator)

    eigenvalues = torch.logspace(0, -math.log10(kappa), dimensions)
    turn = torch.linalg.qr(normal(dimensions, dimensions)).Q
    white = torch.linalg.qr(normal(points, dimensions)).Q * points**0.5
    x = torch.cat([white, normal(1, dimensions)], 1) @ (eigenvalues.sqrt()[:, None] * turn.mT)
    return x, x @ normal(dimensions, 1) / eigenvalues.sum().sqrt()


def paths(length, dimensions, points, batch, generator, training=False):
    """Codes of nodes and their successors (batch, points + 1, dimensions), and values.

    The values (batch, points + 1, 1) are 0 but at the ends of both chains, and for the query, last,
    that of the end which is `length` edges away; in training 1 to `length` edges.
    """
    bits = torch.arange(dimensions // 2)
    codes = ((torch.arange(points)[:, None] >> bits) & 1) * 2.0 - 1
    own = torch.stack([codes[torch.randperm(points, generator=generator)] for _ in range(batch)])
    edges = torch.full((batch,), length)
    if training:
        edges = torch.randint(1, length + 1, (batch,), generator=generator)
    # The first `length` nodes are a chain, the others the second; an end is its own successor.
    follower = torch.arange(1, points + 1)
    follower[[length - 1, points - 1]] = torch.tensor([length - 1, points - 1])
    first = own[torch.arange(batch), length - edges]
    query = torch.cat([torch.zeros_like(first), first], -1)[:, None]
    x = torch.cat([torch.cat([own, own[:, follower]], -1), query], 1)
    y = torch.zeros(batch, points + 1, 1)
    ends = torch.randint(0, 2, (batch, 2), generator=generator) * 2.0 - 1
    y[:, length - 1, 0], y[:, points - 1, 0], y[:, -1, 0] = ends[:, 0], ends[:, 1], ends[:, 0]
    # In the order of their codes, so that a place says nothing.
    order = (own > 0).mul(1 << bits).sum(-1).argsort(-1)[..., None]
    x[:, :-1] = x[:, :-1].gather(1, order.expand(-1, -1, dimensions))
    y[:, :-1] = y[:, :-1].gather(1, order)
    return x, y


class LinearStep(nn.Module):
    """What a linear-attention step subtracts from the rest h (B, N, 1) of each value."""

    def __init__(self, size):
        super().__init__()
        self.product = nn.Parameter(torch.eye(size) + 0.02 * torch.randn(size, size))

    def forward(self, h, x):
        keys, rests = x[:, :-1], h[:, :-1]
        return -(x @ self.product) @ (keys.mT @ rests) / keys.shape[1]


class SoftmaxBlock(nn.Module):
    """The change of h (B, N, WIDTH) by attention and MLP; the query, last, is no key."""

    def __init__(self, wider=0):
        super().__init__()
        inner = 2 * WIDTH + wider
        self.norms = nn.ModuleList([RMSNorm(WIDTH), RMSNorm(WIDTH)])
        self.enter = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.leave = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH))
        for layer in (self.leave, self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, h):
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.enter(self.norms[0](h)).chunk(3, -1)
        )
        out = nn.functional.scaled_dot_product_attention(q, k[..., :-1, :], v[..., :-1, :])
        change = self.leave(out.transpose(1, 2).flatten(-2))
        return change + self.mlp(self.norms[1](h + change))


class Loop(nn.Module):
    """Blocks that are applied in turn in the manner of an arm."""

    def __init__(self, arm, block, width):
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(LOOPS if arm == "unshared" else 1)])
        self.arm = LoopArm(arm, width, LOOPS)

    def forward(self, x, count, *context):
        """Yield the state after 1 to `count` repetitions."""
        turns = itertools.chain(self.blocks, itertools.repeat(self.blocks[-1]))
        return self.arm(lambda h: next(turns)(h, *context), x, count)


class Linear(nn.Module):
    """The prediction is what has been subtracted from the value 0 of the query."""

    def __init__(self, arm, dimensions, wider=0):
        super().__init__()
        self.loop = Loop(arm, lambda: LinearStep(dimensions), 1)

    def forward(self, x, y, count):
        """Yield predictions (B,) after 1 to `count` repetitions."""
        for rest in self.loop(_hidden(y), count, x):
            yield -rest[:, -1, 0]


class Softmax(nn.Module):
    """Tokens of input and value enter by a linear map, and the query leaves by one."""

    def __init__(self, arm, dimensions, wider=0):
        super().__init__()
        self.enter = nn.Linear(dimensions + 1, WIDTH)
        self.loop = Loop(arm, lambda: SoftmaxBlock(wider), WIDTH)
        self.leave = nn.Sequential(RMSNorm(WIDTH), nn.Linear(WIDTH, 1))

    def forward(self, x, y, count):
        """Yield predictions (B,) after 1 to `count` repetitions."""
        for h in self.loop(self.enter(torch.cat([x, _hidden(y)], -1)), count):
            yield self.leave(h[:, -1])[:, 0]


def _hidden(y):
    return torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], 1)


@dataclass
class Task:
    """A kind of network and problem, the difficulties, the size, and the training."""

    network: type
    problems: Callable
    level: str
    levels: tuple
    dimensions: int
    points: int
    steps: int
    rate: float


TASKS = {
    "linear": Task(Linear, regressions, " κ=", (10, 100), 8, 32, steps=800, rate=3e-3),
    "softmax": Task(Softmax, regressions, " κ=", (10, 100), 4, 16, steps=2000, rate=2e-3),
    "path": Task(Softmax, paths, " ", (4, 8), 8, 16, steps=2000, rate=2e-3),
}
BATCH_SIZE = 64


def build(kind, arm, seed):
    """The network of an arm, with the parameters of `velocity` as near as an MLP allows."""
    network, size = TASKS[kind].network, TASKS[kind].dimensions
    # A block of its own per repetition has the width of the shared one in `plain`.
    like = "plain" if arm == "unshared" else arm
    wanted, plain, one = (
        parameters(network(name, size, wider))
        for name, wider in (("velocity", 0), (like, 0), (like, 1))
    )
    wider = round((wanted - plain) / (one - plain)) if one > plain else 0
    torch.manual_seed(seed)
    return network(arm, size, wider)


def run(kind, level, arm, seed):
    """Train one network and return its metrics."""
    task, model = TASKS[kind], build(kind, arm, seed)

    def drawn(batch, generator, training=False):
        return task.problems(level, task.dimensions, task.points, batch, generator, training)

    optimizer = torch.optim.Adam(model.parameters(), lr=task.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, task.steps, pct_start=0.1)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(task.steps):
        x, y = drawn(BATCH_SIZE, generator, training=True)
        *_, last = model(x, y, LOOPS)
        loss = nn.functional.mse_loss(last, y[:, -1, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    x, y = drawn(1024, torch.Generator().manual_seed(10_000))
    with torch.no_grad():
        errors = []
        for out in model(x, y, LONGEST if kind == "linear" else MEASURED[-1]):
            errors.append(float((out - y[:, -1, 0]).square().mean()))
            if len(errors) >= MEASURED[-1] and errors[-1] <= SOLVED:
                break
        with FlopCounterMode(display=False) as counter:
            *_, _ = model(x[:1], y[:1], LOOPS)
    result = {f"error, {k} loops": (errors[k - 1], "") for k in MEASURED}
    if kind == "linear":
        reached = (k for k, error in enumerate(errors, 1) if error <= SOLVED)
        result["loops to solve"] = (float(next(reached, math.inf)), "")
    if hasattr(model.loop.arm, "dynamics"):
        dynamics = model.loop.arm.dynamics
        for name in ("alpha", "beta", "gate"):
            if (value := getattr(dynamics, name)) is not None:
                result[name] = (value.clamp(0, 1).mean().item(), "")
    result["parameters"] = (parameters(model), "")
    result["forward"] = (counter.get_total_flops() / 1e6, "MFLOP")
    result["training"] = (seconds, "s")
    return result


def main():
    """Run what has no rows yet, print the table of all rows, and draw the figure if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this")
    parser.add_argument("--rows", help="CSV to add the rows to; runs that it has are skipped")
    parser.add_argument("--figure", help="PNG of the error over the repetitions")
    options = parser.parse_args()
    known = known_of(row for row in read_rows(options.rows or "") if row["bench"] == "loops")
    cases = [
        (
            f"{kind}{TASKS[kind].level}{level} / {arm} / seed {seed}",
            (kind, level, arm, seed),
            {"shape": f"{TASKS[kind].steps} steps of {BATCH_SIZE}"},
        )
        for seed in range(options.seeds)
        for kind in options.tasks
        for level in TASKS[kind].levels
        for arm in options.arms
        if (kind, arm) != ("linear", "recall")
    ]
    command = "python -m benchmarks.study.loops --rows benchmarks/results.csv"
    run_missing("loops", run, cases, known, options, command, "cpu")
    print("\n".join(curves(known)))
    if options.figure:
        draw(known, options.figure)


if __name__ == "__main__":
    main()
