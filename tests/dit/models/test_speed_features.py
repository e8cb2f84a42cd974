"""Speed and memory features of diffusers: each works, or is refused with a reason.

These tests run without an accelerator: they check outputs, not speed.
"""

import numpy as np
import pytest
import torch

from complexity_dit.models.transformer import PLACEMENTS
from support.networks import randomised, small_network


def network(**changes):
    return randomised(small_network(**changes))


def inputs(batch=2):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=draw)
    labels = torch.tensor([[0, 1], [-1, 0], [2, -1]])[:batch]
    return x, torch.tensor([999.0, 300.0, 5.0])[:batch], labels


def paint(pipe):
    return pipe(style=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                output_type="np").images  # fmt: skip


# torch's own, while exporting.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_export_against_eager(placement):
    model = network(dynamics_placement=placement, dynamics_adaptive="token")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, inputs(), {"return_dict": False}, strict=False,
        dynamic_shapes={
            "hidden_states": {0: batch}, "timestep": {0: batch}, "class_labels": {0: batch},
            "return_dict": None,
        },
    )  # fmt: skip
    for count in (2, 3):  # the batch of the export, and another
        found = program.module()(*inputs(count), return_dict=False)[0]
        torch.testing.assert_close(found, model(*inputs(count)).sample, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, once
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_tangent_is_the_slope_of_the_prediction(placement):
    model = network(dynamics_placement=placement, dynamics_adaptive="token").double()
    x, *others = inputs()
    x, direction = x.double(), torch.randn_like(x.double())
    with torch.no_grad():
        _, slope = torch.func.jvp(lambda x: model(x, *others).sample, (x,), (direction,))
        above, below = (model(x + s * direction, *others).sample for s in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (above - below) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports while compiling
def test_compile_repeated_blocks_compiles_every_block(pipe):
    expected = paint(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    np.testing.assert_allclose(paint(pipe), expected, atol=1e-5)


def test_layerwise_casting_leaves_the_dynamics_in_full_precision(pipe):
    expected = paint(pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    kinds = {name: p.dtype for name, p in pipe.transformer.named_parameters()}
    assert kinds["blocks.0.attn.to_q.weight"] == torch.float8_e4m3fn
    for name, kind in kinds.items():
        if any(part in name for part in ("dynamics", "norm", "patch_embed", "label_embed")):
            assert kind == torch.float32, name
    found = paint(pipe)
    assert 0 < np.abs(found - expected).mean() < 0.1  # 8 bits per weight


@pytest.mark.parametrize("blocks", [1, 2])
def test_group_offload_by_blocks(pipe, blocks):
    expected = paint(pipe)
    pipe.enable_group_offload("cpu", num_blocks_per_group=blocks)
    assert np.array_equal(paint(pipe), expected)


def test_model_offload_requires_an_accelerator(pipe):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator: nothing to refuse")
    with pytest.raises(RuntimeError, match="requires accelerator"):
        pipe.enable_model_cpu_offload()
    assert set(pipe.model_cpu_offload_seq.split("->")) <= set(pipe.components)


@pytest.mark.parametrize("kv_heads", [None, 2])
@torch.no_grad()
def test_attention_backends(kv_heads):
    model = network(num_key_value_heads=kv_heads)
    expected = model(*inputs()).sample
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        assert model.blocks[0].attn.processor._attention_backend is not None
        torch.testing.assert_close(model(*inputs()).sample, expected, rtol=1e-5, atol=1e-6)
    model.set_attention_backend("native")  # diffusers keeps the last one in the process
    with pytest.raises((RuntimeError, ImportError), match=r"[Ff]lash"):
        model.set_attention_backend("flash")  # a package that is not installed
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("quick")
