"""Operations around the dynamics in a layer: norms, gated sums, rotary embedding, activation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from inl_core.reference.bounds import compute_dtype


def normalise(x_wide: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm of `x_wide` in its compute dtype, not rounded back."""
    normed = x_wide * torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight.to(x_wide.dtype)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Give `value` (B, D) the rank of `x` (B, ..., D), so that it broadcasts over the tokens."""
    missing = (1,) * (x.ndim - value.ndim)
    return value.reshape(*value.shape[:-1], *missing, value.shape[-1])


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm x / sqrt(mean(x²) + eps) * weight over the last dimension.

    The weight multiplies after the normalisation, so with r = rsqrt(mean(x²) + eps) the gradient
    is dx = r * (w·dy - x * r² * mean(x·w·dy)): the weight belongs inside the bracket.

    Args:
        x: (..., D).
        weight: (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        Tensor shaped like `x`, in its dtype.
    """
    dtype = compute_dtype(x, weight)
    return normalise(x.to(dtype), weight, eps).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the sum, as one operation.

    Args:
        x: Sub-layer output (..., D).
        residual: Residual stream, shaped like `x`.
        weight: (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        (rms_norm(x + residual) in the dtype of `x`, x + residual in the dtype of `residual`). The
        norm is computed from the sum before rounding.
    """
    dtype = compute_dtype(x, residual, weight)
    total = x.to(dtype) + residual.to(dtype)
    return normalise(total, weight, eps).to(x.dtype), total.to(residual.dtype)


def modulated_rms_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """rms_norm(x) * (1 + scale) + shift, with shift and scale per sample (AdaLN; DiT, 2022).

    Args:
        x: (B, ..., D), usually (B, N, D).
        shift: (B, D), broadcast over the tokens.
        scale: (B, D), likewise.
        weight: (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        Tensor shaped like `x`, in its dtype.
    """
    dtype = compute_dtype(x, shift, scale, weight)
    normed = normalise(x.to(dtype), weight, eps)
    scale_wide, shift_wide = per_sample(scale, x).to(dtype), per_sample(shift, x).to(dtype)
    return (normed * (1.0 + scale_wide) + shift_wide).to(x.dtype)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Residual + gate * x, with one gate vector per sample.

    Args:
        residual: (B, ..., D).
        x: Shaped like `residual`.
        gate: (B, D), broadcast over the tokens.

    Returns:
        Tensor shaped like `residual`, in its dtype.
    """
    dtype = compute_dtype(residual, x, gate)
    gated = per_sample(gate, residual).to(dtype) * x.to(dtype)
    return (residual.to(dtype) + gated).to(residual.dtype)


def gated_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, then `modulated_rms_norm` of the sum, as one operation.

    Args:
        residual: Residual stream (B, ..., D).
        x: Sub-layer output, shaped like `residual`.
        gate: (B, D), broadcast over the tokens.
        shift: (B, D), likewise.
        scale: (B, D), likewise.
        weight: (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        (the normed and modulated sum in the dtype of `x`, residual + gate * x in the dtype of
        `residual`). The norm is computed from the sum before rounding.
    """
    dtype = compute_dtype(residual, x, gate, shift, scale, weight)
    total = residual.to(dtype) + per_sample(gate, residual).to(dtype) * x.to(dtype)
    normed = modulated_rms_norm(total, shift, scale, weight, eps)
    return normed.to(x.dtype), total.to(residual.dtype)


def _rotate(x_wide: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_wide.shape[-1] // 2
    if x_wide.shape[-1] != 2 * cos.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            f"head_dim {x_wide.shape[-1]} needs cos and sin of {half} angles per token, "
            f"got shapes {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    cos, sin = cos.to(x_wide.dtype).unsqueeze(-2), sin.to(x_wide.dtype).unsqueeze(-2)
    first, second = x_wide[..., :half], x_wide[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + Dh/2) by the given angles (the half-split convention).

    Args:
        x: (B, N, H, Dh).
        cos: Cosines (N, Dh/2), or (B, N, Dh/2).
        sin: Sines, shaped like `cos`.

    Returns:
        Tensor shaped like `x`, in its dtype.

    Raises:
        ValueError: If the last dimensions do not fit.
    """
    dtype = compute_dtype(x, cos, sin)
    return _rotate(x.to(dtype), cos, sin).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMS-normalise every query and key head, then rotate both: `rms_norm`, then `rotate`.

    Args:
        q: Queries (B, N, H, Dh).
        k: Keys (B, N, Hk, Dh); Hk may differ from H (grouped-query attention).
        q_weight: (Dh,), or None for ones.
        k_weight: (Dh,), or None for ones.
        cos: Cosines (N, Dh/2), or (B, N, Dh/2).
        sin: Sines, shaped like `cos`.
        eps: Added to the mean square.

    Returns:
        (q, k), shapes and dtypes kept.
    """
    dtype = compute_dtype(q, k, q_weight, k_weight, cos, sin)
    q_out = _rotate(normalise(q.to(dtype), q_weight, eps), cos, sin)
    k_out = _rotate(normalise(k.to(dtype), k_weight, eps), cos, sin)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020).

    Args:
        gate: Any shape.
        up: Shaped like `gate`.

    Returns:
        Tensor shaped like `gate`, in its dtype.
    """
    dtype = compute_dtype(gate, up)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, softmax(scale · q kᵀ + mask) v (Vaswani et al., 2017).

    Args:
        q: Queries (B, H, N, Dh).
        k: Keys (B, Hk, M, Dh); H is a multiple of Hk (grouped-query attention), and query head h
            uses key head h // (H / Hk).
        v: Values (B, Hk, M, Dv).
        mask: Boolean, True where a query may attend, or a tensor added to the scores; it must
            broadcast to (B, H, N, M). None for none.
        causal: Whether query i may attend to the keys up to M - N + i only: the last query sees all
            keys, as in decoding with a cache.
        scale: Factor of the scores; None means 1 / sqrt(Dh).

    Returns:
        (B, H, N, Dv) in the dtype of `q`; zeros for a query that may attend to no key.

    Raises:
        ValueError: If the heads do not fit.
    """
    groups, dtype = query_groups(q, k), compute_dtype(q, k, v)
    k_wide = k.to(dtype).repeat_interleave(groups, dim=1)
    v_wide = v.to(dtype).repeat_interleave(groups, dim=1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.to(dtype) @ k_wide.mT) * factor
    if causal:
        scores = scores.masked_fill(~causal_mask(q, k), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return (weights @ v_wide).to(q.dtype)


def query_groups(q: Tensor, k: Tensor) -> int:
    """How many query heads of `attention` share a key head; ValueError if that is no number."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} key heads")
    return heads // kv_heads


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """The boolean mask (N, M) of `attention` with ``causal=True``."""
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
