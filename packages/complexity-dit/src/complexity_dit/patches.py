"""From pictures to tokens and back, and where on the canvas a token is.

Shapes: B batch · C channels · Y, X pixels · N tokens · D width of a token.
"""

import torch
from torch import Tensor


def patchify(x_BCYX: Tensor, patch: int) -> Tensor:
    """(B, C, Y, X) to (B, N, C * patch * patch), tokens in row-major order."""
    batch, channels, height, width = x_BCYX.shape
    x = x_BCYX.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(x_BND: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x_BND.unflatten(1, (rows, columns)).unflatten(3, (-1, patch, patch))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def canvas_positions(
    rows: int, columns: int, base: int, hidden_size: int, device: torch.device
) -> Tensor:
    """Where on the canvas each token is, (N, D): fixed sines and cosines of row and column.

    The rotary embedding knows only distances between tokens; without this a token cannot tell the
    sky from the ground. Coordinates are stretched so that any size spans the range of the training
    size (`base` tokens), whose corners the network knows.
    """
    rates = 10000.0 ** (-torch.arange(hidden_size // 4, device=device) * 4 / hidden_size)
    tables = []
    for count in (rows, columns):
        angles = ((torch.arange(count, device=device) + 0.5) * (base / count))[:, None] * rates
        tables.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    y_ND = tables[0].repeat_interleave(columns, dim=0)
    x_ND = tables[1].repeat(rows, 1)
    return torch.cat([y_ND, x_ND], dim=-1)
