"""The operations of inl_core.reference: values, gradients, dtypes, shapes, compiler, transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inl_core import ops, reference

BOUNDS = {"dt": 0.1, "beta_max": 2.0, "velocity_max": 10.0, "mu_min": 0.0, "mu_max": 2.0}
UNBOUNDED = {"dt": 0.1, "beta_max": None, "velocity_max": None, "mu_min": None, "mu_max": None}


def state(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Seeded arguments of inl_step, away from every bound."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tensors = {name: draw(*shape) for name in ("h", "v", "alpha_raw", "beta_raw", "gate_raw")}
    tensors["beta_raw"] = tensors["beta_raw"].clamp(-3.0, 1.5)
    tensors["mu"] = 0.5 + torch.rand(shape[-1], generator=generator, dtype=torch.float64)
    tensors["force"] = draw(*shape)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def test_step_is_equations_1_to_3() -> None:
    s = state(2, 3, 5, dtype=torch.float64)
    alpha, beta, gate = s["alpha_raw"].sigmoid(), F.softplus(s["beta_raw"]), s["gate_raw"].sigmoid()
    v = alpha * s["v"] - beta * (s["h"] - s["mu"]) + s["force"]
    h = s["h"] + 0.1 * gate * v
    h_next, v_next = reference.inl_step(**s, **BOUNDS)
    torch.testing.assert_close(h_next, h, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(v_next, v, rtol=1e-14, atol=1e-14)


def test_position_uses_the_clipped_velocity() -> None:
    h, v = torch.tensor([1.0]), torch.tensor([100.0])
    h_next, v_next = reference.inl_update(
        h, v, 1.0, 0.0, 1.0, torch.zeros(1), dt=1.0, velocity_max=10.0, mu_min=0.0, mu_max=2.0
    )
    assert v_next.item() == 10.0
    assert h_next.item() == 11.0  # 101 if the clip came after the position


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_velocity_bound_active_and_off(sign: float) -> None:
    s = state(4, 3) | {"force": torch.full((4, 3), sign * 50.0)}
    assert reference.inl_step(**s, **BOUNDS)[1].eq(sign * 10.0).all()
    free = reference.inl_step(**s, **(BOUNDS | {"velocity_max": None}))[1]
    assert free.abs().min() > 40.0


def test_velocity_clip_has_the_plain_gradient() -> None:
    force = torch.tensor([50.0, 1.0, -50.0], requires_grad=True)
    _, v_next = reference.inl_update(
        torch.zeros(3), None, 0.9, 0.1, 0.5, torch.zeros(3), force,
        dt=0.1, velocity_max=10.0, mu_min=0.0, mu_max=2.0,
    )  # fmt: skip
    v_next.sum().backward()
    assert force.grad is not None
    assert force.grad.tolist() == [0.0, 1.0, 0.0]


def test_beta_bound_active_and_off() -> None:
    raw = torch.tensor([-30.0, 0.0, 5.0, 1e4, torch.inf])
    zero = torch.zeros(5)
    assert reference.inl_coefficients(zero, raw, zero, beta_max=2.0)[1].max().item() == 2.0
    free = reference.inl_coefficients(zero, raw, zero, beta_max=None)[1]
    assert free[3].item() == 1e4
    assert free.min().item() >= 0.0


def test_alpha_and_gate_stay_in_the_unit_interval() -> None:
    raw = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])
    alpha, _, gate = reference.inl_coefficients(raw, raw, raw, beta_max=2.0)
    for value in (alpha, gate):
        assert value[0].item() == 0.0
        assert value[2].item() == 0.5
        assert value[4].item() == 1.0


@pytest.mark.parametrize(
    ("mu", "bounds", "used"),
    [(-3.0, (0.0, 2.0), 0.0), (5.0, (0.0, 2.0), 2.0), (-3.0, (None, 2.0), -3.0),
     (5.0, (0.0, None), 5.0), (-3.0, (None, None), -3.0)],
)  # fmt: skip
def test_mu_bounds_active_and_off(
    mu: float, bounds: tuple[float | None, float | None], used: float
) -> None:
    _, v_next = reference.inl_update(
        torch.zeros(2), None, 0.0, 1.0, 1.0, torch.full((2,), mu),
        dt=1.0, velocity_max=None, mu_min=bounds[0], mu_max=bounds[1],
    )  # fmt: skip
    assert v_next.tolist() == [used, used]


@pytest.mark.parametrize("with_force", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_velocity_equals_zero_velocity(dtype: torch.dtype, with_force: bool) -> None:
    s = state(2, 7, 4, dtype=dtype)
    if not with_force:
        s["force"] = None  # type: ignore[assignment]
    without = reference.inl_step(**(s | {"v": None}), **BOUNDS)  # type: ignore[arg-type]
    zeros = reference.inl_step(**(s | {"v": torch.zeros_like(s["h"])}), **BOUNDS)
    for a, b in zip(without, zeros, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


def test_no_velocity_makes_no_zeros_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a zeros tensor was made")

    for name in ("zeros", "zeros_like"):
        monkeypatch.setattr(torch, name, forbidden)
    s = state(2, 3)
    reference.inl_step(**(s | {"v": None}), **BOUNDS)  # type: ignore[arg-type]


def test_plain_residual_is_exact() -> None:
    s = state(3, 5, 8)
    for v in (None, s["v"]):
        h_next, v_next = reference.inl_update(
            s["h"], v, 0.0, 0.0, 1.0, torch.zeros(8), s["force"],
            dt=1.0, velocity_max=None, mu_min=None, mu_max=None,
        )  # fmt: skip
        assert torch.equal(h_next, s["h"] + s["force"])
        assert torch.equal(v_next, s["force"])


# ------------------------------------------------------------------------------------------------
# Dtypes and shapes


def test_bf16_rounds_once() -> None:
    s = state(4, 33, dtype=torch.bfloat16)
    exact = reference.inl_step(**{k: t.float() for k, t in s.items()}, **BOUNDS)
    for got, want in zip(reference.inl_step(**s, **BOUNDS), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want.bfloat16())


def test_mixed_dtypes_keep_those_of_h_and_v() -> None:
    s = state(2, 3)
    s["h"] = s["h"].bfloat16()
    h_next, v_next = reference.inl_step(**s, **BOUNDS)
    assert (h_next.dtype, v_next.dtype) == (torch.bfloat16, torch.float32)
    s["v"] = s["v"].double()
    h_next, v_next = reference.inl_step(**s, **BOUNDS)
    assert (h_next.dtype, v_next.dtype) == (torch.bfloat16, torch.float64)


def test_fp64_is_not_computed_in_fp32() -> None:
    s = state(3, 4, dtype=torch.float64)
    wide = reference.inl_step(**s, **BOUNDS)[0]
    narrow = reference.inl_step(**{k: t.float() for k, t in s.items()}, **BOUNDS)[0]
    gap = (wide - narrow).abs().max().item()
    assert 1e-12 < gap < 1e-5


def test_integers_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"floating-point.*int64"):
        reference.rms_norm(torch.arange(4))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 1), (5,)])
def test_empty_single_channel_and_flat_shapes(shape: tuple[int, ...]) -> None:
    s = {k: t.requires_grad_() for k, t in state(*shape).items()}
    h_next, v_next = reference.inl_step(**s, **BOUNDS)
    assert h_next.shape == v_next.shape == shape
    (h_next.sum() + v_next.sum()).backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in s.values())


def test_non_contiguous_equals_contiguous() -> None:
    s = state(6, 5, 4)
    strided = {k: t.transpose(0, 1) if t.ndim == 3 else t for k, t in s.items()}
    assert not strided["h"].is_contiguous()
    packed = {k: t.contiguous() for k, t in strided.items()}
    for a, b in zip(
        reference.inl_step(**strided, **BOUNDS),
        reference.inl_step(**packed, **BOUNDS),
        strict=True,
    ):
        # Vectorised and scalar loops may differ in the last bit of a sigmoid.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["h", "v", "alpha_raw", "beta_raw", "mu", "force"])
def test_nan_in_nan_out(name: str) -> None:
    s = state(3, 4)
    s[name][..., 1] = torch.nan
    h_next, v_next = reference.inl_step(**s, **BOUNDS)
    for out in (h_next, v_next):
        assert out[:, 1].isnan().all()
        assert out[:, [0, 2, 3]].isfinite().all()


def test_nan_gate_reaches_the_position() -> None:
    s = state(3, 4)
    s["gate_raw"][:] = torch.nan
    assert reference.inl_step(**s, **BOUNDS)[0].isnan().all()


# ------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("bounds", [BOUNDS, UNBOUNDED], ids=["bounded", "unbounded"])
def test_gradcheck_off_the_bounds(bounds: dict[str, float | None]) -> None:
    s = {k: t.requires_grad_() for k, t in state(2, 3, dtype=torch.float64).items()}

    def step(*values: Tensor) -> tuple[Tensor, Tensor]:
        return reference.inl_step(**dict(zip(s, values, strict=True)), **bounds)

    assert torch.autograd.gradcheck(step, tuple(s.values()))
    assert torch.autograd.gradgradcheck(step, tuple(s.values()))


def test_bounded_clamp_passes_gradients_that_lead_back() -> None:
    x = torch.tensor([-1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0], requires_grad=True)
    upstream = torch.tensor([1.0, -1.0] * 5)
    reference.bounded_clamp(x, 0.0, 2.0).backward(upstream)
    assert x.grad is not None
    # Below: only a negative gradient (x grows) passes. Above: only a positive one.
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 0.0]


def test_bounded_clamp_values_and_errors() -> None:
    x = torch.tensor([-1.0, 1.0, 3.0, torch.nan])
    torch.testing.assert_close(
        reference.bounded_clamp(x, 0.0, 2.0), x.clamp(0.0, 2.0), equal_nan=True
    )
    assert reference.bounded_clamp(x, None, None) is x
    assert reference.bounded_clamp(x, None, 2.0)[:3].tolist() == [-1.0, 1.0, 2.0]
    assert reference.bounded_clamp(x, 0.0, None)[:3].tolist() == [0.0, 1.0, 3.0]
    with pytest.raises(ValueError, match=r"minimum 3\.0.*maximum 2\.0"):
        reference.bounded_clamp(x, 3.0, 2.0)


def test_bounded_clamp_keeps_nan_gradients() -> None:
    x = torch.tensor([-1.0, 1.0, 3.0, torch.nan], requires_grad=True)
    reference.bounded_clamp(x, 0.0, 2.0).backward(torch.full((4,), torch.nan))
    assert x.grad is not None
    assert x.grad.isnan().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, once
def test_tangents_of_the_bounded_clamp_are_those_of_the_plain_clamp() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0])
    for bounds in ((0.0, 2.0), (0.0, None), (None, 2.0)):
        value, tangent = torch.func.jvp(
            lambda x, bounds=bounds: reference.bounded_clamp(x, *bounds), (x,), (torch.ones(5),)
        )
        assert torch.equal(value, x.clamp(*bounds))
        assert torch.equal(tangent, (value == x).float())


def test_func_grad_and_vmap() -> None:
    x = torch.tensor([-1.0, 1.0, 3.0])

    def loss(x: Tensor) -> Tensor:
        return (3.0 * reference.bounded_clamp(x, 0.0, 2.0)).sum()

    assert torch.func.grad(loss)(x).tolist() == [0.0, 3.0, 3.0]
    per_sample = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, -x, x + 9.0]))
    assert per_sample.tolist() == [[0.0, 3.0, 3.0], [3.0, 0.0, 0.0], [3.0, 3.0, 3.0]]


def test_step_under_func_grad_and_vmap() -> None:
    s = state(5, 4, dtype=torch.float64)
    mu = torch.tensor([-1.0, 0.5, 1.0, 3.0], dtype=torch.float64)

    def loss(mu: Tensor, h: Tensor, v: Tensor) -> Tensor:
        h_next, v_next = reference.inl_update(
            h, v, 0.9, 0.1, 0.5, mu, dt=0.1, velocity_max=10.0, mu_min=0.0, mu_max=2.0
        )
        return h_next.square().sum() + v_next.sum()

    batched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(mu, s["h"], s["v"])
    for row, h, v in zip(batched, s["h"], s["v"], strict=True):
        leaf = mu.clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, h, v), leaf)
        torch.testing.assert_close(row, want)


# ------------------------------------------------------------------------------------------------
# The compiler


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_v", [True, False])
def test_compiled_forward_and_backward(backend: str, with_v: bool) -> None:
    torch.compiler.reset()
    s = state(4, 6)
    s["beta_raw"][0] = 9.0  # beyond beta_max
    s["mu"][:2] = torch.tensor([-1.0, 3.0])  # beyond both bounds of mu
    if not with_v:
        del s["v"]
    eager = {k: t.clone().requires_grad_() for k, t in s.items()}
    traced = {k: t.clone().requires_grad_() for k, t in s.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        h_next, v_next = reference.inl_step(**({"v": None} | values), **BOUNDS)
        return h_next.square().sum() + v_next.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    want, got = loss(eager), compiled(traced)
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want)
    for name, tensor in eager.items():
        torch.testing.assert_close(
            traced[name].grad, tensor.grad, msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------------------------------------
# Sums, gates, the switch


def test_gated_residual_swiglu_and_modulation_values() -> None:
    g = torch.Generator().manual_seed(1)
    x, r = torch.randn(2, 5, 6, generator=g), torch.randn(2, 5, 6, generator=g)
    gate, shift, scale = (torch.randn(2, 6, generator=g) for _ in range(3))
    want = r + gate[:, None, :] * x
    torch.testing.assert_close(reference.gated_residual(r, x, gate), want)
    torch.testing.assert_close(reference.swiglu(x, r), F.silu(x) * r)
    want = F.rms_norm(x, (6,), eps=1e-6) * (1.0 + scale[:, None, :]) + shift[:, None, :]
    torch.testing.assert_close(reference.modulated_rms_norm(x, shift, scale), want)


def test_gate_is_per_sample_even_when_tokens_equal_batch() -> None:
    # With B = N a wrong broadcast over (N, D) would go unnoticed by shapes alone.
    x, gate = torch.ones(3, 3, 2), torch.arange(3.0)[:, None].expand(3, 2)
    out = reference.gated_residual(torch.zeros(3, 3, 2), x, gate)
    assert out[2].eq(2.0).all()
    assert out[0].eq(0.0).all()


def test_residual_keeps_its_dtype() -> None:
    x, r = torch.ones(1, 2, 4, dtype=torch.bfloat16), torch.full((1, 2, 4), 256.5)
    gate = torch.ones(1, 4, dtype=torch.bfloat16)
    out = reference.gated_residual(r, x, gate)
    assert out.dtype == torch.float32
    assert out.eq(257.5).all()
    normed, total = reference.add_rms_norm(x, r, None, 1e-6)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert total.eq(257.5).all()


@pytest.mark.parametrize("name", ["gated_residual", "swiglu", "modulated_rms_norm", "add_rms_norm"])
def test_gradcheck_of_the_small_operations(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    shapes = {
        "gated_residual": [(2, 3, 4), (2, 3, 4), (2, 4)],
        "swiglu": [(2, 3), (2, 3)],
        "modulated_rms_norm": [(2, 3, 4), (2, 4), (2, 4), (4,)],
        "add_rms_norm": [(2, 3, 4), (2, 3, 4), (4,)],
    }[name]
    values = [
        torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    assert torch.autograd.gradcheck(getattr(ops, name), values)


@pytest.mark.parametrize("name", ["inl_controlled_step", "inl_branch_epilogue"])
def test_gradcheck_of_the_fused_operations(name: str) -> None:
    shapes, bounds = {
        "inl_controlled_step": (
            [(2, 3, 4), (2, 3, 4), (2, 3, 2), (12, 2), (12,), (4,), (2, 3, 4)],
            UNBOUNDED,
        ),
        "inl_branch_epilogue": (
            [(2, 3, 4), (2, 3, 4), *[(4,)] * 4, (2, 3, 4), *[(2, 4)] * 3, (4,)],
            {key: value for key, value in UNBOUNDED.items() if key != "beta_max"},
        ),
    }[name]
    g = torch.Generator().manual_seed(3)
    values = [
        torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    assert torch.autograd.gradcheck(lambda *x: getattr(ops, name)(*x, **bounds), values)


def test_ops_has_every_operation_of_the_reference() -> None:
    functions = {name for name in reference.__all__ if name != "BoundedClamp"}
    switch = {"Backend", "current_backend", "use_backend"}
    assert set(ops.__all__) == functions | switch
    assert all(callable(getattr(ops, name)) for name in functions)
