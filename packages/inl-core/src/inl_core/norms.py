"""RMS norm modules: `RMSNorm` with a weight, `ModulatedRMSNorm` with shift and scale per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inl_core import ops


def _check(hidden_size: int, eps: float) -> None:
    if hidden_size < 1:
        raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


class RMSNorm(nn.Module):
    """Root-mean-square norm x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich, 2019).

    Args:
        hidden_size: Size D of the last dimension.
        eps: Added to the mean square; default 1e-6.
        elementwise_affine: Whether to learn a weight (D,), starting at 1.

    Raises:
        ValueError: If hidden_size is below 1 or eps is negative.
    """

    weight: nn.Parameter | None

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, elementwise_affine: bool = True
    ) -> None:
        super().__init__()
        _check(hidden_size, eps)
        self.hidden_size = hidden_size
        self.eps = eps
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(hidden_size))
        else:
            self.register_parameter("weight", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., D); the result has its shape and dtype."""
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Settings shown by ``print(module)``."""
        return f"{self.hidden_size}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class ModulatedRMSNorm(nn.Module):
    """rms_norm(x) * (1 + scale) + shift, with shift and scale per sample (AdaLN; DiT, 2022).

    It has no weight: the scale takes its place.

    Args:
        hidden_size: Size D of the last dimension.
        eps: Added to the mean square; default 1e-6.

    Raises:
        ValueError: If hidden_size is below 1 or eps is negative.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        _check(hidden_size, eps)
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalise `x` (B, N, D) and modulate it by `shift` and `scale`, both (B, D)."""
        return ops.modulated_rms_norm(x, shift, scale, eps=self.eps)

    def extra_repr(self) -> str:
        """Settings shown by ``print(module)``."""
        return f"{self.hidden_size}, eps={self.eps}"
