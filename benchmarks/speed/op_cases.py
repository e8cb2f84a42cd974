"""Cases for measurements and checks on a device: every operation with arguments of a given size.

A case names its operation (of `inl_core.ops`, with its definition in `inl_core.reference`) and the
number of tensors of (tokens × D) elements that its forward and backward move at least.
"""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from inl_core import make_routing_plan, ops, reference, rotary_1d

HEAD_DIM = 64
BOUNDS = {"dt": 0.1, "beta_max": 2.0, "velocity_max": 10.0, "mu_min": 0.0, "mu_max": 2.0}


@dataclass
class Case:
    """An operation and its arguments; tensors that need a gradient are leaves."""

    name: str
    op: str
    arguments: list
    forward: int = 0  # tensors of (tokens × D) to move
    backward: int = 0
    flops: int = 0  # of the forward; the backward has twice as many
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    def leaves(self):
        return [a for a in self.arguments if isinstance(a, torch.Tensor) and a.requires_grad]

    def run(self, function):
        """Outputs of `function` (an operation of this signature) as a list."""
        results = function(*self.arguments, **self.options)
        return [results] if isinstance(results, torch.Tensor) else list(results)

    def changed(self, change):
        """The case with `change` applied to its floating-point tensors, leaves again."""

        def one(value):
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                return value
            return change(value.detach()).requires_grad_(value.requires_grad)

        return Case(
            self.name, self.op, [one(a) for a in self.arguments], self.forward, self.backward,
            self.flops, self.options, self.shape,
        )  # fmt: skip


class _Maker:
    """Random tensors of one size, the same in every run."""

    def __init__(self, samples, tokens, width, dtype, device):
        self.samples, self.tokens, self.width = samples, tokens, width
        self.dtype, self.device = dtype, device
        self.random = torch.Generator(device).manual_seed(0)

    def randn(self, *shape, scale=1.0, dtype=None):
        x = torch.randn(*shape, generator=self.random, device=self.device)
        return (scale * x).to(dtype or self.dtype).requires_grad_()

    def rows(self, count):
        return [self.randn(self.samples, self.tokens, self.width) for _ in range(count)]

    def per_sample(self, count):
        return [self.randn(self.samples, self.width) for _ in range(count)]

    def channel(self, count=1):
        return [self.randn(self.width, dtype=torch.float32) for _ in range(count)]


def _inl_token(m):
    return Case("inl_step token", "inl_step", [*m.rows(5), *m.channel()], 7, 12, options=BOUNDS)


def _inl_channel(m):
    return Case("inl_step channel", "inl_step", [*m.rows(2), *m.channel(4)], 4, 6, options=BOUNDS)


def _rms_norm(m):
    return Case("rms_norm", "rms_norm", [*m.rows(1), *m.channel()], 2, 3)


def _add_rms_norm(m):
    return Case("add_rms_norm", "add_rms_norm", [*m.rows(2), *m.channel()], 4, 4)


def _modulated(m):
    return Case("modulated_rms_norm", "modulated_rms_norm", [*m.rows(1), *m.per_sample(2)], 2, 3)


def _gated(m):
    return Case("gated_residual", "gated_residual", [*m.rows(2), *m.per_sample(1)], 3, 3)


def _gated_norm(m):
    return Case("gated_residual_norm", "gated_residual_norm", [*m.rows(2), *m.per_sample(3)], 4, 6)


def _qk(m):
    head_dim = HEAD_DIM if m.width % HEAD_DIM == 0 else m.width
    q, k = (m.randn(m.samples, m.tokens, m.width // head_dim, head_dim) for _ in range(2))
    weights = [m.randn(head_dim, dtype=torch.float32) for _ in range(2)]
    tables = rotary_1d(m.tokens, head_dim, device=m.device)
    return Case("qk_norm_rope", "qk_norm_rope", [q, k, *weights, *tables], 4, 6)


def _swiglu(m):
    return Case("swiglu", "swiglu", m.rows(2), 3, 5)


BANDWIDTH = (
    _inl_token, _inl_channel, _rms_norm, _add_rms_norm, _modulated, _gated, _gated_norm, _qk,
    _swiglu,
)  # fmt: skip


def bandwidth_cases(samples, tokens, width, dtype, device):
    """Yield cases limited by memory bandwidth, one at a time: all at once would not fit."""
    for build in BANDWIDTH:
        if build is _qk and width % 2:
            continue  # rotary embedding rotates pairs of channels
        case = build(_Maker(samples, tokens, width, dtype, device))
        case.shape = (samples * tokens, width)
        yield case


def routed_case(tokens, width, inner, experts, dtype, device):
    """`routed_mlp` on random ids, which give each expert about as many tokens."""
    m = _Maker(1, tokens, width, dtype, device)
    ids = torch.randint(experts, (tokens,), generator=m.random, device=device)
    weights = [
        m.randn(experts, out, fan_in, scale=fan_in**-0.5)
        for out, fan_in in ((inner, width), (inner, width), (width, inner))
    ]
    return Case(
        "routed_mlp", "routed_mlp",
        [m.randn(tokens, width), make_routing_plan(ids, experts), *weights],
        flops=6 * tokens * width * inner, shape=(tokens, width, inner, experts),
    )  # fmt: skip


def mask_loop(x, plan, gate, up, down):
    """The loop that `routed_mlp` replaces: per expert a mask, three products and a device sync."""
    ids = torch.searchsorted(plan.offsets, plan.inverse.int(), right=True)
    y = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        mine = ids == e
        inner = ops.swiglu(F.linear(x[mine], gate[e]), F.linear(x[mine], up[e]))
        y[mine] = F.linear(inner, down[e])
    return y


def dense_mlp(x, plan, gate, up, down):
    """A dense MLP as wide as one expert: the products that routing needs at least."""
    return F.linear(ops.swiglu(F.linear(x, gate[0]), F.linear(x, up[0])), down[0])


def chosen(op, backend):
    """An operation that runs under one backend."""

    def run(*arguments, **options):
        with ops.use_backend(backend):
            return getattr(ops, op)(*arguments, **options)

    return run


def implementations(case, device):
    """{backend: function} of a case; "compile" is the definition under torch.compile."""
    definition = getattr(reference, case.op)
    if case.op == "routed_mlp":
        found = {
            "dense": dense_mlp,
            "dense compile": torch.compile(dense_mlp),
            "mask loop": mask_loop,
            "grouped_mm": ops.segments.grouped_routed_mlp,
        }
    else:
        found = {"eager": definition, "compile": torch.compile(definition, fullgraph=True)}
    if torch.device(device).type == "cuda":
        found["triton"] = chosen(case.op, "triton")
    if case.op == "rms_norm":
        found["F.rms_norm"] = lambda x, w: F.rms_norm(x, x.shape[-1:], w.to(x.dtype), 1e-6)
    if importlib.util.find_spec("liger_kernel") and torch.device(device).type == "cuda":
        from liger_kernel.transformers import functional as liger

        if case.op == "rms_norm":
            found["liger"] = lambda x, w: liger.liger_rms_norm(x, w, 1e-6)
        if case.op == "swiglu":
            found["liger"] = liger.liger_swiglu
    return found
