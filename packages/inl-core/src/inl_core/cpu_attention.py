"""Attention in bf16 on a CPU, as two matrix products around a softmax.

torch's fused attention for CPUs leaves the bf16 units of the CPU idle in its backward pass. Here
the products use them; the softmax is computed in fp32 and rounded once. The matrices of scores are
made in chunks that stay in the cache, and are kept for the backward pass.

A product of torch on a CPU returns bf16, so scores are rounded before the softmax, which torch's
fused attention does not do: for normalised queries and keys the error of the output is about twice
that of torch's, and it grows with the size of the scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**18
"""Scores that are computed at a time, 512 KiB: they and what is made of them stay in the cache."""


@torch.library.custom_op("inl_core::cpu_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Output (B, Hk, R, E), and the weights (B, Hk, R, M) if they are kept, else nothing.

    R are the rows of all heads that share keys; `mask` is True where a row may attend, and
    broadcasts to (B, Hk, R, M).
    """
    shape = (*q.shape[:3], k.shape[2])
    out, kept = q.new_empty(q.shape), q.new_empty(shape if keep else 0)
    blocked = ~mask if mask is not None else None
    empty = blocked.all(-1, keepdim=True) if blocked is not None else None
    if empty is not None and not empty.any():
        empty = None
    for part in _chunks(shape):
        weights = _product(q[part], k[part].mT, scale)
        if blocked is not None:
            weights.masked_fill_(blocked.expand(shape)[part], -torch.inf)
        weights = torch.softmax(weights, -1)
        if empty is not None:
            # A row without any key gets zeros, not the NaN of an empty softmax.
            weights.masked_fill_(empty.expand(*shape[:3], 1)[part], 0.0)
        if keep:
            kept[part] = weights
        _product(weights, v[part], out=out[part])
    return out, kept


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, keep: bool):
    return q.new_empty(q.shape), q.new_empty((*q.shape[:3], k.shape[2]) if keep else 0)


@torch.library.custom_op("inl_core::cpu_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (x.new_empty(x.shape) for x in (q, k, v))
    for part in _chunks(kept.shape):
        weights, g = kept[part], grad[part]
        of_weights = _product(g, v[part].mT)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, q.dtype)
        _product(of_scores, k[part], scale, of_q[part])
        _product(of_scores.mT, q[part], scale, of_k[part])
        _product(weights.mT, g, out=of_v[part])
    return of_q, of_k, of_v


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, _, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 6
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _chunks(shape: tuple[int, ...] | torch.Size) -> Iterator[tuple[slice, slice]]:
    """Samples and heads of each chunk: several samples whole, or some heads of one sample."""
    batch, heads, rows, keys = shape
    matrices = max(1, CHUNK // max(1, rows * keys))
    samples = max(1, matrices // heads)
    for first in range(0, batch, samples):
        for head in range(0, heads, min(matrices, heads)):
            yield slice(first, first + samples), slice(head, head + min(matrices, heads))


def _product(a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale · a @ b, rounded once; into `out`, whose samples and heads make one dimension."""
    a, b, (batch, heads) = a.flatten(0, 1), b.flatten(0, 1), a.shape[:2]
    unused = a.new_empty(()).expand(len(a), a.shape[1], b.shape[2])
    into = None if out is None else out.view(-1, *out.shape[2:])
    product = torch.baddbmm(unused, a, b, beta=0, alpha=scale, out=into)
    return product.unflatten(0, (batch, heads))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`inl_core.reference.attention` for bf16 on a CPU, with a boolean mask or none.

    Keeps H · N · M numbers per sample for the backward pass, in bf16.
    """
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    rows = q.unflatten(1, (heads, groups)).flatten(2, 3)
    if mask is not None and groups > 1:
        mask = mask.expand(*(1,) * (4 - mask.ndim), *mask.shape)
        # Not of all samples and heads: the compiler writes it anew in every layer.
        split = mask.unflatten(1, (heads, groups)) if mask.shape[1] > 1 else mask[:, :, None]
        mask = split.expand(-1, -1, groups, q.shape[2], -1).flatten(2, 3)
    out, _ = _attention(rows, k, v, mask, scale, keep)
    return out.unflatten(2, (groups, -1)).flatten(1, 2)
