"""SHA-256 of arrays and of the tensors of a module."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn


def module_hash(module: nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of a module's tensors, in hex."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def array_hash(*arrays: NDArray[Any]) -> str:
    """sha256 over the types, shapes and bytes of arrays, in hex."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def weights_sha256(vae: nn.Module) -> str:
    """sha256 over names, shapes and fp32 values: the same for every file format of one VAE."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
