"""Tokens grouped by expert: the plan of a batch, and the routed MLP as functions over it.

The expert of a token depends on its id alone, so one `RoutingPlan` serves every layer of the
network and every backward pass. `routed_mlp` is the definition; `grouped_routed_mlp` computes the
same over one segment of rows per expert, by torch's grouped matrix product.

Shape letters: T tokens of the batch, E experts, D channels, I inner channels of one expert.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from inl_core.tracing import transformed

__all__ = [
    "RoutingPlan",
    "are_quantized",
    "as_linear_casts",
    "check_routed_mlp",
    "grouped_routed_mlp",
    "make_routing_plan",
    "routed_mlp",
]


class RoutingPlan(NamedTuple):
    """Assignment of the tokens of a batch to experts; built by `make_routing_plan`.

    Attributes:
        order: (T,) int64. Row i of the grouped batch is token order[i]; inside an expert tokens
            keep their order.
        inverse: (T,) int64. Token t is row inverse[t] of the grouped batch.
        offsets: (E,) int32. Expert e owns the rows from offsets[e - 1] (0 for the first) up to, not
            including, offsets[e].
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def make_routing_plan(expert_ids: Tensor, num_experts: int) -> RoutingPlan:
    """Group the tokens of a batch by expert: one stable sort, without waiting for the device.

    Args:
        expert_ids: Expert of each token, any shape with T elements, integers in [0, num_experts):
            usually ``table[token_ids]`` with a table of `build_routing_table`.
        num_experts: Experts E.

    Returns:
        The plan, on the device of `expert_ids`. Tokens are in row-major order.

    Raises:
        ValueError: If `expert_ids` are not integers, or num_experts is below 1.
        RuntimeError: If an id is outside [0, num_experts); on a GPU it is raised asynchronously,
            under ``torch.func`` not at all.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if expert_ids.is_floating_point() or expert_ids.is_complex() or expert_ids.dtype == torch.bool:
        raise ValueError(f"expert_ids must be integers, got dtype {expert_ids.dtype}")
    flat = expert_ids.reshape(-1)
    if not transformed():  # vmap has no rule for assertions
        inside = ((flat >= 0) & (flat < num_experts)).all()
        # The assertion of the compiler: checked on the tensor's device, without waiting for it.
        message = f"expert_ids must lie in [0, {num_experts})"
        torch._assert_async(inside, message)  # pyright: ignore[reportPrivateImportUsage]
    grouped, order = torch.sort(flat, stable=True)
    rows = torch.arange(flat.shape[0], device=flat.device)
    inverse = rows.scatter(0, order, rows)  # not in place: vmap has a rule for this form alone
    experts = torch.arange(num_experts, device=flat.device, dtype=flat.dtype)
    return RoutingPlan(order, inverse, torch.searchsorted(grouped, experts, right=True).int())


def check_routed_mlp(x: Tensor, plan: RoutingPlan, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Raise ValueError if a shape or a dtype of the arguments of `routed_mlp` does not fit."""
    if gate.ndim != 3 or x.ndim == 0 or x.shape[-1] != gate.shape[-1]:
        raise ValueError(
            f"x (..., D) and gate (E, I, D) must agree in D, got shapes {tuple(x.shape)} and "
            f"{tuple(gate.shape)}"
        )
    experts, inner, width = gate.shape
    if up.shape != gate.shape or down.shape != (experts, width, inner):
        raise ValueError(
            f"with gate of shape {tuple(gate.shape)}, up must have that shape and down "
            f"{(experts, width, inner)}, got {tuple(up.shape)} and {tuple(down.shape)}"
        )
    if plan.offsets.shape != (experts,):
        raise ValueError(
            f"the plan is for {plan.offsets.shape[0]} experts, the weights for {experts}"
        )
    rows = math.prod(x.shape[:-1])  # numel() would fix the sizes of an export
    if plan.order.shape != (rows,):
        raise ValueError(
            f"the plan is for {plan.order.shape[0]} tokens, x of shape {tuple(x.shape)} has {rows}"
        )
    dtypes = [tensor.dtype for tensor in (x, gate, up, down)]
    if len(set(dtypes)) > 1 or not x.is_floating_point():
        raise ValueError(
            "x, gate, up and down must have one floating-point dtype, got "
            f"{', '.join(str(dtype) for dtype in dtypes)}; cast x, or use torch.autocast"
        )


def are_quantized(*weights: Tensor) -> bool:
    """Whether weights are tensors of a class with products of its own, such as torchao's int8."""
    return any(is_traceable_wrapper_subclass(weight) for weight in weights)


