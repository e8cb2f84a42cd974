"""The manners of repeating a block, for a loop of its own or in place of the one of a model.

`loops` lists them. Each adds the output f of the block to the state in its own way.
"""

import torch
from torch import nn

from inl_core import LoopedDynamics, RMSNorm
from inl_core.looped import LoopState

DYNAMICS = ("no carry", "velocity", "spring")
"""Arms with `LoopedDynamics`."""


class LoopArm(nn.Module):
    """A loop in the manner of an arm.

    Args:
        arm: One of `loops_report.ARMS`; `plain` and `unshared` have no weights of their own.
        width: Channels of the state.
        loops: Repetitions in training.
    """

    def __init__(self, arm, width, loops):
        super().__init__()
        self.arm, self.loops = arm, loops
        if arm == "step sizes":
            self.steps = nn.Parameter(torch.ones(loops))
        elif arm == "damped":
            self.decay = nn.Parameter(torch.full((width,), 4.0))
            self.input = nn.Parameter(torch.full((width,), 0.02))
        elif arm == "recall":
            self.recall, self.norm = nn.Linear(width, width, bias=False), RMSNorm(width)
        elif arm == "momentum":
            self.alpha = nn.Parameter(torch.full((1,), 0.5))
        elif arm in DYNAMICS:
            self.dynamics = LoopedDynamics(width, spring=arm == "spring")

    def forward(self, block, x, count):
        """Yield the state after 1 to `count` repetitions of `block`, a function of the state."""
        h, v = x, None
        mu = self.dynamics.equilibrium(x) if self.arm in DYNAMICS else None
        for k in range(count):
            f = block(h + self.recall(x) if self.arm == "recall" else h)
            match self.arm:
                case "1/N":
                    h = h + f / self.loops
                case "step sizes":
                    h = h + self.steps[min(k, self.loops - 1)] * f
                case "damped":
                    h = self.decay.sigmoid() * h + self.input * x + f
                case "recall":
                    h = self.norm(h + f)
                case "momentum":
                    v = f if v is None else self.alpha * v + f
                    h = h + v
                case "no carry":
                    h, _ = self.dynamics(h, None, f, mu)
                case "velocity" | "spring":
                    h, v = self.dynamics(h, v, f, mu)
                case _:
                    h = h + f
            yield h

    def loop(self, block, x, num_loops, v=None, tolerance=None, sample_dims=1):
        """As `LoopedDynamics.loop`, for the models, without a velocity and an early exit."""
        if v is not None or tolerance is not None:
            raise ValueError("the arms of a study begin at rest and compute all repetitions")
        other = None

        def force(h):
            nonlocal other
            f, other = block(h)
            return f

        *_, h = self(force, x, num_loops)
        return LoopState(h, None, num_loops, other)
