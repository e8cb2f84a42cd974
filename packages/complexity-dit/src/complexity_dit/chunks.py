"""Networks run on a fixed number of rows, so that bits do not depend on the batch."""

from collections.abc import Callable

import torch
from torch import Tensor


def in_chunks(
    network: Callable[..., Tensor], chunk_size: int | None, offset: int, *rows: Tensor
) -> Tensor:
    """Run a network over rows, `chunk_size` at a time, padded so that every call has that many.

    Row i sits at position (offset + i) mod chunk_size of its call, whatever rows are beside it.
    """
    if chunk_size is None:
        return network(*rows)
    count, offset = len(rows[0]), offset % chunk_size
    padding = -(offset + count) % chunk_size
    padded = [
        torch.cat([x[:1].expand(offset, *x.shape[1:]), x, x[-1:].expand(padding, *x.shape[1:])])
        for x in rows
    ]
    outputs = [
        network(*chunk) for chunk in zip(*(x.split(chunk_size) for x in padded), strict=True)
    ]
    return torch.cat(outputs)[offset : offset + count]
