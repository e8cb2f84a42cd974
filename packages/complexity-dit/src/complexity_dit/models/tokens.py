"""Which tokens a block works on, and which expert each of them meets: facts known in advance.

Dropping tokens in the middle of the network is TREAD (Krause et al., arXiv 2501.04765): the kept
ones go through the middle blocks, the others bypass them unchanged and come back behind them.

Shapes: B batch · N tokens · K kept tokens of N.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inl_core import RoutingPlan, make_routing_plan

LayerState = tuple[Tensor, Tensor | None, Tensor | None]
"""What travels through depth: hidden state, velocity, and the values of the first block."""

NUM_TRAIN_TIMESTEPS = 1000
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
    """The kept tokens of a batch, in and out of the state that travels through depth.

    Args:
        kept_BK: Indices of the tokens that stay, (B, K) int64, ascending in each row; their values
            are the caller's promise.
        batch: Images B.
        tokens: Tokens N of an image.

    Raises:
        ValueError: If they have another type or shape.
    """

    def __init__(self, kept_BK: Tensor, batch: int, tokens: int) -> None:
        shape = tuple(kept_BK.shape)
        fits = len(shape) == 2 and shape[0] == batch and 1 <= shape[1] <= tokens
        if kept_BK.dtype != torch.int64 or not fits:
            raise ValueError(
                f"kept_tokens of shape {shape} and {kept_BK.dtype} must be int64 ({batch}, K) with "
                f"K from 1 to {tokens}: indices of the tokens that stay, ascending in each row"
            )
        self.kept, self.tokens = kept_BK, tokens
        first = torch.arange(batch, device=kept_BK.device) * tokens
        # Row numbers in the batch seen as one list of B * N tokens.
        self.rows = (first[:, None] + kept_BK).flatten()

    def take(self, state: LayerState) -> LayerState:
        """What the kept tokens carry: each (B, N, ...) becomes (B, K, ...), None stays None."""
        h, v, first = state
        return (
            self._take(h),
            None if v is None else self._take(v),
            None if first is None else self._take(first),
        )

    def put_back(self, part: LayerState, whole: LayerState) -> LayerState:
        """`whole` with hidden state and velocity of the kept tokens replaced by those of `part`.

        Where `whole` has no velocity yet, that of a dropped token is zero, as None means. The
        values of the first block are those of `whole`.
        """
        (h_part, v_part, _), (h, v, first) = part, whole
        if v_part is not None:
            if v is None:
                v = v_part.new_zeros(v_part.shape[0], self.tokens, *v_part.shape[2:])
            v = self._put(v_part, v)
        return self._put(h_part, h), v, first

    def _take(self, x: Tensor) -> Tensor:
        return _Take.apply(x.flatten(0, 1), self.rows).unflatten(0, self.kept.shape)

    def _put(self, part: Tensor, whole: Tensor) -> Tensor:
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
    bounds = (
        torch.tensor(edges, device=timestep_B.device, dtype=torch.float32) * NUM_TRAIN_TIMESTEPS
    )
    buckets = torch.bucketize(timestep_B.float().contiguous(), bounds, right=True)
    return buckets[:, None].expand(batch, tokens)


def routing_plans(
    config: Mapping[str, Any], timestep_B: Tensor, tokens: int, kept_BK: Tensor | None
) -> tuple[RoutingPlan | None, RoutingPlan | None]:
    """How tokens are grouped by expert, once a batch for every block.

    Returns:
        The plan of all tokens, and that of the kept ones. None: the network is dense, or keeps all.
    """
    routing, experts = config["routing"], config["num_experts"]
    if routing == "none":
        return None, None
    ids = expert_ids(routing, experts, timestep_B, tokens, config["routing_edges"])
    some = None if kept_BK is None else make_routing_plan(ids.gather(1, kept_BK), experts)
    return make_routing_plan(ids, experts), some
