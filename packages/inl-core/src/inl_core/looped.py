"""Second-order dynamics for a block that is applied several times with the same weights.

A loop repeats one block. Its output is the force f of equation (2), and the velocity is carried
from one repetition to the next:

    v_k = clip(alpha * v_{k-1} - beta * (h_{k-1} - mu) + f(h_{k-1}), -velocity_max, velocity_max)
    h_k = h_{k-1} + dt * gate * v_k

With beta = 0 this is Polyak's heavy ball around the plain loop h + f(h), which is alpha = 0: on a
quadratic problem of condition number kappa it needs of the order of sqrt(kappa) repetitions where
the plain loop needs kappa (Polyak, USSR Comput. Math. Math. Phys. 4(5), 1964). That is the default.
A spring can be added, which pulls towards mu, the input of the loop. It helps at the number of
repetitions that it was trained at, and hurts beyond it (docs/results/tables/loops.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from inl_core import ops
from inl_core.dynamics import Dynamics, _block_outside, _ceiling, _linear, idle_too

LoopSampling = Literal["fixed", "uniform", "poisson"]
"""How the repetitions of a training step are chosen; see `draw_num_loops`."""


def draw_num_loops(mean: int, sampling: LoopSampling, seed: int, step: int) -> int:
    """Repetitions of a training step, the same in every process and after every resume.

    Args:
        mean: Mean of the number, 1 to 500.
        sampling: "fixed" is the mean itself, "uniform" a number from 1 to 2 mean - 1, "poisson" 1
            plus a Poisson number.
        seed: Seed of the run.
        step: Number of the step.

    Raises:
        ValueError: If `mean` is out of range or the sampling is unknown.
    """
    if not 1 <= mean <= 500:
        raise ValueError(f"the mean number of repetitions must lie in [1, 500], got {mean}")
    share = random.Random(f"{seed} {step} num_loops").random()
    if sampling == "uniform":
        return 1 + int(share * (2 * mean - 1))
    if sampling == "poisson":
        count, chance = 0, math.exp(1 - mean)
        while share >= chance > 0.0:
            share -= chance
            count += 1
            chance *= (mean - 1) / count
        return 1 + count
    if sampling != "fixed":
        raise ValueError(f"unknown sampling {sampling!r}: fixed, uniform or poisson")
    return mean


class LoopState(NamedTuple):
    """What a loop returns.

    Attributes:
        h: Position after the last repetition (..., D).
        v: Velocity, shaped like `h`; None after zero repetitions that began without one.
        num_loops: Repetitions that were computed.
        other: What the block returned beside the force at the last repetition of each sample.
    """

    h: Tensor
    v: Tensor | None
    num_loops: int
    other: Tensor | None = None


class _Projection(nn.Module):
    """A square matrix that starts as the identity.

    Called as a module, so that hooks (of offloading, for one) bring its weight; and no
    ``nn.Linear``, so that a parent that re-initialises those cannot reset it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight)


