"""Rotary position tables (Su et al., 2021): along a line for text, on a grid for images.

Half-split convention, as in transformers: channel i is rotated with channel i + Dh/2.
Tables are (N, Dh/2) in fp32; shape letters as in `inl_core.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inl_core import ops


def _angles(positions_N: Tensor, count: int, theta: float) -> Tensor:
    """Angles (N, count): position * theta^(-i/count) for i = 0 … count-1."""
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")
    # With fp64 angles, q·k depends on the offset only, also at large positions; MPS has no fp64.
    dtype = torch.float32 if positions_N.device.type == "mps" else torch.float64
    exponents = torch.arange(count, device=positions_N.device, dtype=dtype) / count
    return positions_N.to(dtype)[:, None] * theta**-exponents


def stored(table: Tensor) -> Tensor:
    """The same table, which torch.compile computes once and keeps.

    It would fuse the cosines of fp64 angles into their uses, and compute them again for every head
    of every layer. It stores what is read with strides.
    """
    return table.as_strided(table.shape, table.stride())


def rotary_1d(
    length_or_positions: int | Tensor,
    head_dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary table along a line.

    Args:
        length_or_positions: A length N, meaning positions 0 … N-1, or a tensor of positions (N,).
        head_dim: Channels of one head, Dh; even.
        theta: Base of the frequencies theta^(-2i/Dh).
        device: Device of the table; default: that of the positions, or torch's default.

    Returns:
        (cos, sin), each (N, Dh/2) in fp32.

    Raises:
        ValueError: If head_dim is not a positive even number, theta is not positive, the length is
            negative or the positions are not one-dimensional.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be a positive multiple of 2")
    if isinstance(length_or_positions, Tensor):
        if length_or_positions.ndim != 1:
            shape = tuple(length_or_positions.shape)
            raise ValueError(f"positions must have shape (N,), got {shape}")
        positions = length_or_positions.to(device) if device else length_or_positions
    else:
        if length_or_positions < 0:
            raise ValueError(f"length must not be negative, got {length_or_positions}")
        positions = torch.arange(length_or_positions, device=device)
    angles = _angles(positions, head_dim // 2, theta)
    return stored(angles.cos().float()), stored(angles.sin().float())


def rotary_2d(
    height: int,
    width: int,
    head_dim: int,
    theta: float = 100.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary table on a grid: half of the frequencies for the row, half for the column.

    Tokens are in row-major order. The default theta is 100, the square root of the usual 10000
    (Heo et al., 2024): an axis of an image has about the square root of a text's positions, and
    with 10000 most frequencies of a head would hardly rotate across a grid 16 to 64 wide.

    Args:
        height: Rows of tokens.
        width: Columns of tokens.
        head_dim: Channels of one head, Dh; divisible by 4.
        theta: Base of the frequencies theta^(-4i/Dh), the same for both axes.
        device: Device of the table; default: torch's default.

    Returns:
        (cos, sin), each (height * width, Dh/2) in fp32: the first Dh/4 angles follow the row, the
        other Dh/4 the column.

    Raises:
        ValueError: If head_dim is not a positive multiple of 4, theta is not positive, or height or
            width is negative.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(
            f"head_dim {head_dim} must be a positive multiple of 4 for 2-D rotary: two axes, "
            f"each rotating pairs of channels"
        )
    if height < 0 or width < 0:
        raise ValueError(f"height and width must not be negative, got {height} and {width}")
    rows = _angles(torch.arange(height, device=device), head_dim // 4, theta)
    columns = _angles(torch.arange(width, device=device), head_dim // 4, theta)
    angles = torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=-1)
    return stored(angles.cos().float()), stored(angles.sin().float())


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (B, N, H, Dh) by a table (N, Dh/2); shape and dtype are kept."""
    return ops.rotate(x, cos, sin)
