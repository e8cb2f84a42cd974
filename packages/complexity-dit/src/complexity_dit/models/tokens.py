"""Token dropping in the middle of the network, TREAD (Krause et al., arXiv 2501.04765).

The kept tokens of an image go through the middle blocks, the others bypass them unchanged and
rejoin after them. Which ones is drawn before the network runs.

Shapes: B batch · N tokens · K kept tokens of N.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LayerState = tuple[Tensor, Tensor | None]
"""What is passed from block to block: hidden state and velocity."""

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps are this many times the noise level, as in diffusers' schedulers."""


@dataclass
class Carried:
    """The velocity, which blocks pass on beside the hidden state they return.

    The caches of diffusers skip blocks by their hidden states, and know no other state.
    """

    velocity: Tensor | None


def kept_count(tokens: int, rate: float) -> int:
    """Number of an image's tokens that are kept when the share `rate` is dropped; at least 1."""
    return max(1, round(tokens * (1 - rate)))


def draw_kept_tokens(batch: int, tokens: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw the tokens to keep of each image, every subset equally likely.

    Indices, int64 (B, K), ascending in each row, if the share `rate` of N tokens is dropped.
    """
    scores = torch.rand(batch, tokens, generator=generator)
    return scores.topk(kept_count(tokens, rate), dim=1).indices.sort(dim=1).values


class _Take(torch.autograd.Function):
    """x[index] for distinct indices: the backward copies rows.

    The backward of indexing in autograd accumulates, because an index might occur twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index = inputs
        ctx.rows = x.shape[0]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dy = grad_outputs[0]
        return dy.new_zeros(ctx.rows, *dy.shape[1:]).index_copy(0, index, dy), None


class TokenSubset:
    """The kept tokens of a batch, gathered from and scattered into a `LayerState`.

    `kept_BK` are their indices, int64, ascending in each row; the values are not checked.
    """

    def __init__(self, kept_BK: Tensor, batch: int, tokens: int) -> None:
        shape = tuple(kept_BK.shape)
        fits = len(shape) == 2 and shape[0] == batch and 1 <= shape[1] <= tokens
        if kept_BK.dtype != torch.int64 or not fits:
            raise ValueError(
                f"kept_tokens of shape {shape} and {kept_BK.dtype} must be int64 ({batch}, K) with "
                f"K from 1 to {tokens}: indices of the kept tokens, ascending in each row"
            )
        self.kept, self.tokens = kept_BK, tokens
        first = torch.arange(batch, device=kept_BK.device) * tokens
        # Row numbers in the batch flattened to B * N tokens.
        self.rows = (first[:, None] + kept_BK).flatten()

    def take(self, state: LayerState) -> LayerState:
        """Gather the kept tokens: each (B, N, ...) becomes (B, K, ...), None stays None."""
        h, v = state
        return self._take(h), None if v is None else self._take(v)

    def put_back(self, part: LayerState, full: LayerState) -> LayerState:
        """Scatter hidden state and velocity of the kept tokens, `part`, into those of all, `full`.

        If `full` has no velocity yet, dropped tokens get zero, which is what None means.
        """
        (h_part, v_part), (h, v) = part, full
        if v_part is not None:
            if v is None:
                v = v_part.new_zeros(v_part.shape[0], self.tokens, *v_part.shape[2:])
            v = self._put(v_part, v)
        return self._put(h_part, h), v

    def _take(self, x: Tensor) -> Tensor:
        return _Take.apply(x.flatten(0, 1), self.rows).unflatten(0, self.kept.shape)

    def _put(self, part: Tensor, full: Tensor) -> Tensor:
        rows = full.flatten(0, 1).index_copy(0, self.rows, part.flatten(0, 1).to(full.dtype))
        return rows.view(full.shape)
