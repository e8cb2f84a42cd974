"""Tensors that are sharded over the processes of a run (FSDP2), and whole ones to save or load."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one all processes gather it, in the same order of calls."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal in all processes, sharded as `like` is (or whole, if that is whole)."""
    if not isinstance(like, DTensor):
        return tensor
    # src_data_rank=None: every process has the data, so none is sent.
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
