"""Presets, parameter counts without allocation, and the parameters with weight decay."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from complexity_lm import (
    PRESETS,
    DeepConfig,
    DeepForCausalLM,
    count_parameters,
    decay_parameter_names,
)
from complexity_lm.parameters import flops_per_token


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_documented_parameter_count(name) -> None:
    total, active = count_parameters(DeepConfig.from_preset(name))
    assert total == active
    assert round(total / 1e6, 1) == PRESETS[name].millions

    # The names are the sizes with the paper's dynamics, whose controllers are larger.
    papers = {"dynamics_placement": "stream", "dynamics_adaptive": "token"}
    larger = count_parameters(DeepConfig.from_preset(name, **papers)).total
    unit = {"m": 1.0, "b": 1000.0}[name[-1]]
    assert larger / 1e6 == pytest.approx(float(name[:-1]) * unit, rel=0.03)
    assert total < larger < 1.046 * total


def test_presets_increase_in_size_and_accept_overrides() -> None:
    sizes = [preset.millions for preset in PRESETS.values()]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (14.5, 6982.3)
    config = DeepConfig.from_preset("50m", num_hidden_layers=3, dynamics_placement="none")
    assert (config.hidden_size, config.num_hidden_layers) == (512, 3)
    assert config.dynamics_placement == "none"
    with pytest.raises(ValueError, match=r"unknown preset '60m', choose from: 15m, 50m, 150m"):
        DeepConfig.from_preset("60m")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [None, 0, 16])
def test_counts_equal_those_of_the_model(tiny, tied, shared) -> None:
    config = tiny(num_experts=5, shared_intermediate_size=shared, tie_word_embeddings=tied)
    model = DeepForCausalLM(config)
    total, active = count_parameters(config)
    assert total == sum(p.numel() for p in model.parameters())

    # A token uses one expert of five: the others get no gradient from it.
    model(torch.tensor([[7]])).logits.sum().backward()
    used = sum(
        int(p.grad[expert].any()) * p[expert].numel() if p.ndim == 3 else p.numel()
        for p in model.parameters()
        for expert in (range(5) if p.ndim == 3 else [0])
    )
    assert active == used
    assert active == count_parameters(tiny(tie_word_embeddings=tied)).total


def test_norms_biases_and_dynamics_have_no_weight_decay(tiny) -> None:
    """A rule by name would miss "weight_in_h" and "mu"; transformers' own decays both."""
    for placement in ("force", "force_mlp", "branch", "stream", "none"):
        model = DeepForCausalLM(tiny(dynamics_placement=placement, num_experts=3))
        decayed = set(decay_parameter_names(model))
        kept = {name for name, _ in model.named_parameters()} - decayed
        assert "model.embed_tokens.weight" in decayed
        assert "model.layers.0.self_attn.q_proj.weight" in decayed
        assert "model.layers.0.mlp.gate" in decayed
        assert "model.layers.0.mlp.shared_down" in decayed
        assert all("dynamics" in name or "norm" in name for name in kept)
        assert not any("dynamics" in name or "norm" in name for name in decayed)
        assert any("dynamics.weight_out" in name for name in kept) == (placement != "none")
    wrapped = torch.nn.ModuleDict({"inner": model})
    assert set(decay_parameter_names(wrapped)) == {f"inner.{name}" for name in decayed}


@pytest.mark.parametrize("adaptive", ["token", "channel"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "mlp"])
@pytest.mark.parametrize("loops", [1, 3])
def test_flops_are_those_that_torch_counts(lively, ids, tied, adaptive, frozen, loops) -> None:
    model = lively(
        "eager", tie_word_embeddings=tied, dynamics_adaptive=adaptive, num_loops=loops
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad = frozen not in name
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    counted = flops_per_token(model, ids.shape[1]) * ids.numel()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_experts_are_those_of_one(tiny) -> None:
    counts = {flops_per_token(DeepForCausalLM(tiny(num_experts=n)), 8) for n in (0, 2, 4)}
    assert len(counts) == 1  # of one and the shared expert, together as wide as a dense MLP
