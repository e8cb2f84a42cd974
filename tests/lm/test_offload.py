"""No operation reads the weights of a module that is not called: offloading works at every level.

Without a GPU the execution device is the CPU and the place to offload to is the meta device, where
no weight can be read by accident.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

PLACEMENTS = ("stream", "branch", "force", "force_mlp", "none")


@pytest.mark.parametrize("adaptive", ["token", "channel", "layer", "lite"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_no_operation_reads_the_weights_of_a_module_that_is_not_called(
    lively, ids, placement, adaptive
) -> None:
    for settings in (
        {"num_experts": 0}, {"num_experts": 3},
        {"dynamics_velocity_norm": True, "tie_word_embeddings": False},
    ):  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            model = lively(dynamics_placement=placement, dynamics_adaptive=adaptive, **settings).to(
                dtype
            )
            expected = model(ids).logits
            cpu_offload(model, torch.device("cpu"))
            assert {p.device.type for p in model.parameters()} == {"meta"}
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.filterwarnings("ignore:.*device_map keys")
@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
@torch.no_grad()
def test_every_other_way_to_offload(lively, ids, tmp_path, experts) -> None:
    expected = lively(num_experts=experts)(ids).logits
    model = lively(num_experts=experts)
    words = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    disk_offload(model, tmp_path / "disk", torch.device("cpu"))
    assert torch.equal(model(ids).logits, expected)
    parts = {"model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    for places in (("cpu", "disk", "disk"), ("disk", "cpu", "disk")):
        mapped = parts | {f"model.layers.{i}": place for i, place in enumerate(places)}
        mapped |= {"model.rotary_emb": "cpu"}
        if experts:  # a buffer of the decoder itself: accelerate needs its place, and warns of it
            mapped |= {"model.routing_table": "cpu"}
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=mapped, offload_folder=tmp_path / "off"
        )
        assert loaded.model.layers[1 if places[1] == "disk" else 0].self_attn.q_norm.weight.is_meta
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), words)


@torch.no_grad()
def test_hooks_on_norms_and_dynamics_are_called(lively, ids) -> None:
    model = lively()
    expected, called = model(ids).logits, set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    assert torch.equal(model(ids).logits, expected)
    silent = {
        name for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and name not in called
    }  # fmt: skip
    assert silent == set()
