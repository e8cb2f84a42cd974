"""One public function per operation; selects the implementation.

Modules call ``ops.inl_step(...)`` independently of the backend. There are two:

* "reference", the definition in `inl_core.reference`: plain PyTorch, transparent to the compiler,
  which fuses it with its neighbours;
* "triton", the kernels in `inl_core.kernels`: custom ops with their own backward, one pass over
  memory each, opaque to the compiler.

"auto" uses the reference on a CPU, and on a CUDA device what the table `AUTO` says. The environment
variable ``INL_BACKEND`` (auto, reference or triton), read once at import, and the context manager
`use_backend` override it, compiled or not.

With any backend the reference computes what the kernels do not support: fp64, rows wider than
16384, raw coefficients of `inl_step` shaped neither like h nor (D,) nor (1,), and everything under
a ``torch.func`` transform (grad, vmap, jvp), which cannot see into a kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from inl_core import cpu_attention, reference, segments
from inl_core.reference import (
    bounded_clamp,
    inl_branch_epilogue,
    inl_coefficients,
    inl_update,
    looped_step,
    rotate,
)
from inl_core.reference.dynamics import controller_output
from inl_core.reference.layers import causal_mask, query_groups
from inl_core.tracing import settled_while_tracing, transformed

__all__ = [
    "Backend",
    "add_rms_norm",
    "attention",
    "bounded_clamp",
    "current_backend",
    "gated_residual",
    "gated_residual_norm",
    "inl_branch_epilogue",
    "inl_coefficients",
    "inl_controlled_step",
    "inl_step",
    "inl_update",
    "looped_step",
    "modulated_rms_norm",
    "qk_norm_rope",
    "rms_norm",
    "rotate",
    "routed_mlp",
    "swiglu",
    "use_backend",
]

Backend = Literal["auto", "reference", "triton"]
"""Names of the backends; see the module's docstring."""

P = ParamSpec("P")
T = TypeVar("T")

_MAX_WIDTH = 16384

MOST_KEYS_OF_CPU_ATTENTION = 512
"""Most keys for which bf16 attention on a CPU is computed by `inl_core.cpu_attention`, which keeps
the weights of every query. In the rows of `benchmarks.speed.bench_attention` it trains faster than
torch's fused attention up to 512 keys; at 1024 they are level, and torch's keeps nothing."""

AUTO: dict[str, tuple[Backend, Backend]] = {
    # operation: (eager, inside torch.compile)
    "inl_step": ("triton", "reference"),
    "rms_norm": ("triton", "reference"),
    "add_rms_norm": ("triton", "reference"),
    "modulated_rms_norm": ("triton", "reference"),
    "gated_residual": ("triton", "reference"),
    "gated_residual_norm": ("triton", "reference"),
    "qk_norm_rope": ("triton", "triton"),
    "swiglu": ("triton", "reference"),
    "routed_mlp": ("triton", "triton"),
}
"""Every operation with a kernel, and what "auto" is on a GPU: whatever was faster in the committed
rows of `benchmarks.speed.bench_ops`, forward and backward together. A test compares this table with
the rows."""


