"""SHA-256 of files, arrays and network weights, in hex.

Digests of these functions are stored in caches, checkpoints and results: they must never change.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inl_core.run.files import open_regular


def file_sha256(path: Path) -> str:
    """Hash the bytes of a file."""
    with open_regular(path, follow_links=True) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore (a binary file)


def array_hash(*arrays: NDArray[Any]) -> str:
    """Hash the types, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def module_hash(module: nn.Module) -> str:
    """Hash the names, types, shapes and bytes of a module's tensors: equal for equal results."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Hash names, shapes and fp32 values of tensors: equal for every file format of one network."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
