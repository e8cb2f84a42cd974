"""Caches of diffusers: what they skip, what they leave as it is, and the pipeline with them."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig

from complexity_dit.models.transformer import ComplexityDiTBlock
from inl_core.run.errors import UserError
from support.networks import randomised, small_network

# Of FasterCache.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

PLACEMENTS = ["none", "branch", "stream", "force", "force_mlp"]


def network(**settings):
    return randomised(small_network(num_layers=4, **settings)).eval()


def inputs(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0, 500.0]),
        "class_labels": torch.tensor([[0, 1], [2, -1]]),
    }


@pytest.fixture
def counted(monkeypatch):
    """Number of blocks and of attentions that were computed."""
    count = {"blocks": 0, "attentions": 0}

    def counting(cls, name):
        real = cls.forward

        @functools.wraps(real)  # diffusers reads the names of the arguments
        def forward(self, *args, **kwargs):
            count[name] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)

    from complexity_dit.models.transformer import ComplexityDiTAttention

    counting(ComplexityDiTBlock, "blocks")
    counting(ComplexityDiTAttention, "attentions")
    return count


def faster(timestep=lambda: 500, **settings) -> FasterCacheConfig:
    return FasterCacheConfig(
        current_timestep_callback=timestep,
        tensor_format="BCHW",
        attention_weight_callback=lambda _: 0.3,
        **settings,
    )


CONFIGS = {
    "first block": lambda: FirstBlockCacheConfig(threshold=100.0),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "faster": faster,
    "mag": lambda: MagCacheConfig(
        threshold=10.0, max_skip_steps=3, retention_ratio=0.0, num_inference_steps=4,
        mag_ratios=[1.0] * 4,
    ),
    "taylor": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_second_step_is_an_approximation_and_the_first_exact(placement, kind, counted):
    model = network(dynamics_placement=placement)
    first, second = inputs(0), inputs(1)
    expected = [model(**one).sample for one in (first, second)]
    model.enable_cache(CONFIGS[kind]())
    assert model.is_cache_enabled
    counted.update(blocks=0, attentions=0)
    with model.cache_context("step"):
        torch.testing.assert_close(model(**first).sample, expected[0])
        whole = dict(counted)
        again = model(**second).sample
    assert again.isfinite().all()
    assert (again - expected[1]).abs().max() > 1e-4
    assert counted["attentions"] < 2 * whole["attentions"]
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(CONFIGS[kind]())
    model._reset_stateful_cache()
    with model.cache_context("step"):
        torch.testing.assert_close(model(**second).sample, expected[1])
    model.disable_cache()
    torch.testing.assert_close(model(**second).sample, expected[1], rtol=0, atol=0)


@torch.no_grad()
def test_contexts_have_a_state_each():
    model = network()
    expected = model(**inputs(0)).sample
    model.enable_cache(CONFIGS["first block"]())
    for name in ("one", "two"):
        with model.cache_context(name):
            torch.testing.assert_close(model(**inputs(0)).sample, expected)


@torch.no_grad()
def test_a_cache_that_skips_nothing_changes_nothing():
    model = network(dynamics_placement="force_mlp")
    model.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    plain = copy.deepcopy(network(dynamics_placement="force_mlp"))
    with model.cache_context("step"):
        for seed in range(3):
            torch.testing.assert_close(
                model(**inputs(seed)).sample, plain(**inputs(seed)).sample, rtol=0, atol=0
            )


def test_images_are_not_read_as_videos():
    model = network()
    with pytest.raises(ValueError, match="images are 'BCHW'"):
        model.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 0))
    assert not model.is_cache_enabled


def paint(pipe, **settings) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        style=["Cubism", "Fauvism"], num_inference_steps=8, output_type="np",
        generator=torch.Generator().manual_seed(1), **settings,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)}])
@pytest.mark.parametrize("kind", ["first block", "pyramid", "faster"])
def test_a_pipeline_samples_with_a_cache(pipe, counted, kind, guidance):
    seen = []

    def timestep() -> float:
        seen.append(pipe.current_timestep)
        return float(pipe.current_timestep)

    config = {
        "first block": lambda: FirstBlockCacheConfig(threshold=100.0),
        "pyramid": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=timestep,
            spatial_attention_timestep_skip_range=(0, 1001),
        ),
        "faster": lambda: faster(
            timestep, spatial_attention_timestep_skip_range=(-1, 901),  # nothing at the first step
            unconditional_batch_timestep_skip_range=(-1, 1001),
            is_guidance_distilled=not guidance,
        ),
    }[kind]()  # fmt: skip
    whole = paint(pipe, **guidance)
    computed = dict(counted)
    if kind == "faster" and guidance:
        guidance["guidance_interval"] = (0.0, 1.0)  # FasterCache needs both halves at each step
        whole = paint(pipe, **guidance)
    counted.update(blocks=0, attentions=0)
    pipe.transformer.enable_cache(config)
    quick = paint(pipe, **guidance)
    assert quick.shape == whole.shape
    assert np.isfinite(quick).all()
    assert 0 < np.abs(quick - whole).mean() < 0.5
    assert counted["attentions"] < computed["attentions"] or kind == "faster"
    assert np.array_equal(paint(pipe, **guidance), quick)  # nothing is left of the last call
    assert pipe.current_timestep is None
    if seen:
        assert 0 < min(seen) < max(seen) <= 1000
    with pytest.raises(UserError, match="leave out chunk_size and internal"):
        paint(pipe, chunk_size=2)
    pipe.transformer.disable_cache()
    assert np.array_equal(paint(pipe, **guidance), whole)
