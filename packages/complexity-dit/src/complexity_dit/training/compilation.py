"""How the network of a run is compiled."""

from functools import wraps
from typing import Any

import torch
from torch import nn


def compile_network(network: nn.Module, how: str) -> None:
    """Compile a network in place, before it is wrapped for precision or several processes.

    Args:
        network: For `regional` it has the `compile_repeated_blocks` of diffusers' models.
        how: `no`; `regional`, each repeated block by itself, with one compilation for equal ones;
            or `max`, the whole forward pass as one graph and the backward pass as another, which a
            GPU replays as CUDA graphs: then Python launches two things for both. All inputs must
            keep their shapes; a batch in parts would overwrite the gradients of the part before.
    """
    if how == "regional":
        network.compile_repeated_blocks(fullgraph=True)  # pyright: ignore[reportCallIssue]
    elif how == "max":
        compiled = torch.compile(
            network.forward, fullgraph=True, dynamic=False, mode="reduce-overhead"
        )

        @wraps(network.forward)
        def forward(*inputs: Any, **options: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may go
            return compiled(*inputs, **options)

        network.forward = forward
