"""Shapes of the row kernels' arguments: checks, and rows grouped by sample."""

from __future__ import annotations

from torch import Tensor

from inl_core.kernels import _common


def check_rows(op: str, x: Tensor, *same: tuple[str, Tensor]) -> None:
    """Refuse rows that a kernel cannot take, and companions that are not shaped like them.

    Args:
        op: Name of the operation, for the message.
        x: The tensor (..., D) whose rows are worked on.
        *same: (name, tensor) of each argument that must be shaped like `x`.

    Raises:
        ValueError: If D is out of range or a shape differs.
    """
    if x.ndim == 0:
        raise ValueError(f"{op} needs at least one dimension, got a 0-dimensional tensor")
    _common.check_width(op, x.shape[-1])
    for name, tensor in same:
        if tensor.shape != x.shape:
            raise ValueError(
                f"{op}: {name} must have shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )


def check_weight(op: str, name: str, weight: Tensor | None, width: int) -> None:
    """Refuse a weight that is neither None nor (width,).

    Args:
        op: Name of the operation, for the message.
        name: Name of the argument, for the message.
        weight: The weight.
        width: Size D of a row.

    Raises:
        ValueError: If the shape differs.
    """
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"{op}: {name} must have shape ({width},), got {tuple(weight.shape)}")


def per_sample(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    """Bring `value` to one row a sample, where the rows of `x` are grouped by sample.

    (B, D) is the usual case. More leading dimensions, taken from the left of those of `x`, make
    smaller groups: with (B, N, D) every token is a sample of its own. Size 1 stands for all.
    The result is a view, so autograd sums an expansion away by itself.

    Args:
        op: Name of the operation, for the message.
        name: Name of the argument, for the message.
        value: (B, D), or as above.
        x: (B, ..., D).

    Returns:
        `value` expanded to (B, ..., D) with as many leading dimensions as it has, less those of
        size 1 at their end.

    Raises:
        ValueError: If `value` does not fit.
    """
    lead = list(value.shape[:-1])
    while len(lead) > 1 and lead[-1] == 1:
        lead.pop()
    groups = x.shape[: len(lead)]
    fits = (
        2 <= value.ndim <= x.ndim
        and value.shape[-1] == x.shape[-1]
        and all(size in (1, wanted) for size, wanted in zip(lead, groups, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{op}: {name} must have shape {(x.shape[0], x.shape[-1])} for rows of shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}"
        )
    return value.reshape(*lead, value.shape[-1]).expand(*groups, value.shape[-1])
