"""The per-sample (AdaLN) kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from checks import (
    Op,
    assert_as_good_as_eager,
    assert_empty_batch_works,
    assert_registered,
    assert_same_under_compile,
    gradients_of,
    leaves_of,
    outputs_of,
    randn,
)

from inl_core import reference
from inl_core.kernels.gated_residual import (
    gated_residual,
    gated_residual_bwd,
    gated_residual_fwd,
)
from inl_core.kernels.gated_residual_norm import (
    gated_residual_norm,
    gated_residual_norm_bwd,
    gated_residual_norm_fwd,
)
from inl_core.kernels.modulated_rms_norm import (
    modulated_rms_norm,
    modulated_rms_norm_bwd,
    modulated_rms_norm_fwd,
)

BF16, FP32 = torch.bfloat16, torch.float32
# (B, ..., D): odd sizes, several programs a sample, several blocks of tokens a sample, one token a
# sample, no token dimension
SHAPES = [(1, 37, 65), (3, 37, 65), (2, 3, 5, 48), (2, 4, 1200), (10, 1, 48), (8, 33)]


# ------------------------------------------------------------------------------------------------
# modulated_rms_norm


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_modulated_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), 1 + 0.5 * randn(shape[-1], seed=1, dtype=dtype)
    shift, scale = (randn(shape[0], shape[-1], seed=s, dtype=dtype) for s in (2, 3))
    assert_as_good_as_eager(modulated_rms_norm, x, shift, scale, weight)
    assert_as_good_as_eager(modulated_rms_norm, x, shift, scale, None, eps=1e-3)


def test_modulated_rms_norm_mixed_dtypes() -> None:
    x, weight = randn(3, 10, 48, dtype=BF16), randn(48, seed=1)
    shift, scale = randn(3, 48, seed=2), randn(3, 48, seed=3, dtype=BF16)
    assert_as_good_as_eager(modulated_rms_norm, x, shift, scale, weight)


def test_modulated_rms_norm_of_one_channel() -> None:
    x, shift, scale = randn(40, 9, 1), randn(40, 1, seed=1), randn(40, 1, seed=2)
    assert_as_good_as_eager(modulated_rms_norm, x, shift, scale, None, eps=0.5)


def test_modulated_rms_norm_strided_and_broadcast() -> None:
    x = randn(6, 3, 50)[..., 3:36].transpose(0, 1)
    shift, scale, _ = randn(3, 99, seed=1).chunk(3, dim=-1)  # one projection makes them all
    assert_as_good_as_eager(modulated_rms_norm, x, shift, scale, randn(33, seed=2))
    assert_as_good_as_eager(modulated_rms_norm, x, shift[:, None], scale[:, None])
    assert_as_good_as_eager(modulated_rms_norm, x, shift[:1], scale[:1], randn(33, seed=2))
    per_token = randn(3, 6, 33, seed=3), randn(3, 6, 33, seed=4)
    assert_as_good_as_eager(modulated_rms_norm, x, *per_token, randn(33, seed=2))


def test_modulated_rms_norm_empty() -> None:
    assert_empty_batch_works(modulated_rms_norm, randn(0, 3, 8), randn(0, 8), randn(0, 8), randn(8))
    assert_empty_batch_works(modulated_rms_norm, randn(2, 0, 8), randn(2, 8), randn(2, 8), None)


def test_modulated_rms_norm_nan_stays_in_its_sample() -> None:
    x, shift, scale = randn(3, 9, 12), randn(3, 12, seed=1), randn(3, 12, seed=2)
    x[1, 4, 3] = torch.nan
    leaves = [t.requires_grad_() for t in (x, shift, scale)]
    y = modulated_rms_norm(*leaves)
    dx, dshift, dscale = torch.autograd.grad(y, leaves, randn(3, 9, 12, seed=3))
    token = torch.zeros(3, 9, dtype=torch.bool)
    token[1, 4] = True
    for rowwise in (y, dx):
        assert torch.equal(rowwise.isnan().all(-1), token)
        assert torch.equal(rowwise.isnan().any(-1), token)
    assert not dshift.isnan().any()
    assert torch.equal(dscale.isnan().any(-1), torch.tensor([False, True, False]))


def test_modulated_rms_norm_without_modulation_is_rms_norm() -> None:
    x, zeros = randn(2, 5, 8), torch.zeros(2, 8)
    torch.testing.assert_close(modulated_rms_norm(x, zeros, zeros), reference.rms_norm(x))


def test_modulated_rms_norm_registration_and_compile() -> None:
    x, weight = randn(3, 5, 12).requires_grad_(), randn(12, seed=1).requires_grad_()
    shift, scale = (randn(3, 12, seed=s).requires_grad_() for s in (2, 3))
    assert_registered(modulated_rms_norm_fwd, x, shift, scale, weight, 1e-6)
    assert_registered(
        modulated_rms_norm_bwd, randn(3, 5, 12), x.detach(), scale.detach(), None, 1e-6, BF16
    )
    half = randn(3, 5, 12, dtype=BF16)
    assert_same_under_compile(modulated_rms_norm, half, shift, scale, weight)
    assert_same_under_compile(modulated_rms_norm, half, shift[:, None], scale[:, None])


def test_modulated_rms_norm_errors_name_the_value() -> None:
    x = randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"shift must have shape \(2, 4\).*got \(3, 4\)"):
        modulated_rms_norm(x, randn(3, 4), randn(3, 4))
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 4\).*got \(2, 1\)"):
        modulated_rms_norm(x, randn(2, 4), randn(2, 1))
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 4\), \(2, 5, 4\)\]"):
        modulated_rms_norm(x, randn(2, 4), randn(2, 5, 4))


# ------------------------------------------------------------------------------------------------
# gated_residual


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 9, 1)])
def test_gated_residual(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    residual, x = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    gate = randn(shape[0], shape[-1], seed=2, dtype=dtype)
    assert_as_good_as_eager(gated_residual, residual, x, gate)


@pytest.mark.parametrize("dtypes", [(FP32, BF16, BF16), (BF16, FP32, BF16), (BF16, BF16, FP32)])
def test_gated_residual_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    residual, x = randn(3, 10, 48, dtype=dtypes[0]), randn(3, 10, 48, seed=1, dtype=dtypes[1])
    gate = randn(3, 48, seed=2, dtype=dtypes[2])
    assert_as_good_as_eager(gated_residual, residual, x, gate)


def test_gated_residual_strided_broadcast_and_empty() -> None:
    residual, x = randn(6, 3, 50)[..., 3:36].transpose(0, 1), randn(3, 6, 33, seed=1)
    gate = randn(3, 99, seed=2).chunk(3, dim=-1)[1]
    assert_as_good_as_eager(gated_residual, residual, x, gate)
    assert_as_good_as_eager(gated_residual, residual, x, gate[:1, None])
    assert_empty_batch_works(gated_residual, randn(0, 3, 8), randn(0, 3, 8), randn(0, 8))
    assert_empty_batch_works(gated_residual, randn(2, 0, 8), randn(2, 0, 8), randn(2, 8))


def test_gated_residual_nan_stays_at_its_element() -> None:
    residual, x, gate = randn(3, 9, 12), randn(3, 9, 12, seed=1), randn(3, 12, seed=2)
    x[1, 4, 3] = torch.nan
    leaf = gate.requires_grad_()
    total = gated_residual(residual, x, leaf)
    (dgate,) = torch.autograd.grad(total.sum(), leaf)
    assert torch.equal(total.isnan(), x.isnan())
    assert torch.equal(dgate.isnan(), x.isnan().any(1))


def test_gated_residual_registration_and_compile() -> None:
    residual, x = (randn(3, 5, 12, seed=s).requires_grad_() for s in (0, 1))
    gate = randn(3, 12, seed=2).requires_grad_()
    assert_registered(gated_residual_fwd, residual, x, gate)
    assert_registered(gated_residual_bwd, randn(3, 5, 12), x.detach(), gate.detach())
    assert_same_under_compile(gated_residual, randn(3, 5, 12, dtype=BF16), x, gate)


# ------------------------------------------------------------------------------------------------
# gated_residual_norm


def test_the_definition_of_gated_residual_norm_is_its_two_steps() -> None:
    residual, x = randn(3, 5, 12).double(), randn(3, 5, 12, seed=1).double()
    gate, shift, scale = (randn(3, 12, seed=s).double() for s in (2, 3, 4))
    weight = randn(12, seed=5).double()
    y, total = reference.gated_residual_norm(residual, x, gate, shift, scale, weight, 1e-3)
    assert torch.equal(total, reference.gated_residual(residual, x, gate))
    want = reference.modulated_rms_norm(total, shift, scale, weight, 1e-3)
    assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    residual, x = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    rows = [randn(shape[0], shape[-1], seed=s, dtype=dtype) for s in (2, 3, 4)]
    weight = 1 + 0.5 * randn(shape[-1], seed=5, dtype=dtype)
    assert_as_good_as_eager(gated_residual_norm, residual, x, *rows, weight)
    assert_as_good_as_eager(gated_residual_norm, residual, x, *rows, None, eps=1e-3)


@pytest.mark.parametrize("dtypes", [(FP32, BF16), (BF16, FP32)])
def test_gated_residual_norm_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    """With x in fp32 and a bf16 residual, norm and gradients must see the sum unrounded."""
    residual, x = randn(3, 10, 48, dtype=dtypes[0]), randn(3, 10, 48, seed=1, dtype=dtypes[1])
    gate, shift, scale = (
        randn(3, 48, seed=s, dtype=d) for s, d in ((2, BF16), (3, FP32), (4, BF16))
    )
    assert_as_good_as_eager(gated_residual_norm, residual, x, gate, shift, scale, randn(48, seed=5))


def test_gated_residual_norm_strided_one_channel_and_empty() -> None:
    residual, x = randn(6, 3, 50)[..., 3:36].transpose(0, 1), randn(3, 6, 33, seed=1)
    rows = randn(3, 99, seed=2).chunk(3, dim=-1)
    assert_as_good_as_eager(gated_residual_norm, residual, x, *rows)
    rows = [randn(40, 1, seed=s) for s in (2, 3, 4)]
    one = randn(40, 9, 1), randn(40, 9, 1, seed=1)
    assert_as_good_as_eager(gated_residual_norm, *one, *rows, eps=0.5)
    for shape in ((0, 3, 8), (2, 0, 8)):
        rows = [randn(shape[0], 8) for _ in range(3)]
        assert_empty_batch_works(gated_residual_norm, randn(*shape), randn(*shape), *rows, randn(8))


def test_gated_residual_norm_with_one_result_unused() -> None:
    arguments = [randn(2, 3, 8), randn(2, 3, 8, seed=1)]
    arguments += [randn(2, 8, seed=s) for s in (2, 3, 4)] + [randn(8, seed=5)]
    for used in (0, 1):
        gradients = []
        for op in (gated_residual_norm, reference.gated_residual_norm):
            leaves = [a.clone().requires_grad_() for a in arguments]
            op(*leaves)[used].square().sum().backward()
            gradients.append([torch.zeros_like(a) if a.grad is None else a.grad for a in leaves])
        torch.testing.assert_close(*gradients)


def test_gated_residual_norm_nan_stays_in_its_sample() -> None:
    residual, x = randn(3, 9, 12), randn(3, 9, 12, seed=1)
    x[1, 4, 3] = torch.nan
    leaves = [x, *(randn(3, 12, seed=s) for s in (2, 3, 4))]
    leaves = [t.requires_grad_() for t in leaves]
    y, total = gated_residual_norm(residual, *leaves)
    dx, *sums = torch.autograd.grad(y, leaves, randn(3, 9, 12, seed=5))
    assert torch.equal(total.isnan(), x.isnan())
    for rowwise in (y, dx):
        assert torch.equal(rowwise.isnan().all(-1), x.isnan().any(-1))
        assert torch.equal(rowwise.isnan().any(-1), x.isnan().any(-1))
    for gradient in sums:
        assert not gradient[[0, 2]].isnan().any()


def test_gated_residual_norm_registration_and_compile() -> None:
    residual, x = (randn(3, 5, 12, seed=s).requires_grad_() for s in (0, 1))
    rows = [randn(3, 12, seed=s).requires_grad_() for s in (2, 3, 4)]
    weight = randn(12, seed=5).requires_grad_()
    assert_registered(gated_residual_norm_fwd, residual, x, *rows, weight, 1e-6)
    constants = [t.detach() for t in (residual, x, rows[0], rows[2])]
    assert_registered(gated_residual_norm_bwd, randn(3, 5, 12), None, *constants, None, 1e-6, BF16)
    half = randn(3, 5, 12, dtype=BF16)
    assert_same_under_compile(gated_residual_norm, half, half, *rows, weight)
    assert_same_under_compile(gated_residual_norm, residual, half, *rows, None)


@pytest.mark.parametrize("op", [modulated_rms_norm, gated_residual_norm])
def test_without_eps_tokens_beyond_the_last_contribute_nothing(op: Op) -> None:
    """Blocks of 4 tokens over 5 of them; the empty ones must not become 0 · inf."""
    x, rows = randn(2, 5, 256), [randn(2, 256, seed=s) for s in (1, 2, 3)]
    arguments = [x, *rows[:2]] if op is modulated_rms_norm else [x, randn(2, 5, 256, seed=4), *rows]
    results = []
    for function in (op, getattr(reference, op.__name__)):
        leaves = leaves_of(arguments)
        outputs = outputs_of(function, leaves, {"eps": 0.0})
        down = [randn(2, 5, 256, seed=5)] * len(outputs)
        results.append(outputs + gradients_of(outputs, leaves, down))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_gated_residual_errors_name_the_value() -> None:
    x, row = randn(2, 5, 4), randn(2, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 5, 4\), got \(2, 4\)"):
        gated_residual(x, row, row)
    with pytest.raises(ValueError, match=r"gate must have shape \(2, 4\).*got \(4,\)"):
        gated_residual_norm(x, x, row[0], row, row)
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 4\), \(2, 5, 4\)\]"):
        gated_residual_norm(x, x, x, row, row)
