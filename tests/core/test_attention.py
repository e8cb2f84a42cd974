"""Attention on every path against its definition in fp64."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from inl_core import cpu_attention, ops, reference

BF16 = torch.bfloat16
SHAPES = [  # B, H, Hk, N, M, E
    (2, 4, 4, 16, 16, 8),
    (3, 6, 2, 17, 17, 12),
    (1, 1, 1, 1, 1, 4),
    (2, 4, 1, 1, 33, 16),
    (2, 2, 2, 5, 9, 32),
    (1, 8, 8, 300, 300, 8),  # some heads of one sample per chunk
    (40, 2, 2, 64, 64, 8),  # several samples per chunk, and a rest
]


def tensors(shape, dtype, grad=True):
    batch, heads, kv_heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(h, n):
        # In memory (B, N, H, E), as projections give it.
        x = torch.randn(batch, n, h, width, generator=generator, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2).requires_grad_(grad)

    return draw(heads, queries), draw(kv_heads, keys), draw(kv_heads, keys)


def results(function, arguments, **options):
    """Output and gradients, in fp64."""
    out = function(*arguments, **options)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, arguments, seed.to(out.dtype))
    return [x.detach().double() for x in (out, *grads)]


def masks(shape):
    batch, heads, _, queries, keys, _ = shape
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(batch, heads, queries, keys, generator=generator) < 0.7
    keep[..., 0] = True
    padding = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    padding[0, ..., keys // 2 + 1 :] = False
    return {
        "none": {}, "causal": {"causal": True}, "full": {"mask": keep},
        "padding": {"mask": padding},
        "both": {"mask": padding, "causal": True},
        "added": {"mask": torch.randn(queries, keys, generator=generator, dtype=torch.float64)},
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "causal", "full", "padding", "both", "added"])
def test_it_is_the_definition(shape, kind):
    options = masks(shape)[kind]
    exact = tensors(shape, torch.float64)
    expected = results(reference.attention, exact, **options)
    for a, b in zip(results(ops.attention, exact, **options), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    half = tensors(shape, BF16)
    if kind == "added":
        options = {"mask": options["mask"].to(BF16)}
    found = results(ops.attention, half, **options)
    for a, b in zip(found, expected, strict=True):
        # bf16 has 8 bits: scores, weights and results are each rounded once.
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-6


@pytest.mark.parametrize("shape", [(4, 6, 6, 64, 64, 32), (2, 8, 2, 128, 128, 64)])
def test_its_error_is_at_most_twice_that_of_torch_for_normalised_heads(shape):
    q, k, v = tensors(shape, BF16, grad=False)
    q, k = (F.rms_norm(x.float(), x.shape[-1:]).to(BF16) for x in (q, k))
    exact = reference.attention(q.double(), k.double(), v.double())
    grouped = shape[1] != shape[2]
    theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).double() - exact
    assert (ops.attention(q, k, v).double() - exact).norm() <= 2 * theirs.norm()


def test_bf16_on_a_cpu_takes_products_up_to_a_number_of_keys(monkeypatch):
    seen = []
    own = cpu_attention.attention
    monkeypatch.setattr(
        cpu_attention, "attention", lambda q, *a, **k: seen.append(q.dtype) or own(q, *a, **k)
    )
    most = ops.MOST_KEYS_OF_CPU_ATTENTION
    for dtype, keys in itertools.product((torch.float32, BF16), (most, most + 1)):
        ops.attention(*tensors((1, 1, 1, 2, keys, 4), dtype))
    assert seen == [BF16]
    with torch.autocast("cpu", BF16):
        ops.attention(*tensors((1, 1, 1, 2, 8, 4), torch.float32))
    assert seen == [BF16, BF16]
    with torch.autocast("cpu", BF16), ops.use_backend("reference"):
        ops.attention(*tensors((1, 1, 1, 2, 8, 4), torch.float32))
    ops.attention(*tensors((1, 1, 1, 1, 8, 4), BF16))  # one query, as in decoding
    assert len(seen) == 2


def test_fp32_has_the_bits_of_torch():
    q, k, v = tensors((2, 4, 2, 16, 16, 8), torch.float32, grad=False)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(ops.attention(q, k, v), expected)


@pytest.mark.parametrize("shape", [(33, 6, 6, 64, 64, 32), (5, 6, 2, 256, 256, 16)])
def test_a_sample_has_the_same_bits_in_any_batch(shape):
    arguments = tensors(shape, BF16)
    whole = results(ops.attention, arguments)
    seed = torch.randn(
        arguments[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(BF16)
    for rows in (slice(0, 1), slice(2, 5)):
        part = [x.detach()[rows].requires_grad_() for x in arguments]
        out = ops.attention(*part)
        alone = [out, *torch.autograd.grad(out, part, seed[rows])]
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a.double(), b[rows])


def test_a_query_without_keys_gives_zeros():
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 1, :] = False
    for dtype in (torch.float64, torch.float32, BF16):
        arguments = tensors((1, 2, 2, 3, 4, 8), dtype)
        for function in (reference.attention, ops.attention):
            found = results(function, arguments, mask=mask)
            assert not found[0][:, :, 1].any()
            assert all(x.isfinite().all() for x in found)
        early = ops.attention(*tensors((1, 2, 2, 4, 2, 8), dtype), causal=True)
        assert not early[:, :, :2].any()


def test_gradients_of_the_definition():
    arguments = tensors((2, 4, 2, 3, 5, 4), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *a: reference.attention(*a, causal=True, scale=0.3), arguments
    )


def test_the_custom_operation_is_registered_completely():
    q, k, v = tensors((2, 2, 2, 8, 8, 4), BF16)
    for mask in (None, torch.ones(2, 1, 8, 8, dtype=torch.bool)):
        torch.library.opcheck(
            torch.ops.inl_core.cpu_attention.default, (q, k, v, mask, 0.5, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
def test_it_compiles_as_one_graph(kind):
    shape = (2, 4, 2, 16, 16, 8)
    arguments, options = tensors(shape, BF16), masks(shape)[kind]
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        results(compiled, arguments, **options), results(ops.attention, arguments, **options),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


def test_nothing_is_kept_without_gradients():
    q, k, v = tensors((2, 2, 2, 8, 8, 4), BF16, grad=False)
    assert torch.ops.inl_core.cpu_attention(q, k, v, None, 0.5, False)[1].numel() == 0
    with torch.no_grad():
        plain = ops.attention(*tensors((2, 2, 2, 8, 8, 4), BF16))
    assert torch.equal(plain, ops.attention(q, k, v))


def test_checkpointing_gives_the_same_gradients():
    arguments = tensors((2, 2, 2, 8, 8, 4), BF16)
    again = results(lambda *a: checkpoint(ops.attention, *a, use_reentrant=False), arguments)
    for a, b in zip(again, results(ops.attention, arguments), strict=True):
        assert torch.equal(a, b)


def test_transforms_of_torch_func():
    q, k, v = (x.detach() for x in tensors((3, 2, 2, 4, 4, 8), BF16))

    def loss(q, k, v):
        return ops.attention(q[None], k[None], v[None]).float().square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    assert each.shape == q.shape
    assert each.isfinite().all()


def test_empty_batches_and_wrong_heads():
    q, k, v = tensors((0, 2, 2, 4, 4, 8), BF16)
    assert ops.attention(q, k, v).shape == (0, 2, 4, 8)
    q, k, v = tensors((1, 3, 2, 4, 4, 8), BF16)
    with pytest.raises(ValueError, match="3 query heads must be a multiple of 2 key heads"):
        ops.attention(q, k, v)
