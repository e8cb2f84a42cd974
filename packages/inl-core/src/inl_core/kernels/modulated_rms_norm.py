"""RMS norm with a shift and a scale per sample (AdaLN) in Triton.

With n = x · rsqrt(mean(x²) + eps) and m = (1 + scale) · w, for each row of a sample:

    y  = n · m + shift
    dx = r · (m·dy − n · mean(n·m·dy))
    dshift = Σ_tokens dy     S = Σ_tokens dy · n
    dscale = w · S           dw = Σ_samples (1 + scale) · S

A program of the backward loops over tokens of one sample and keeps partial sums, which are added up
afterwards in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inl_core.kernels import _common
from inl_core.kernels._common import load, store
from inl_core.kernels.rms_norm import WARPS_PER_PROCESSOR, inverse_rms, norm_gradient

__all__ = ["modulated_rms_norm", "modulated_rms_norm_bwd", "modulated_rms_norm_fwd"]


@triton.jit
def modulation(weight_ptr, scale_row, column, D: tl.constexpr):
    """(1 + scale) · w of one sample, as a row; `scale_row` points to the sample's first channel."""
    factor = 1.0 + load(scale_row + column, column < D)
    if weight_ptr is not None:
        factor *= load(weight_ptr + column, column < D)
    return factor


@triton.jit
def _forward(
    x_ptr, shift_ptr, scale_ptr, weight_ptr, y_ptr,
    tokens, blocks, x_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    row = sample * tokens + token
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < tokens) & (column < D)
    factor = modulation(weight_ptr, scale_ptr + sample * scale_stride, column, D)
    shift = load(shift_ptr + sample * shift_stride + column, column < D)
    x = load(x_ptr + row * x_stride + column, mask)
    y = x * inverse_rms(x, token < tokens, eps, D) * factor + shift
    store(y_ptr + row * D + column, y, mask)