def _checked(name: str, origin: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{origin} must be one of {', '.join(get_args(Backend))}, got {name!r}")
    return name  # type: ignore[return-value]


# A plain global: the compiler guards on its value and recompiles when it changes.
_backend: Backend = _checked(os.environ.get("INL_BACKEND", "auto"), "INL_BACKEND")
_triton_installed = importlib.util.find_spec("triton") is not None

_kernels: dict[str, tuple[Callable[..., Any], Callable[..., bool] | None]] = {}


def current_backend() -> Backend:
    """The current backend: "auto", "reference" or "triton"."""
    return _backend


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Set the backend inside a ``with`` block; blocks may nest.

    It applies to the whole process, not to a thread. A backward pass uses the backend of its
    forward. With "triton" CPU tensors are an error, unless ``TRITON_INTERPRET=1`` was set before
    the first import of a kernel.

    Raises:
        ValueError: On another name, or on "triton" if triton is not installed.
    """
    global _backend
    before = _backend
    chosen = _checked(name, "backend")
    if chosen == "triton" and not _triton_installed:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    _backend = chosen
    try:
        yield
    finally:
        _backend = before


def _has_kernels(x: Tensor) -> bool:
    """Whether the device of `x` can run the kernels."""
    return x.is_cuda and _triton_installed


def takes_kernel(name: str, tensors: list[Tensor]) -> bool:
    """Whether a Triton kernel computes the operation `name` on these arguments."""
    first = tensors[0]
    if _backend == "reference":
        return False
    # The compiler takes is_compiling() as a constant.
    if _backend == "auto" and (
        not _has_kernels(first) or AUTO[name][torch.compiler.is_compiling()] == "reference"
    ):
        return False
    if first.ndim == 0 or not 1 <= first.shape[-1] <= _MAX_WIDTH:
        return False
    return all(x.dtype != torch.float64 for x in tensors) and not transformed()


def _switched(definition: Callable[P, T]) -> Callable[P, T]:
    """Dispatch the reference function `definition` to its kernel where possible.

    The kernel is the function of the same name and signature in the kernel file of that name. That
    file may define ``takes``, which returns whether the kernel supports these arguments.
    """
    name = definition.__name__

    @functools.wraps(definition)
    def operation(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if takes_kernel(name, tensors):
            _load_kernels()
            kernel, takes = _kernels[name]
            if takes is None or takes(*args, **kwargs):
                return kernel(*args, **kwargs)
        return definition(*args, **kwargs)

    return operation


@settled_while_tracing
def _load_kernels() -> bool:
    """Import all kernel files on first use: this takes seconds and fixes the interpreter mode.

    All at once, so that `_kernels` does not change after a trace has read it.
    """
    if not _kernels:
        for name in AUTO:
            module = importlib.import_module(f"inl_core.kernels.{name}")
            _kernels[name] = (getattr(module, name), getattr(module, "takes", None))
    return True


inl_step = _switched(reference.inl_step)
rms_norm = _switched(reference.rms_norm)
add_rms_norm = _switched(reference.add_rms_norm)
modulated_rms_norm = _switched(reference.modulated_rms_norm)
gated_residual = _switched(reference.gated_residual)
gated_residual_norm = _switched(reference.gated_residual_norm)
qk_norm_rope = _switched(reference.qk_norm_rope)
swiglu = _switched(reference.swiglu)


def inl_controlled_step(
    h: Tensor, v: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor, mu: Tensor,
    force: Tensor | None = None, **bounds: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`inl_core.reference.inl_controlled_step`: the product, then the step of `inl_step`.

    A kernel that held the product as well took 1.6 to 1.8 times as long as these two in the rows.
    """
    raw = controller_output(h, v, hidden, weight, bias, mu, force)
    return inl_step(h, v, *raw, mu, force, **bounds)


def routed_mlp(
    x: Tensor, plan: segments.RoutingPlan, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """`inl_core.reference.routed_mlp`, with each expert on its own rows only.

    "auto" uses the kernel on a GPU and torch's grouped matrix product elsewhere. fp64 uses the
    definition, as does everything under a ``torch.func`` transform or the backend "reference".
    Experts quantised by torchao use its products. Arguments are cast under autocast as by
    ``F.linear``.

    Args:
        x: (..., D) with T rows.
        plan: Plan of T tokens and E experts, from `inl_core.make_routing_plan`.
        gate: (E, I, D).
        up: (E, I, D).
        down: (E, D, I).

    Returns:
        Tensor shaped like `x`, in its dtype (under autocast in the dtype of autocast).

    Raises:
        ValueError: If a shape or a dtype does not fit.
    """
    x, gate, up, down = segments.as_linear_casts(x, gate, up, down)
    if _backend == "reference" or x.dtype == torch.float64 or transformed():
        return reference.routed_mlp(x, plan, gate, up, down)
    quantized = segments.are_quantized(gate, up, down)
    if not quantized and takes_kernel("routed_mlp", [x, gate, up, down]):
        _load_kernels()
        return _kernels["routed_mlp"][0](x, plan, gate, up, down)
    return segments.grouped_routed_mlp(x, plan, gate, up, down)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention; arguments and result as of `inl_core.reference.attention`.

    torch's `scaled_dot_product_attention`, except where `takes_cpu_attention`. The backend
    "reference" uses the definition, as does everything under a ``torch.func`` transform. "triton"
    has no effect, because there is no kernel. Autocast applies as it does to torch's function.
    """
    if _backend == "reference" or transformed():
        return reference.attention(q, k, v, mask, causal=causal, scale=scale)
    groups = query_groups(q, k)
    products = takes_cpu_attention(q, k, v, mask)
    if causal and (products or mask is not None or q.shape[2] != k.shape[2]):
        allowed = causal_mask(q, k)
        if mask is None:
            mask = allowed[None, None]
        elif mask.dtype == torch.bool:
            mask = mask & allowed
        else:
            mask = mask.masked_fill(~allowed, -torch.inf)
        causal = False
    if products:
        q, k, v = segments.as_linear_casts(q, k, v)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return cpu_attention.attention(q, k, v, mask, factor)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )


def takes_cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
    """Whether `attention` computes these arguments with `inl_core.cpu_attention`.

    bf16, by dtype or by autocast, on a CPU, with a boolean mask or none, several queries and at
    most `MOST_KEYS_OF_CPU_ATTENTION` keys. Not in an exported program, which others run.
    """
    if q.device.type != "cpu" or _backend == "reference" or transformed():
        return False
    if torch.is_autocast_enabled("cpu"):
        bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16 and q.dtype != torch.float64
    else:
        bf16 = q.dtype == k.dtype == v.dtype == torch.bfloat16
    return (
        bf16
        and q.shape[2] > 1
        and 1 <= k.shape[2] <= MOST_KEYS_OF_CPU_ATTENTION
        and q.shape[-1] == v.shape[-1]
        and q.numel() > 0
        and (mask is None or mask.dtype == torch.bool)
        and not torch.compiler.is_exporting()
    )
