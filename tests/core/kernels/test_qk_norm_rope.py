"""qk_norm_rope in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from checks import (
    Op,
    assert_as_good_as_eager,
    assert_empty_batch_works,
    assert_registered,
    assert_same_under_compile,
    leaves_of,
    randn,
)
from torch import Tensor

from inl_core import reference, rotary_1d, rotary_2d
from inl_core.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_bwd,
    qk_norm_rope_fwd,
    takes,
)

BF16, FP32 = torch.bfloat16, torch.float32


def assert_accurate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: tuple[Tensor, Tensor],
    eps: float = 1e-6,
) -> None:
    """As good as eager with the table as a constant: it has no gradient."""

    def fixed(op: Op) -> Op:
        return lambda q, k, qw, kw, eps: op(q, k, qw, kw, *table, eps)

    definition = fixed(reference.qk_norm_rope)
    given = q, k, q_weight, k_weight
    assert_as_good_as_eager(fixed(qk_norm_rope), *given, definition=definition, eps=eps)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("width", [32, 36])
def test_on_a_line(width: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    q, k = (randn(2, 7, h, width, seed=s, dtype=dtype) for s, h in enumerate(heads))
    weights = [1 + 0.5 * randn(width, seed=s, dtype=dtype) for s in (2, 3)]
    table = rotary_1d(7, width)
    assert_accurate(q, k, *weights, table)
    assert_accurate(q, k, None, None, table, eps=1e-3)


def test_on_a_grid_and_per_sample() -> None:
    q, k = randn(2, 12, 4, 24), randn(2, 12, 2, 24, seed=1)
    weights = [1 + 0.5 * randn(24, seed=s) for s in (2, 3)]
    cos, sin = rotary_2d(3, 4, 24)
    assert_accurate(q, k, *weights, (cos, sin))
    assert_accurate(q, k, *weights, (cos[None], sin[None]))
    angles = randn(2, 12, 12, seed=4)
    assert_accurate(q, k, *weights, (angles.cos(), angles.sin()))
    assert_accurate(q, k, *weights, (angles.cos().bfloat16(), angles.sin().bfloat16()))


def test_one_weight_and_mixed_dtypes() -> None:
    q, k = randn(2, 7, 4, 32, dtype=BF16), randn(2, 7, 4, 32, seed=1)
    weight = 1 + 0.5 * randn(32, seed=2)
    assert_accurate(q, k, weight, None, rotary_1d(7, 32))
    assert_accurate(q, k, None, weight.bfloat16(), rotary_1d(7, 32))


def test_the_smallest_head() -> None:
    q, k = randn(3, 30, 2, 2), randn(3, 30, 1, 2, seed=1)
    assert_accurate(q, k, None, None, rotary_1d(30, 2), eps=0.5)


def test_slices_of_one_projection_and_other_strides() -> None:
    fused = randn(2, 9, 3, 4, 34)
    q, k, _ = fused.unbind(2)
    assert not q.is_contiguous()
    weights = [1 + 0.5 * randn(34, seed=s) for s in (2, 3)]
    assert_accurate(q, k, *weights, rotary_1d(9, 34))
    q, k = randn(2, 4, 9, 34).transpose(1, 2), randn(2, 9, 4, 68, seed=1)[..., ::2]
    cos, sin = (t.t().contiguous().t() for t in rotary_1d(9, 34))
    assert_accurate(q, k, *weights, (cos, sin))


def test_transposed_gradients() -> None:
    """Attention works on (B, H, N, Dh), so its gradients arrive with the strides of that."""
    gradients = []
    for op in (qk_norm_rope, reference.qk_norm_rope):
        leaves = leaves_of([randn(2, 5, 3, 8), randn(2, 5, 3, 8, seed=1)])
        q, k = op(*leaves, None, None, *rotary_1d(5, 8))
        given = [randn(2, 3, 5, 8, seed=s).transpose(1, 2) for s in (2, 3)]
        gradients.append(torch.autograd.grad((q, k), leaves, given))
    torch.testing.assert_close(*gradients)
    leaves = leaves_of([randn(2, 5, 3, 8), randn(2, 5, 3, 8, seed=1)])
    qk_norm_rope(*leaves, None, None, *rotary_1d(5, 8))[0].sum().backward()
    assert leaves[1].grad.eq(0.0).all()  # the keys are unused


def test_empty() -> None:
    for shape in ((0, 5), (2, 0)):
        table = rotary_1d(shape[1], 8)

        def op(q, k, qw, kw, table=table):
            return qk_norm_rope(q, k, qw, kw, *table)

        def definition(q, k, qw, kw, table=table):
            return reference.qk_norm_rope(q, k, qw, kw, *table)

        q, k = randn(*shape, 3, 8), randn(*shape, 1, 8, dtype=BF16)
        assert_empty_batch_works(op, q, k, randn(8), randn(8, dtype=BF16), definition=definition)


def test_nan_stays_in_its_head() -> None:
    q, k = randn(2, 5, 3, 8), randn(2, 5, 2, 8, seed=1)
    q[1, 2, 1, 3] = torch.nan
    leaves = [q.requires_grad_(), k.requires_grad_()]
    outputs = qk_norm_rope(*leaves, None, None, *rotary_1d(5, 8))
    dq, dk = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    head = torch.zeros(2, 5, 3, dtype=torch.bool)
    head[1, 2, 1] = True
    for rowwise in (outputs[0], dq):
        assert torch.equal(rowwise.isnan().all(-1), head)
        assert torch.equal(rowwise.isnan().any(-1), head)
    assert not outputs[1].isnan().any()
    assert not dk.isnan().any()


def test_without_eps_heads_beyond_the_last_contribute_nothing() -> None:
    q, k, weight = randn(1, 3, 1, 8), randn(1, 3, 1, 8, seed=1), randn(8, seed=2)
    assert_accurate(q, k, weight, None, rotary_1d(3, 8), eps=0.0)


def test_the_score_depends_on_the_offset_alone() -> None:
    x = randn(1, 1, 1, 16).expand(1, 20, 1, 16)
    q, k = qk_norm_rope(x, x, None, None, *rotary_1d(20, 16))
    scores = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(scores[:-3, 3:].diagonal(), scores[0, 3].expand(17))


def test_registration_and_compile() -> None:
    q, k = randn(2, 5, 4, 8).requires_grad_(), randn(2, 5, 2, 8, seed=1).requires_grad_()
    weight = randn(8, seed=2).requires_grad_()
    table = rotary_1d(5, 8)
    assert_registered(qk_norm_rope_fwd, q, k, weight, None, *table, 1e-6)
    constants = [t.detach() for t in (q, k, q, k, weight)]
    assert_registered(qk_norm_rope_bwd, *constants, None, *table, 1e-6)
    half = randn(2, 5, 4, 8, dtype=BF16)
    assert_same_under_compile(
        lambda q, k, qw, kw: qk_norm_rope(q, k, qw, kw, *table), half, k, weight, weight
    )


def test_a_learned_table_is_rejected() -> None:
    q, table = randn(1, 5, 2, 8), rotary_1d(5, 8)
    learned = table[0].requires_grad_()
    assert takes(q, q, None, None, *rotary_1d(5, 8))
    assert not takes(q, q, None, None, learned, table[1])
    with pytest.raises(ValueError, match="no gradient"):
        qk_norm_rope(q, q, None, None, learned, table[1])
    with torch.no_grad():
        qk_norm_rope(q, q, None, None, learned, table[1])


def test_errors_name_the_value() -> None:
    q, table = randn(2, 5, 4, 8), rotary_1d(5, 8)
    with pytest.raises(ValueError, match=r"got \(2, 5, 4, 8\) and \(2, 4, 4, 8\)"):
        qk_norm_rope(q, q[:, 1:], None, None, *table)
    with pytest.raises(ValueError, match=r"k_weight must have shape \(8,\), got \(4,\)"):
        qk_norm_rope(q, q, None, randn(4), *table)
    with pytest.raises(ValueError, match=r"head_dim 8 over 5 tokens.*got \(4, 4\) and \(4, 4\)"):
        qk_norm_rope(q, q, None, None, *rotary_1d(4, 8))
    with pytest.raises(ValueError, match="head_dim 7 over 5 tokens"):
        qk_norm_rope(q[..., :7], q[..., :7], None, None, *table)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        qk_norm_rope(q.double(), q, None, None, *table)
