"""RMS norm modules: `RMSNorm` with a weight, `ModulatedRMSNorm` with shift and scale per sample.

Fused operations take the weight of a norm as a tensor and so do not call the norm. Offloading,
PEFT, parametrisations and the hooks of users act where a module is called: `is_plain` says whether
there are any, and `norm_and_rotate` calls the norms then.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from inl_core import ops
from inl_core.reference.bounds import compute_dtype


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


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether an operation may take the weights of `module` instead of calling it.

    True for a module of exactly one of `classes` that has no hooks and whose forward is not
    replaced. accelerate and diffusers replace it where they offload; parametrisations and sharding
    replace the class.
    """
    return (
        type(module) in classes
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
    )


def norm_and_rotate(
    q: Tensor, k: Tensor, q_norm: nn.Module, k_norm: nn.Module, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalise every query and key head and rotate both, as `ops.qk_norm_rope`.

    One operation if both norms are plain `RMSNorm` of the same eps. Else they are called, in fp32
    (fp64 for fp64), with the same bits in fp32, and in other dtypes on the backend "reference".

    Args:
        q: Queries (B, N, H, Dh).
        k: Keys (B, N, Hk, Dh); Hk may differ from H.
        q_norm: Norm of the queries over Dh: an `RMSNorm`, or what wraps or replaces it.
        k_norm: Norm of the keys, likewise.
        cos: Cosines (N, Dh/2), or (B, N, Dh/2).
        sin: Sines, shaped like `cos`.

    Returns:
        (q, k), shapes and dtypes kept.
    """
    plain = is_plain(q_norm, RMSNorm) and is_plain(k_norm, RMSNorm) and q_norm.eps == k_norm.eps
    if plain:
        q_weight, k_weight = cast(RMSNorm, q_norm).weight, cast(RMSNorm, k_norm).weight
        return ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, cast(RMSNorm, q_norm).eps)
    dtype = compute_dtype(q, k, cos, sin)
    q_out, k_out = (
        ops.rotate(norm(x.to(dtype)), cos, sin) for norm, x in ((q_norm, q), (k_norm, k))
    )
    return q_out.to(q.dtype), k_out.to(k.dtype)
