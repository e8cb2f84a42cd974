"""The dtype of the definitions, and a clamp whose gradient leads back inside its bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inl_core.tracing import transformed


def compute_dtype(*values: Tensor | float | None) -> torch.dtype:
    """fp64 if one of the tensors is fp64, else fp32; ValueError for integers."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ValueError(f"expected floating-point tensors, got one of dtype {tensor.dtype}")
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def cast(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Cast a tensor; return a number unchanged."""
    return value.to(dtype) if isinstance(value, Tensor) else value


class BoundedClamp(torch.autograd.Function):
    """Plain clamp forward, with a gradient outside the bounds; see `bounded_clamp`.

    A plain clamp has gradient 0 outside, so a parameter that crosses its bound never returns. Here
    the gradient passes if the descent step ``x - lr * grad`` points back inside.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
        return torch.clamp(x, min=minimum, max=maximum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.minimum, ctx.maximum = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        # Conditions for blocking, not for passing: a NaN in x or grad is never masked.
        if ctx.minimum is not None:
            grad = torch.where((x < ctx.minimum) & (grad > 0), 0.0, grad)
        if ctx.maximum is not None:
            grad = torch.where((x > ctx.maximum) & (grad < 0), 0.0, grad)
        return grad, None, None


class _BoundedClampWithTangent(BoundedClamp):
    """The same with forward-mode derivatives, apart because the compiler refuses a ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        BoundedClamp.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        tangent = grad_inputs[0]
        if tangent is None:
            return None
        if ctx.minimum is not None:
            tangent = torch.where(x < ctx.minimum, 0.0, tangent)
        if ctx.maximum is not None:
            tangent = torch.where(x > ctx.maximum, 0.0, tangent)
        return tangent


def bounded_clamp(x: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
    """Clamp `x` to [minimum, maximum] with gradients that lead back inside.

    The sign of the incoming gradient decides: for a parameter used by a whole batch that is the
    gradient of the batch, so outside a bound the gradients of single samples (``torch.func.vmap``
    over ``grad``, micro-batches) need not add up to it. For those, modules of `inl_core` have
    `inl_core.defer_bounds`. Forward-mode derivatives (``torch.func.jvp``) are those of the plain
    clamp, 0 outside.

    Args:
        x: Tensor of any shape. NaN stays NaN.
        minimum: Lower bound, or None for none.
        maximum: Upper bound, or None for none.

    Returns:
        The clamped tensor. Strictly beyond a bound its gradient passes only if the descent step
        ``x - lr * grad`` moves towards the bound; at a bound and inside it always passes.

    Raises:
        ValueError: If minimum is above maximum.
    """
    if minimum is None and maximum is None:
        return x
    if minimum is not None and maximum is not None and minimum > maximum:
        raise ValueError(f"minimum {minimum} must not be above maximum {maximum}")
    tangents = transformed() and not torch.compiler.is_compiling()
    function = _BoundedClampWithTangent if tangents else BoundedClamp
    return function.apply(x, minimum, maximum)
