"""A text at once, token by token, or in pieces after padding gives the same logits."""

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

PLACEMENTS = ("stream", "branch", "force", "force_mlp", "none")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def new_cache(kind: str, model) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=20)


@torch.no_grad()
def in_pieces(model, cache: Cache, ids: Tensor, cuts: list[int], mask: Tensor | None = None):
    """Logits of `ids`, fed to the model in pieces that end at `cuts`."""
    logits, start = [], 0
    for end in [*cuts, ids.shape[1]]:
        positions = None
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        out = model(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions,
            past_key_values=cache,
        )
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def check(model, ids: Tensor, dtype: torch.dtype, kind: str) -> None:
    model = model.to(dtype)
    tolerance = TOLERANCE[dtype]
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    assert full.std() > 0.3  # so that agreement is meaningful

    # A prompt of four tokens, then one token at a time.
    decoded = in_pieces(model, new_cache(kind, model), ids, list(range(4, ids.shape[1])))
    torch.testing.assert_close(decoded, full, rtol=0, atol=tolerance)

    # Three texts of different lengths, padded on the left and fed in three pieces.
    padded = torch.zeros(ids.shape[0], ids.shape[1] + 5, dtype=ids.dtype)
    mask = torch.zeros_like(padded)
    lengths = [ids.shape[1], 7, 3]
    for row, length in enumerate(lengths):
        padded[row, -length:] = ids[row, :length]
        mask[row, -length:] = 1
    chunked = in_pieces(model, new_cache(kind, model), padded, [9, 14], mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            chunked[row, -length:], full[row, :length], rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
def test_pieces_equal_the_full_text(lively, ids, placement, kind, dtype, experts) -> None:
    check(lively(dynamics_placement=placement, num_experts=experts), ids, dtype, kind)


@pytest.mark.parametrize("adaptive", ["channel", "layer", "lite"])
def test_pieces_equal_the_full_text_with_other_coefficients(lively, ids, adaptive) -> None:
    check(lively(dynamics_adaptive=adaptive), ids, torch.float64, "dynamic")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_pieces_equal_the_full_text_with_a_sliding_window(lively, ids, kind) -> None:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = lively(sliding_window=4, layer_types=layer_types)
    check(model, ids, torch.float64, kind)


def test_a_sliding_window_hides_earlier_tokens(lively, ids) -> None:
    model = lively(sliding_window=4, num_hidden_layers=1).double()
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] % 63) + 1
    with torch.no_grad():
        moved = (model(ids).logits - model(changed).logits).abs().amax(dim=(0, 2))
    assert moved[:2].eq(0).all()
    assert (moved[2:6] > 1e-3).all()
    assert (moved[6:] < 1e-12).all()
