"""Token-routed MLP: the expert of a token is looked up by its id, without a learned router.

One plan per batch serves all layers:

    table = build_routing_table(vocab_size, num_experts)           # once, a buffer of the model
    plan = make_routing_plan(table[token_ids], num_experts)        # once per batch
    h = h + mlp(norm(h), plan)                                     # in every layer

Balanced tables are those of Roller et al., "Hash Layers For Large Sparse Models" (2021).
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inl_core import ops
from inl_core.segments import RoutingPlan, make_routing_plan

__all__ = [
    "RoutingPlan",
    "RoutingScheme",
    "TokenRoutedMLP",
    "build_routing_table",
    "make_routing_plan",
]

RoutingScheme = Literal["modulo", "balanced"]
"""How token ids are assigned to experts."""


def build_routing_table(
    vocab_size: int,
    num_experts: int,
    scheme: RoutingScheme = "modulo",
    counts: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Assign every token id to an expert.

    "modulo" is id % num_experts. "balanced" assigns ids by decreasing corpus count, each to the
    expert with the lowest sum of counts so far (greedy bin packing); ids that never occur go to the
    expert with the fewest ids. Ties go to the lower id and the lower expert, so the table depends
    only on its arguments.

    Args:
        vocab_size: Number of token ids V.
        num_experts: Experts E.
        scheme: "modulo" or "balanced".
        counts: For "balanced": occurrences of each id in the corpus, (V,).

    Returns:
        (V,) int64 on the CPU, values in [0, E).

    Raises:
        ValueError: If a size is below 1, the scheme is unknown, or `counts` are missing, given for
            "modulo", of another length, negative, not finite or all zero.

    Warns:
        UserWarning: In "balanced", when a single id holds more than 1/E of the counts: its expert
            is overloaded in any table.
    """
    for name, size in (("vocab_size", vocab_size), ("num_experts", num_experts)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if scheme not in get_args(RoutingScheme):
        raise ValueError(f"scheme must be one of {get_args(RoutingScheme)}, got {scheme!r}")
    if (counts is None) == (scheme == "balanced"):
        fault = "needs counts of the token ids" if counts is None else "takes no counts"
        raise ValueError(f"scheme {scheme!r} {fault}")
    if counts is None:
        return torch.arange(vocab_size) % num_experts
    weights = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(weights) != vocab_size or any(isinstance(weight, list) for weight in weights):
        shape = tuple(counts.shape) if isinstance(counts, Tensor) else (len(weights),)
        raise ValueError(f"counts must have shape ({vocab_size},), got {shape}")
    for token, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"counts must be finite and not negative, got {weight} for id {token}")
    return torch.tensor(_balanced(weights, num_experts))


def _balanced(weights: list[float], num_experts: int) -> list[int]:
    total = sum(weights)
    if total == 0:
        raise ValueError("counts are all zero: count a corpus first, or use scheme 'modulo'")
    by_weight = sorted(range(len(weights)), key=lambda token: -weights[token])  # stable
    heaviest = by_weight[0]
    if weights[heaviest] * num_experts > total:
        share = weights[heaviest] / total
        warnings.warn(
            f"id {heaviest} holds {share:.1%} of the counts, more than 1/{num_experts}: its expert "
            "is overloaded; use fewer experts, or another tokenizer",
            stacklevel=3,
        )
    table = [0] * len(weights)
    loads: list[tuple[float, int]] = [(0, expert) for expert in range(num_experts)]
    members = [0] * num_experts
    seen = [token for token in by_weight if weights[token] > 0]
    for token in seen:
        load, expert = loads[0]
        table[token] = expert
        members[expert] += 1
        heapq.heapreplace(loads, (load + weights[token], expert))
    sizes = [(members[expert], expert) for expert in range(num_experts)]
    heapq.heapify(sizes)
    for token in by_weight[len(seen) :]:
        size, expert = sizes[0]
        table[token] = expert
        heapq.heapreplace(sizes, (size + 1, expert))
    return table


class TokenRoutedMLP(nn.Module):
    """SwiGLU experts selected by token id, plus a shared SwiGLU expert for every token.

    ``y = expert[e](x) + shared(x)``, each ``down(silu(gate(x)) * up(x))`` without biases. All
    weights are raw parameters: an expert's are rows of stacked tensors, ``gate`` and ``up``
    (E, I, D) and ``down`` (E, D, I); the shared ones are ``shared_gate``, ``shared_up`` (S, D) and
    ``shared_down`` (D, S).

    Each matrix starts uniform in ±1/sqrt(fan-in), the range of ``nn.Linear``. A parent's init over
    its ``nn.Linear`` children does not affect them; an init over all parameters must be followed by
    `reset_parameters`.

    Args:
        hidden_size: Channels D.
        intermediate_size: Inner width I of a routed expert.
        num_experts: Routed experts E.
        shared_intermediate_size: Inner width S of the shared expert; None means I, 0 none.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        shared_intermediate_size: int | None = None,
    ) -> None:
        super().__init__()
        shared = intermediate_size if shared_intermediate_size is None else shared_intermediate_size
        for name, size, least in (
            ("hidden_size", hidden_size, 1),
            ("intermediate_size", intermediate_size, 1),
            ("num_experts", num_experts, 1),
            ("shared_intermediate_size", shared, 0),
        ):
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.shared_intermediate_size = shared
        self.gate = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        if shared:
            self.shared_gate = nn.Parameter(torch.empty(shared, hidden_size))
            self.shared_up = nn.Parameter(torch.empty(shared, hidden_size))
            self.shared_down = nn.Parameter(torch.empty(hidden_size, shared))
        self.reset_parameters()

    @property
    def active_parameters(self) -> int:
        """Parameters applied to one token: its expert and the shared one."""
        width = self.intermediate_size + self.shared_intermediate_size
        return 3 * self.hidden_size * width

    def reset_parameters(self) -> None:
        """Reset every matrix; the fan-in is that of one expert, not of the stack."""
        for parameter in self.parameters():
            bound = 1.0 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        """Apply to each token its expert and the shared one.

        Args:
            x: (..., D), its leading dimensions shaped like the expert ids of the plan.
            plan: Plan of this batch, from `make_routing_plan`.

        Returns:
            Tensor shaped like `x`, in its dtype (under autocast in the dtype of autocast).

        Raises:
            ValueError: If a shape or a dtype does not fit, or the plan is of another batch size or
                another number of experts.
        """
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (..., {self.hidden_size}) for "
                f"hidden_size {self.hidden_size}"
            )
        y = ops.routed_mlp(x, plan, self.gate, self.up, self.down)
        if self.shared_intermediate_size:
            inner = ops.swiglu(F.linear(x, self.shared_gate), F.linear(x, self.shared_up))
            y = y + F.linear(inner, self.shared_down)
        return y

    def extra_repr(self) -> str:
        """Settings shown by ``print(module)``."""
        return (
            f"{self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, "
            f"shared_intermediate_size={self.shared_intermediate_size}"
        )
