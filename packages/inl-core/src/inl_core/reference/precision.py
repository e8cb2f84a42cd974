"""In which dtype the definitions compute: fp32, or fp64 as soon as one tensor argument is fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*values: Tensor | float | None) -> torch.dtype:
    """fp64 when one of the tensors is fp64, else fp32; integers are refused."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ValueError(f"expected floating-point tensors, got one of dtype {tensor.dtype}")
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def cast(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """A tensor in that dtype; a number as it is."""
    return value.to(dtype) if isinstance(value, Tensor) else value
