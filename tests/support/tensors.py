"""Seeded tensors and parameters for tests of inl-core."""

import torch
from torch import Tensor, nn

from inl_core import INLDynamics, ops


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, drawn in fp64 and rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def randn64(*shape: int, seed: int = 0) -> Tensor:
    """`randn` in fp64."""
    return randn(*shape, seed=seed, dtype=torch.float64)


def scramble(module: nn.Module) -> None:
    """Set random parameters, so that no error is hidden by zeros."""
    for index, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(0.3 * randn(*parameter.shape, seed=100 + index))


def coefficients(module: INLDynamics, h: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
    """Activated coefficients (alpha, beta, gate) that `module` uses for a state."""
    return ops.inl_coefficients(*module._coefficients(h, v), beta_max=module.beta_max)
