"""No operation reads the weights of a module that is not called: offloading works at every level.

Without a GPU the execution device is the CPU and the place to offload to is the meta device, where
no weight can be read by accident.
"""

from functools import partial

import accelerate
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from diffusers import DiffusionPipeline

from complexity_dit import ComplexityDiTPipeline
from complexity_dit.models.transformer import (
    ADAPTIVES,
    PLACEMENTS,
    ComplexityDiTTransformer2DModel,
)
from support.networks import randomised, small_network


def inputs():
    torch.manual_seed(2)
    x = torch.randn(2, 3, 8, 8)
    return x, torch.tensor([300.0, 800.0]), torch.tensor([[0, 1], [2, -1]])


def network(**overrides) -> ComplexityDiTTransformer2DModel:
    return randomised(small_network(**overrides))


def paint(pipe):
    pipe.set_progress_bar_config(disable=True)
    embeds = pipe.get_label_embeds(style=[1, 2])
    by_id, by_embeds = (
        pipe(
            num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np",
            **labels,
        ).images
        for labels in ({"style": [1, 2]}, {"label_embeds": embeds})
    )  # fmt: skip
    np.testing.assert_allclose(by_embeds, by_id, atol=1e-5)
    return by_id


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("adaptive", ADAPTIVES)
@torch.no_grad()
def test_no_operation_reads_the_weights_of_a_module_that_is_not_called(placement, adaptive):
    for with_norm in (False, True):
        model = network(
            dynamics_placement=placement, dynamics_adaptive=adaptive,
            dynamics_velocity_norm=with_norm,
        )  # fmt: skip
        if not with_norm:
            model.add_labels({"style": {"new": torch.randn(32), "other": torch.randn(32)}})
            labels = torch.tensor([[3, 1], [-1, 0]])
        else:
            labels = inputs()[2]
        # In bf16 the fused step of a branch rounds less than the module that is called.
        fused = placement == "branch" and adaptive != "token"
        for dtype in (torch.float32,) if fused else (torch.float32, torch.bfloat16):
            model = model.to(dtype)
            x, t = (value.to(dtype) for value in inputs()[:2])
            expected = model(x, t, labels).sample
            cpu_offload(model, torch.device("cpu"))
            assert {p.device.type for p in model.parameters()} == {"meta"}
            assert torch.equal(model(x, t, labels).sample, expected)
            remove_hook_from_submodules(model)


@torch.no_grad()
def test_every_other_way_to_offload_a_network(tmp_path):
    expected = network()(*inputs()).sample
    model = network()
    disk_offload(model, tmp_path / "disk", torch.device("cpu"))
    assert torch.equal(model(*inputs()).sample, expected)

    parts = {name: "cpu" for name, _ in model.named_children()}
    for place in ("disk", "cpu"):
        model = network()
        mapped = parts | {"blocks": place, "time_embed": place, "label_embed": "disk"}
        dispatch_model(
            model, mapped, main_device="cpu", offload_dir=tmp_path / f"{place}-map",
            force_hooks=True,
        )  # fmt: skip
        assert torch.equal(model(*inputs()).sample, expected)

    network().save_pretrained(tmp_path / "saved")
    model = ComplexityDiTTransformer2DModel.from_pretrained(
        tmp_path / "saved", device_map=parts | {"blocks": "disk"}, offload_folder=tmp_path / "off"
    )
    assert model.blocks[0].attn.norm_q.weight.is_meta
    assert torch.equal(model(*inputs()).sample, expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_group_offload_by_leaves(pipe, adapted):
    if adapted:
        pipe.transformer.add_labels({"style": {"new": torch.randn(32)}})
    expected = paint(pipe)
    pipe.enable_group_offload("cpu", offload_type="leaf_level")
    assert np.array_equal(paint(pipe), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_sequential_offload(pipe, adapted, monkeypatch):
    # diffusers adds an index to the device, and accelerate takes "cpu:0" for another than "cpu".
    def on_cpu(model, _, **options):
        return cpu_offload(model, torch.device("cpu"), **options)

    monkeypatch.setattr(accelerate, "cpu_offload", on_cpu)
    if adapted:
        pipe.transformer.add_labels({"style": {"new": torch.randn(32)}})
    expected = paint(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
    assert np.array_equal(paint(pipe), expected)


@pytest.mark.filterwarnings("ignore:.*max_memory")
@pytest.mark.parametrize("generic", [False, True], ids=["own class", "DiffusionPipeline"])
def test_a_balanced_device_map(pipe, tmp_path, generic):
    expected = paint(pipe)
    pipe.save_pretrained(tmp_path)
    if generic:
        load = partial(DiffusionPipeline.from_pretrained, trust_remote_code=True)
    else:
        load = ComplexityDiTPipeline.from_pretrained
    loaded = load(tmp_path, device_map="balanced")
    assert type(loaded) is ComplexityDiTPipeline
    assert np.array_equal(paint(loaded), expected)


@torch.no_grad()
def test_hooks_on_norms_and_dynamics_are_called():
    model = network(dynamics_adaptive="channel")
    expected, called = model(*inputs()).sample, set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    assert torch.equal(model(*inputs()).sample, expected)
    silent = {
        name for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and name not in called
    }  # fmt: skip
    assert silent == set()
