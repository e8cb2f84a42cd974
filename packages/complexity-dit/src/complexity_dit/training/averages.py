"""Averages of the weights whose length is chosen after training (Karras et al., arXiv 2312.02696).

A power-function average at step t weighs the weights of step s by s^gamma. Its length is the
standard deviation of that profile, relative to t. A run keeps a few of them (`ema.lengths`) and
writes snapshots; the average of any other length is a combination of these, found by least squares
between the profiles.

    RUN/averages/step-00001000/averages.safetensors    tensors "LENGTH/PARAMETER" of a step
    RUN/averages/step-00001000/SHA256SUMS
    RUN/checkpoints/step-00001000/averages.safetensors  the same, to resume from
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from torch import nn

AVERAGES_FILE = "averages.safetensors"
AVERAGES_FOLDER = "averages"


def tensor_name(length: float, parameter: str) -> str:
    """The name in a file of a parameter averaged over a length."""
    return f"{float(length)!r}/{parameter}"


def split_name(name: str) -> tuple[float, str]:
    """Length and parameter of the name of a tensor in a file."""
    length, _, parameter = name.partition("/")
    return float(length), parameter


def exponent_of(length: float) -> float:
    """The exponent gamma of a length, in (0, 0.288): length² = (γ + 1) / ((γ + 2)² (γ + 3))."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA(EMAModel):
    """A power-function average of a length: at step t the decay is (1 - 1/t)^(gamma + 1)."""

    def __init__(self, parameters: Iterable[nn.Parameter], length: float) -> None:
        super().__init__(parameters, foreach=True)
        self.exponent = exponent_of(length)

    def get_decay(self, optimization_step: int) -> float:
        return (1 - 1 / optimization_step) ** (self.exponent + 1)


def overlap(
    step_a: NDArray[np.float64], a: NDArray[np.float64], step_b: Any, b: Any
) -> NDArray[np.float64]:
    """Inner products of profiles, (A, B): those at steps (A,) with exponents (A,), and (B,).

    The profile (γ + 1) s^γ / t^(γ + 1) on [0, t] has mass 1 and, for steps as unit intervals, the
    weights of `PowerEMA` exactly.
    """
    step_a, a = step_a[:, None], a[:, None]
    low, product = np.minimum(step_a, step_b), (a + 1) * (b + 1) / (a + b + 1)
    return product * (low / step_a) ** a * (low / step_b) ** b * low / (step_a * step_b)


def coefficients(
    snapshots: Sequence[tuple[int, float]], step: int, length: float
) -> tuple[NDArray[np.float64], float]:
    """How to combine snapshots, each a step and a length, to the average of a length at a step.

    Returns:
        Coefficients, (N,), of sum 1, so that weights that never changed stay what they are; and the
        error of the profile, relative to its norm.
    """
    # Steps relative to the last one, so that all inner products are of the size of 1.
    steps = np.array([s / step for s, _ in snapshots])
    exponents = np.array([exponent_of(kept) for _, kept in snapshots])
    wanted = np.array([exponent_of(length)])
    gram = overlap(steps, exponents, steps, exponents)
    target = overlap(steps, exponents, 1.0, wanted)[:, 0]
    norm = float(overlap(np.ones(1), wanted, 1.0, wanted)[0, 0])
    ones = np.ones((len(steps), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])  # with a Lagrange multiplier
    solution = np.linalg.lstsq(system, np.append(target, 1.0))[0]
    found = np.asarray(solution[:-1], np.float64)
    square = found @ gram @ found - 2 * found @ target + norm
    return found, float(np.sqrt(max(0.0, square) / norm))