class LoopedDynamics(Dynamics):
    """Coefficients per channel for a block that is applied several times; see the module.

    The coefficients are learned directly and clamped to their bounds, so that they start, and may
    stay, at exactly 0 or 1. Beyond a bound a gradient passes if it leads back inside.

    Args:
        hidden_size: Channels D.
        init_alpha: Initial inertia, in [0, 1]. 0 starts as the plain loop; the best constant value
            for condition number kappa is ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))².
        init_gate: Initial gate, in [0, 1].
        dt: Time step.
        velocity_max: Bound of each velocity; None for none. The position uses the clipped one.
        spring: Whether a spring of learned strength beta pulls towards the equilibrium. Without it
            beta is 0 and the three arguments below have no effect.
        init_beta: Initial strength of the spring, in [0, beta_max].
        beta_max: Upper bound of beta; None for none.
        learn_equilibrium: Whether the equilibrium is a learned projection of the input, which
            starts as the identity; False takes the input itself.

    Attributes:
        equilibrium: Module that makes the equilibrium (..., D) of a loop from its input (..., D),
            once for all repetitions; without a spring the input itself.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        hidden_size: int,
        init_alpha: float = 0.5,
        init_gate: float = 1.0,
        dt: float = 1.0,
        velocity_max: float | None = 10.0,
        spring: bool = False,
        init_beta: float = 0.0,
        beta_max: float | None = 2.0,
        learn_equilibrium: bool = True,
    ) -> None:
        super().__init__(hidden_size, dt, velocity_max)
        for name, value, top in (
            ("init_alpha", init_alpha, 1.0), ("init_beta", init_beta, _ceiling(beta_max)),
            ("init_gate", init_gate, 1.0),
        ):  # fmt: skip
            if not (0.0 <= value <= top and math.isfinite(value)):
                raise ValueError(f"{name} must lie in [0, {top:g}], got {value}")
        self.init_alpha = init_alpha
        self.init_beta = init_beta
        self.init_gate = init_gate
        self.beta_max = beta_max
        self.alpha = nn.Parameter(torch.empty(hidden_size))
        self.beta = nn.Parameter(torch.empty(hidden_size)) if spring else None
        self.gate = nn.Parameter(torch.empty(hidden_size))
        learned = spring and learn_equilibrium
        self.equilibrium = _Projection(hidden_size) if learned else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset every parameter: exactly the initial coefficients, the input as equilibrium."""
        nn.init.constant_(self.alpha, self.init_alpha)
        if self.beta is not None:
            nn.init.constant_(self.beta, self.init_beta)
        nn.init.constant_(self.gate, self.init_gate)
        for weight in self.equilibrium.parameters():
            nn.init.eye_(weight)

    def forward(
        self, h: Tensor, v: Tensor | None, force: Tensor | None, equilibrium: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advance the state by one repetition.

        Args:
            h: Position (..., D).
            v: Velocity, shaped like `h`; None means zero.
            force: Output of the block, shaped like `h`; None means zero.
            equilibrium: From `equilibrium`, shaped like `h`.

        Returns:
            (h_next, v_next): h_next in the dtype of `h`, v_next in the dtype of `v` (of `h` if v is
            None).

        Raises:
            ValueError: If a shape does not fit.
        """
        self._check_inputs(h, v, force)
        if equilibrium.shape != h.shape:
            raise ValueError(
                f"equilibrium has shape {tuple(equilibrium.shape)}, expected that of h, "
                f"{tuple(h.shape)}"
            )
        alpha, gate = self._inside(self.alpha, 0.0, 1.0), self._inside(self.gate, 0.0, 1.0)
        beta = None if self.beta is None else self._inside(self.beta, 0.0, self.beta_max)
        if v is None:
            gate = idle_too(gate, self.alpha)
        h_next, v_next = ops.looped_step(
            h, v, alpha, beta, gate, equilibrium, force,
            dt=self.dt, beta_max=self.beta_max, velocity_max=self.velocity_max,
        )  # fmt: skip
        if not torch.compiler.is_compiling() and self._collecting:
            with torch.no_grad():
                pull = torch.zeros_like(alpha) if beta is None else beta.clamp(min=0.0)
                coefficients = alpha.clamp(0.0, 1.0), pull, gate.clamp(0.0, 1.0)
            self._record(*coefficients, self.beta_max, v_next)
        return h_next, v_next

    def loop(
        self,
        block: Callable[[Tensor], Tensor | tuple[Tensor, Tensor | None]],
        x: Tensor,
        num_loops: int,
        v: Tensor | None = None,
        tolerance: float | None = None,
        sample_dims: int = 1,
    ) -> LoopState:
        """Apply `block` repeatedly, starting at its input `x`.

        Args:
            block: Function of the position (B, ..., D) that returns the force, shaped like it; or
                the force and another tensor (B, ...), which the next repetition does not see.
            x: Input of the loop (B, ..., D): first position, and the source of the equilibrium.
            num_loops: Repetitions, at least 0. With a tolerance the most that are computed.
            v: First velocity, shaped like `x`; None means zero.
            tolerance: None computes `num_loops` repetitions. Else a sample keeps its state after
                the first repetition whose velocity, and whose change of velocity, is at most this
                share of the norm of the position, each over all elements of the sample; the loop
                ends when all samples have stopped. The result of a sample does not depend on the
                others. For inference: the check waits for the device, and the compiler breaks the
                graph at it.
            sample_dims: Leading dimensions of `x` that count samples: 2 stops each token (B, N) of
                a causal model by itself.

        Returns:
            Position, velocity, the number of repetitions, and what the block returned last.

        Raises:
            ValueError: If `num_loops` is negative, `tolerance` is not positive, or a shape does not
                fit.
        """
        if num_loops < 0:
            raise ValueError(f"num_loops must be at least 0, got {num_loops}")
        if tolerance is not None and not tolerance > 0.0:
            raise ValueError(f"tolerance must be positive, or None, got {tolerance}")
        h, mu, other = x, self.equilibrium(x), None
        moving = torch.ones(x.shape[:sample_dims], dtype=torch.bool, device=x.device)
        for done in range(num_loops):
            out = block(h)
            force, new = out if isinstance(out, tuple) else (out, None)
            h_next, v_next = self(h, v, force, mu)
            if tolerance is None:
                h, v, other = h_next, v_next, new
                continue
            before = torch.zeros_like(v_next) if v is None else v
            h, v = _choose(moving, h_next, h), _choose(moving, v_next, before)
            other = new if other is None or new is None else _choose(moving, new, other)
            # First and second difference of the positions, but for dt and the gate. The first
            # alone is small where an oscillation turns, the second alone in a steady drift.
            first, second, size = (
                x.float().flatten(sample_dims).norm(dim=-1) for x in (v, v - before, h)
            )
            moving = moving & ~(torch.maximum(first, second) <= tolerance * size)
            if not bool(moving.any()):
                return LoopState(h, v, done + 1, other)
        return LoopState(h, v, num_loops, other)

    def _apply_bounds(self) -> None:
        _block_outside(self.alpha, 0.0, 1.0)
        if self.beta is not None:
            _block_outside(self.beta, 0.0, self.beta_max)
        _block_outside(self.gate, 0.0, 1.0)

    def extra_repr(self) -> str:
        """Settings shown by ``print(module)``."""
        return (
            f"{self.hidden_size}, init_alpha={self.init_alpha}, init_gate={self.init_gate}, "
            f"dt={self.dt}, velocity_max={self.velocity_max}"
        ) + (
            f", init_beta={self.init_beta}, beta_max={self.beta_max}"
            if self.beta is not None
            else ""
        )


def _choose(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the samples `where` it is True, else `old`."""
    return torch.where(where.view(*where.shape, *[1] * (new.ndim - where.ndim)), new, old)