def as_linear_casts(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """[x, *weights] in the dtype of autocast, if it is on for the device of `x`, as ``F.linear``.

    fp64 is not cast.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return [x, *weights]
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *weights)]


def routed_mlp(x: Tensor, plan: RoutingPlan, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of each token by its own expert e: down_e(silu(gate_e(x)) * up_e(x)).

    The definition: every expert processes every row, with the rows of others set to zero, at E
    times the necessary cost. Does not synchronize and works under ``torch.func``.

    Args:
        x: (..., D) with T rows.
        plan: Plan of T tokens and E experts.
        gate: (E, I, D); as in ``nn.Linear``, an expert's weight is (out, in).
        up: (E, I, D).
        down: (E, D, I).

    Returns:
        Tensor shaped like `x`, in its dtype.

    Raises:
        ValueError: If a shape or a dtype does not fit.
    """
    check_routed_mlp(x, plan, gate, up, down)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    expert_of_row = torch.searchsorted(plan.offsets, plan.inverse.int(), right=True)
    y = torch.zeros_like(rows)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        for expert in range(gate.shape[0]):
            # Zero rows: a NaN in a row of one expert never reaches the weights of another.
            mine = torch.where((expert_of_row == expert).unsqueeze(-1), rows, 0.0)
            inner = F.silu(mine @ gate[expert].to(dtype).T) * (mine @ up[expert].to(dtype).T)
            y = y + inner @ down[expert].to(dtype).T
    return y.to(x.dtype).reshape(x.shape)


class _Permute(torch.autograd.Function):
    """Rows x[order] with the inverse permutation given, so that the backward is a gather too.

    The backward of indexing does not know that each row occurs once: it accumulates, which on a GPU
    means another sort or atomic additions.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, order, inverse = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad_outputs[0], inverse, order), None, None


def _aligned(x: Tensor, *dims: int) -> Tensor:
    """Pad `dims` of `x` with zeros to multiples of 16 bytes, as grouped_mm requires."""
    quantum = 16 // x.element_size()
    missing = [-x.shape[dim] % quantum if dim in dims else 0 for dim in (-1, -2)]
    return F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x.contiguous()


@torch.library.custom_op("inl_core::grouped_product", mutates_args=())
def _opaque_product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """``F.grouped_mm``: (T, K) by (E, K, N) is (T, N), (K, T) by (T, N) is (E, K, N)."""
    return F.grouped_mm(a, b, offs=offsets)


@_opaque_product.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    lead = (a.shape[0],) if b.ndim == 3 else (offsets.shape[0], a.shape[0])
    return a.new_empty(*lead, b.shape[-1])


def _setup_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b, offsets = ctx.saved_tensors
    dy = dy.contiguous()
    if b.ndim == 3:
        da = _opaque_product(dy, b.transpose(1, 2), offsets)
        return da, _opaque_product(a.t(), dy, offsets), None
    da = _opaque_product(b, dy.transpose(1, 2), offsets).t()
    return da, _opaque_product(a.t(), dy, offsets), None


_opaque_product.register_autograd(_product_gradients, setup_context=_setup_product)


def _product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows (T, K) times the transposed matrix of their expert in (E, N, K): (T, N).

    The compiler supports grouped_mm in bf16 only: its shape function rejects the other dtypes that
    the operation computes. Those are hidden in a custom op.
    """
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    return _opaque_product(rows, weight.transpose(1, 2), offsets)


def _experts_in_turn(
    rows: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Apply the experts to their rows of (T, D), one after the other; none to no rows."""
    y = torch.empty_like(rows)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            mine = rows[start:end]
            gated = F.silu(F.linear(mine, gate[expert]).float())
            inner = gated * F.linear(mine, up[expert]).float()
            y[start:end] = F.linear(inner.to(rows.dtype), down[expert])
        start = end
    return y


@torch.library.custom_op("inl_core::experts_in_turn", mutates_args=())
def _opaque_experts(
    rows: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """`_experts_in_turn` on a CPU and without gradients, as one operation.

    When decoding, a token uses one expert, and calls would cost as much as the products.
    """
    return _experts_in_turn(rows, offsets, gate, up, down)


@_opaque_experts.register_fake
def _(rows: Tensor, offsets: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(rows)


def grouped_routed_mlp(
    x: Tensor, plan: RoutingPlan, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """`routed_mlp` by ``torch.nn.functional.grouped_mm``: each expert on its own rows only.

    The products round to the dtype of `x`, as those of an MLP of ``nn.Linear`` do. Widths that are
    not multiples of 16 bytes are padded with zeros, at the cost of a copy of the weights. On a GPU
    torch's product is one kernel in bf16; in other dtypes it synchronizes. Quantised experts are
    applied one after the other by their own products.

    Arguments, result and errors are those of `routed_mlp`, in fp32, bf16 or fp16.
    """
    check_routed_mlp(x, plan, gate, up, down)
    width = x.shape[-1]
    rows = _Permute.apply(x.reshape(-1, width), plan.order, plan.inverse)
    in_turn = None
    if are_quantized(gate, up, down):
        in_turn = _experts_in_turn
    elif x.device.type == "cpu" and not torch.is_grad_enabled():
        in_turn = _opaque_experts
    if in_turn is not None:
        y = in_turn(rows, plan.offsets, gate, up, down)
        return _Permute.apply(y, plan.inverse, plan.order).reshape(x.shape)
    rows = _aligned(rows, -1)
    gate, up, down = (_aligned(weight, -1, -2) for weight in (gate, up, down))
    gated = _product(rows, gate, plan.offsets).float()
    inner = F.silu(gated) * _product(rows, up, plan.offsets).float()
    y = _product(inner.to(x.dtype), down, plan.offsets)
    return _Permute.apply(y[:, :width], plan.inverse, plan.order).reshape(x.shape)
