"""RMS norms against torch's own, and rotary embeddings on a line and on a grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inl_core import ModulatedRMSNorm, RMSNorm, apply_rotary, ops, rotary_1d, rotary_2d


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------
# Norms


@pytest.mark.parametrize("shape", [(2, 3, 8), (4, 1), (5, 7), (0, 8), (3, 2, 2, 16)])
def test_rms_norm_matches_torch(shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape), randn(shape[-1], seed=1)
    want = F.rms_norm(x, shape[-1:], weight, eps=1e-6)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), want, rtol=1e-13, atol=1e-13)
    want = F.rms_norm(x, shape[-1:], eps=1e-3)
    torch.testing.assert_close(ops.rms_norm(x, None, 1e-3), want, rtol=1e-13, atol=1e-13)


def test_rms_norm_backward_with_a_weight_that_is_not_one() -> None:
    x, weight, dy = randn(4, 8), 0.5 + 2.0 * randn(8, seed=1).abs(), randn(4, 8, seed=2)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ops.rms_norm(leaf, weight, 1e-6), leaf, dy)
    reference_leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(
        F.rms_norm(reference_leaf, (8,), weight, 1e-6), reference_leaf, dy
    )
    torch.testing.assert_close(dx, want, rtol=1e-12, atol=1e-12)

    # The formula of the originals puts the weight outside the bracket; this test must see it.
    r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    mean = (x * weight * dy).mean(-1, keepdim=True)
    right = r * (weight * dy - x * r.square() * mean)
    wrong = r * weight * (dy - x * r.square() * mean)
    torch.testing.assert_close(dx, right, rtol=1e-12, atol=1e-12)
    assert (dx - wrong).norm() / dx.norm() > 0.05


def test_rms_norm_gradcheck() -> None:
    x, weight = randn(3, 5).requires_grad_(), randn(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), (x, weight))


def test_rms_norm_computes_in_fp32() -> None:
    x = randn(4, 300, dtype=torch.float32).bfloat16()
    out = ops.rms_norm(x, None, 1e-6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.rms_norm(x.float(), None, 1e-6).bfloat16())
    large = torch.full((2, 4), 3e4, dtype=torch.float16)  # its square overflows fp16
    assert ops.rms_norm(large, None, 1e-6).eq(1.0).all()


def test_rms_norm_nan_and_zero_rows() -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = torch.nan
    out = ops.rms_norm(x, None, 1e-6)
    assert out[1].isnan().all()
    assert out[[0, 2]].eq(0.0).all()


def test_add_rms_norm_is_the_norm_of_the_sum() -> None:
    x, residual, weight = randn(2, 3, 8), randn(2, 3, 8, seed=1), randn(8, seed=2)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (8,), weight, 1e-6))


def test_norm_modules() -> None:
    x = randn(2, 5, 8, dtype=torch.float32)
    norm = RMSNorm(8, eps=1e-5)
    assert norm.weight is not None
    assert norm.weight.tolist() == [1.0] * 8
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), eps=1e-5))
    assert RMSNorm(8, elementwise_affine=False).weight is None
    assert list(RMSNorm(8, elementwise_affine=False).parameters()) == []
    assert "8, eps=1e-05, elementwise_affine=True" in repr(norm)

    modulated = ModulatedRMSNorm(8)
    assert list(modulated.parameters()) == []
    shift, scale = randn(2, 8, seed=1, dtype=torch.float32), randn(2, 8, seed=2).float()
    want = F.rms_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated(x, shift, scale), want)


@pytest.mark.parametrize("cls", [RMSNorm, ModulatedRMSNorm])
def test_norm_errors_name_the_value(cls: type[RMSNorm] | type[ModulatedRMSNorm]) -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        cls(0)
    with pytest.raises(ValueError, match=r"eps must not be negative, got -1\.0"):
        cls(4, eps=-1.0)


# ------------------------------------------------------------------------------------------------
# Rotary


def test_rotary_1d_values() -> None:
    cos, sin = rotary_1d(5, 8)
    assert cos.shape == sin.shape == (5, 4)
    assert cos.dtype == sin.dtype == torch.float32
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    angles = torch.arange(5, dtype=torch.float64)[:, None] * frequencies
    torch.testing.assert_close(cos, angles.cos().float())
    torch.testing.assert_close(sin, angles.sin().float())
    by_position = rotary_1d(torch.tensor([3, 1]), 8)
    assert torch.equal(by_position[0], cos[[3, 1]])
    assert rotary_1d(0, 8)[0].shape == (0, 4)


def test_rotate_is_the_half_split_rotation() -> None:
    x = randn(2, 5, 3, 8)
    cos, sin = rotary_1d(5, 8)
    cos, sin = cos.double(), sin.double()
    cos2, sin2 = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)  # transformers' rotate_half
    torch.testing.assert_close(apply_rotary(x, cos, sin), x * cos2 + turned * sin2)
    torch.testing.assert_close(apply_rotary(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(apply_rotary(x, cos, sin)[:, 0], x[:, 0])


def test_rotate_takes_a_table_per_sample() -> None:
    x = randn(2, 5, 3, 8)
    cos, sin = (t.double() for t in rotary_1d(10, 8))
    both = apply_rotary(x, cos.reshape(2, 5, 4), sin.reshape(2, 5, 4))
    torch.testing.assert_close(both[1:], apply_rotary(x[1:], cos[5:], sin[5:]))


def scores(cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """q·k of one query and one key placed at every pair of tokens: (N, N)."""
    n = len(cos)
    q = apply_rotary(randn(head_dim, seed=3).expand(1, n, 1, head_dim), cos.double(), sin.double())
    k = apply_rotary(randn(head_dim, seed=4).expand(1, n, 1, head_dim), cos.double(), sin.double())
    return q[0, :, 0] @ k[0, :, 0].T


def test_rotary_1d_depends_on_the_offset_alone() -> None:
    s = scores(*rotary_1d(12, 8), 8)
    for offset in range(-11, 12):
        diagonal = s.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (s.diagonal(1)[0] - s.diagonal(2)[0]).abs() > 1e-2


def test_rotary_1d_is_relative_at_large_positions() -> None:
    near = scores(*rotary_1d(torch.tensor([0, 7]), 32), 32)[0, 1]
    far = scores(*rotary_1d(torch.tensor([100_000, 100_007]), 32), 32)[0, 1]
    torch.testing.assert_close(far, near, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (5, 2)])
def test_rotary_2d_depends_on_the_offsets_alone(height: int, width: int) -> None:
    cos, sin = rotary_2d(height, width, 16)
    assert cos.shape == sin.shape == (height * width, 8)
    s = scores(cos, sin, 16).reshape(height, width, height, width)
    seen: dict[tuple[int, int], float] = {}
    for r1 in range(height):
        for c1 in range(width):
            for r2 in range(height):
                for c2 in range(width):
                    value = s[r1, c1, r2, c2].item()
                    first = seen.setdefault((r2 - r1, c2 - c1), value)
                    assert abs(value - first) < 1e-5
    # Different offsets give different scores, and the two axes are not interchangeable.
    values = torch.tensor(list(seen.values()), dtype=torch.float64)
    gaps = (values[:, None] - values).abs() + torch.eye(len(values))
    assert gaps.min() > 1e-5


def test_rotary_2d_is_row_major_rows_first() -> None:
    height, width, quarter = 3, 5, 4
    cos, sin = rotary_2d(height, width, 4 * quarter)
    row_cos, row_sin = rotary_1d(height, 2 * quarter, theta=100.0)
    col_cos, col_sin = rotary_1d(width, 2 * quarter, theta=100.0)
    for row in range(height):
        for col in range(width):
            token = row * width + col
            assert torch.equal(cos[token], torch.cat([row_cos[row], col_cos[col]]))
            assert torch.equal(sin[token], torch.cat([row_sin[row], col_sin[col]]))


def test_qk_norm_rope_is_norm_then_rotation() -> None:
    q, k = randn(2, 6, 4, 8), randn(2, 6, 2, 8, seed=1)  # grouped queries
    qw, kw = randn(8, seed=2), randn(8, seed=3)
    cos, sin = (t.double() for t in rotary_2d(2, 3, 8))
    q_out, k_out = ops.qk_norm_rope(q, k, qw, kw, cos, sin, 1e-6)
    torch.testing.assert_close(q_out, apply_rotary(F.rms_norm(q, (8,), qw, 1e-6), cos, sin))
    torch.testing.assert_close(k_out, apply_rotary(F.rms_norm(k, (8,), kw, 1e-6), cos, sin))
    plain, _ = ops.qk_norm_rope(q, k, None, None, cos, sin, 1e-6)
    torch.testing.assert_close(plain, apply_rotary(F.rms_norm(q, (8,), None, 1e-6), cos, sin))
    q16, _ = ops.qk_norm_rope(
        q.bfloat16(), k.bfloat16(), None, None, cos.float(), sin.float(), 1e-6
    )
    assert q16.dtype == torch.bfloat16


def test_qk_norm_rope_gradcheck() -> None:
    cos, sin = (t.double() for t in rotary_1d(3, 4))
    values = (randn(1, 3, 2, 4), randn(1, 3, 1, 4, seed=1), randn(4, seed=2), randn(4, seed=3))
    leaves = tuple(value.requires_grad_() for value in values)
    assert torch.autograd.gradcheck(
        lambda q, k, qw, kw: ops.qk_norm_rope(q, k, qw, kw, cos, sin, 1e-6), leaves
    )


@pytest.mark.parametrize("head_dim", [0, 2, 6, 10, 7])
def test_rotary_2d_head_dim_error(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim {head_dim} must be a positive multiple of 4"):
        rotary_2d(2, 2, head_dim)


def test_rotary_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="head_dim 7 must be a positive multiple of 2"):
        rotary_1d(4, 7)
    with pytest.raises(ValueError, match=r"theta must be positive, got 0\.0"):
        rotary_2d(2, 2, 8, theta=0.0)
    with pytest.raises(ValueError, match="length must not be negative, got -1"):
        rotary_1d(-1, 8)
    with pytest.raises(ValueError, match=r"shape \(N,\), got \(2, 3\)"):
        rotary_1d(torch.zeros(2, 3), 8)
    with pytest.raises(ValueError, match="height and width must not be negative, got 2 and -3"):
        rotary_2d(2, -3, 8)
    cos, sin = rotary_1d(5, 8)
    with pytest.raises(ValueError, match="head_dim 16 needs cos and sin of 8 angles"):
        apply_rotary(torch.zeros(1, 5, 2, 16), cos, sin)
