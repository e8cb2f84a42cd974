"""Which tokens a block works on, and which expert each of them meets: facts known in advance.

Dropping tokens in the middle of the network is TREAD (Krause et al., arXiv 2501.04765): the kept
ones go through the middle blocks, the others bypass them unchanged and come back behind them.

Shapes: B batch · N tokens · K kept tokens of N.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
"""Timesteps are this many times the noise level, as diffusers' schedulers count them."""


def kept_count(tokens: int, rate: float) -> int:
    """How many of an image's tokens stay when the share `rate` is dropped: at least one."""
    return max(1, round(tokens * (1 - rate)))


def draw_kept_tokens(batch: int, tokens: int, rate: float, generator: torch.Generator) -> Tensor:
    """Choose the tokens that stay, each image its own, every subset equally likely.

    Args:
        batch: Images B.
        tokens: Tokens N of an image.
        rate: Share of them that is dropped, in [0, 1).
        generator: Where the randomness comes from.

    Returns:
        int64 (B, K), ascending in each row.
    """
    scores = torch.rand(batch, tokens, generator=generator)
    return scores.topk(kept_count(tokens, rate), dim=1).indices.sort(dim=1).values


def check_kept_tokens(kept: Tensor, batch: int, tokens: int) -> None:
    """Refuse kept tokens of another type or shape; their values are the caller's promise.

    Raises:
        ValueError: Naming what was given and what was expected.
    """
    fits = kept.ndim == 2 and kept.shape[0] == batch and 1 <= kept.shape[1] <= tokens
    if kept.dtype != torch.int64 or not fits:
        raise ValueError(
            f"kept_tokens of shape {tuple(kept.shape)} and {kept.dtype} must be int64 "
            f"({batch}, K) with K from 1 to {tokens}: indices of the tokens that stay, ascending "
            "in each row"
        )


class _Take(torch.autograd.Function):
    """Rows x[index] of distinct indices: the backward puts rows back, and adds nothing up.

    Autograd's own backward of indexing does not know that no row comes twice: it accumulates.
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
    """The kept tokens of a batch, as row numbers of the batch seen as one list of B * N tokens."""

    def __init__(self, kept_BK: Tensor, tokens: int) -> None:
        self.kept, self.tokens = kept_BK, tokens
        first = torch.arange(kept_BK.shape[0], device=kept_BK.device) * tokens
        self.rows = (first[:, None] + kept_BK).flatten()

    def take(self, x: Tensor) -> Tensor:
        """The kept tokens of `x`: (B, N, ...) to (B, K, ...)."""
        return _Take.apply(x.flatten(0, 1), self.rows).unflatten(0, self.kept.shape)

    def put_back(self, part: Tensor, whole: Tensor | None) -> Tensor:
        """`whole` (B, N, ...) with its kept tokens replaced by `part` (B, K, ...).

        Where `whole` is None the dropped tokens are zero: a velocity that has not begun.
        """
        if whole is None:
            whole = part.new_zeros(part.shape[0], self.tokens, *part.shape[2:])
        rows = whole.flatten(0, 1).index_copy(0, self.rows, part.flatten(0, 1).to(whole.dtype))
        return rows.view(whole.shape)


def expert_ids(
    routing: str,
    num_experts: int,
    timestep_B: Tensor,
    tokens: int,
    edges: Sequence[float] | None = None,
) -> Tensor:
    """The expert of every token, known before the network runs.

    Args:
        routing: `timestep`: the bucket of the image's noise level; `position`: the token's band of
            the picture, which in row-major order is token * E // N, whatever the size.
        num_experts: Experts E.
        timestep_B: 1000 times the noise level, (B,).
        tokens: Tokens N of an image.
        edges: E - 1 rising noise levels between the buckets; None means equal widths.

    Returns:
        int64 (B, N).
    """
    batch = timestep_B.shape[0]
    if routing == "position":
        bands = torch.arange(tokens, device=timestep_B.device) * num_experts // tokens
        return bands.expand(batch, tokens)
    if edges is None:
        edges = [i / num_experts for i in range(1, num_experts)]
    bounds = torch.tensor(edges, device=timestep_B.device, dtype=torch.float32) * NUM_TIMESTEPS
    buckets = torch.bucketize(timestep_B.float(), bounds, right=True)
    return buckets[:, None].expand(batch, tokens)