@triton.jit
def _backward(
    dy_ptr, x_ptr, scale_ptr, weight_ptr, dx_ptr, dshift_ptr, sums_ptr,
    tokens, parts, dy_stride, x_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    factor = modulation(weight_ptr, scale_ptr + sample * scale_stride, column, D)
    dshift = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for block in range(tl.program_id(0) % parts, tl.cdiv(tokens, BLOCK_R), parts):
        token = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = sample * tokens + token
        mask = (token < tokens) & (column < D)
        x = load(x_ptr + row * x_stride + column, mask)
        dy = load(dy_ptr + row * dy_stride + column, mask)
        r = inverse_rms(x, token < tokens, eps, D)
        normed = x * r
        dshift += dy
        sums += dy * normed
        store(dx_ptr + row * D + column, norm_gradient(normed, r, dy * factor, D), mask)
    part = tl.program_id(0).to(tl.int64) * D + column
    store(dshift_ptr + part, tl.sum(dshift, axis=0, keep_dims=True), column < D)
    store(sums_ptr + part, tl.sum(sums, axis=0, keep_dims=True), column < D)


def sample_blocks(tokens: int, width: int) -> tuple[int, int, int, int]:
    """Launch sizes for samples of `tokens` >= 1 rows of size `width`.

    Returns:
        (blocks per sample, BLOCK_R, BLOCK_D, num_warps); a block never spans two samples.
    """
    block_r, block_d, _ = _common.row_config(width)
    block_r = min(block_r, triton.next_power_of_2(tokens))
    warps = min(16, max(1, block_r * block_d // 256))
    return triton.cdiv(tokens, block_r), block_r, block_d, warps


def parts_of(x: Tensor, samples: int, blocks: int, warps: int) -> int:
    """Programs per sample of a backward: one wave on the device of `x`, in 1 … `blocks`.

    Args:
        x: A tensor of the launch.
        samples: Number of samples.
        blocks: Blocks of tokens per sample.
        warps: Warps per program.
    """
    wave = _common.num_programs(x, samples * blocks, max(1, WARPS_PER_PROCESSOR // warps))
    return max(1, min(blocks, wave // samples))


def sum_parts(partials: Tensor, like: Tensor) -> Tensor:
    """Sum (samples, parts, D) over the parts; shaped like `like`, in fp32."""
    total = partials if partials.shape[1] == 1 else partials.sum(1)
    return total.reshape(like.shape)


@torch.library.custom_op("inl_core::modulated_rms_norm_fwd", mutates_args=())
def modulated_rms_norm_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """Launch the forward kernel; `modulated_rms_norm` checks and shapes the arguments."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    x_rows, shift_rows, scale_rows = (_common.as_rows(t) for t in (x, shift, scale))
    samples, width = shift_rows.shape
    tokens = x_rows.shape[0] // samples
    blocks, block_r, block_d, warps = sample_blocks(tokens, width)
    with _common.launch_guard(x):
        _forward[(samples * blocks,)](
            x_rows, shift_rows, scale_rows, _common.contiguous(weight), y,
            tokens, blocks, x_rows.stride(0), shift_rows.stride(0), scale_rows.stride(0), eps,
            D=width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return y


@modulated_rms_norm_fwd.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("inl_core::modulated_rms_norm_bwd", mutates_args=())
def modulated_rms_norm_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel: (dx, dshift, S), the sums over tokens in fp32."""
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        zeros = torch.zeros(scale.shape, dtype=torch.float32, device=x.device)
        return dx, zeros, zeros.clone()
    x_rows, dy_rows, scale_rows = (_common.as_rows(t) for t in (x, dy, scale))
    samples, width = scale_rows.shape
    tokens = x_rows.shape[0] // samples
    blocks, block_r, block_d, warps = sample_blocks(tokens, width)
    parts = parts_of(x, samples, blocks, warps)
    dshift = torch.empty(samples, parts, width, dtype=torch.float32, device=x.device)
    sums = torch.empty_like(dshift)
    with _common.launch_guard(x):
        _backward[(samples * parts,)](
            dy_rows, x_rows, scale_rows, _common.contiguous(weight),
            dx, dshift, sums,
            tokens, parts, dy_rows.stride(0), x_rows.stride(0), scale_rows.stride(0), eps,
            D=width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return dx, sum_parts(dshift, scale), sum_parts(sums, scale)


@modulated_rms_norm_bwd.register_fake
def _(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty(scale.shape, dtype=torch.float32, device=x.device)
    return x.new_empty(x.shape), sums, torch.empty_like(sums)


def modulation_gradients(
    sums: Tensor, scale: Tensor, weight: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dscale, dweight) from S = Σ_tokens dy · n; dweight is None if not needed.

    Plain tensor operations on (B, D): the compiler fuses them with what computes the scale.
    """
    dscale = sums if weight is None else sums * weight.float()
    if weight is None or not need_dweight:
        return dscale.to(scale.dtype), None
    dweight = ((1.0 + scale.float()) * sums).reshape(-1, weight.shape[0]).sum(0)
    return dscale.to(scale.dtype), dweight.to(weight.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, weight, ctx.eps = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
    x, scale, weight = ctx.saved_tensors
    dx, dshift, sums = modulated_rms_norm_bwd(dy, x, scale, weight, ctx.eps)
    dscale, dweight = modulation_gradients(sums, scale, weight, ctx.needs_input_grad[3])
    return dx, dshift.to(ctx.shift_dtype), dscale, dweight, None


modulated_rms_norm_fwd.register_autograd(_gradients, setup_context=_setup_context)


def modulated_rms_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """`inl_core.reference.modulated_rms_norm` as one kernel forward and one backward.

    `x` (B, ..., D) is fp32, bf16 or fp16, D at most 16384; shift and scale may have other dtypes,
    and chunks of a wider tensor are read in place. The result is contiguous.

    Raises:
        ValueError: If a dtype, a device or a shape does not fit.
    """
    op = "modulated_rms_norm"
    _common.check_inputs(op, x, shift, scale, weight)
    _common.check_rows(op, x)
    _common.check_weight(op, "weight", weight, x.shape[-1])
    shift = _common.per_sample(op, "shift", shift, x)
    scale = _common.per_sample(op, "scale", scale, x)
    if shift.shape != scale.shape:
        raise ValueError(
            f"{op}: shift and scale must have one shape, "
            f"got {tuple(shift.shape)} and {tuple(scale.shape)}"
        )
    return modulated_rms_norm_fwd(x, shift, scale, weight, eps)
