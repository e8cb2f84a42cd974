"""The network: shapes, placements, initialisation, labels, and the interface of diffusers."""

import pytest
import torch

from complexity_dit.models.transformer import (
    ADAPTIVES,
    PLACEMENTS,
    SIZES,
    ComplexityDiTTransformer2DModel,
    patchify,
    unpatchify,
    velocity_towards,
)
from support.networks import randomised, small_network
from support.processes import python


def inputs(batch=2, height=8, width=8):
    torch.manual_seed(2)
    x = torch.randn(batch, 3, height, width)
    return x, torch.full((batch,), 300.0), torch.tensor([[0, 1], [2, -1]])[:batch]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("adaptive", ADAPTIVES)
def test_forward_and_gradients_of_every_placement(placement, adaptive):
    model = randomised(small_network(dynamics_placement=placement, dynamics_adaptive=adaptive))
    x, t, labels = inputs()
    out = model(x, t, labels).sample
    assert out.shape == x.shape
    out.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # The token controller's first matrices get a gradient only once W_o has left its zero. In a
    # branch or stream the velocity of the last block is not used.
    allowed = {n for n in without if "dynamics" in n}
    assert set(without) == allowed
    if placement != "none":
        assert any(
            p.grad is not None and p.grad.abs().sum()
            for n, p in model.named_parameters()
            if "dynamics" in n
        )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("adaptive", ADAPTIVES)
def test_every_parameter_has_a_gradient(placement, adaptive):
    """Including the first block, which has no velocity: plain DDP waits for every gradient."""
    model = small_network(dynamics_placement=placement, dynamics_adaptive=adaptive)
    model(*inputs()).sample.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


PLAIN_DDP = """
import itertools
import os
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from complexity_dit.models.transformer import ADAPTIVES, PLACEMENTS
from support.networks import small_network

distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
for placement, adaptive in itertools.product(PLACEMENTS, ADAPTIVES):
    settings = {"dynamics_placement": placement, "dynamics_adaptive": adaptive}
    model = DistributedDataParallel(small_network(**settings))
    for _ in range(3):
        x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 300.0)
        model(x, t, torch.tensor([[0, 1], [2, -1]])).sample.square().mean().backward()
print("three steps each", flush=True)
os._exit(0)
"""


def test_plain_ddp_trains_it(tmp_path):
    assert python("-c", PLAIN_DDP, tmp_path / "store").stdout == "three steps each\n"


def test_a_new_model_predicts_zero_for_every_placement():
    for placement in PLACEMENTS:
        x, t, labels = inputs()
        assert torch.equal(
            small_network(dynamics_placement=placement)(x, t, labels).sample, torch.zeros_like(x)
        )


def test_placements_share_the_backbone_initialisation():
    plain = dict(small_network(dynamics_placement="none").named_parameters())
    for placement in PLACEMENTS:
        other = dict(small_network(dynamics_placement=placement).named_parameters())
        assert set(plain) <= set(other)
        assert all(torch.equal(plain[name], other[name]) for name in plain), placement


def test_initialisation_keeps_the_coefficients_of_the_dynamics():
    # `apply(_init)` of the original code reset the controller: alpha 0.5 instead of 0.9.
    dynamics = small_network().blocks[0].dynamics
    from inl_core import collect_dynamics_stats

    with collect_dynamics_stats(dynamics):
        dynamics(torch.randn(1, 4, 32))
    stats = dynamics.get_dynamics_stats()
    assert stats["alpha_mean"] == pytest.approx(0.9, abs=1e-6)
    assert stats["beta_mean"] == pytest.approx(0.1, abs=1e-6)
    assert stats["gate_mean"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("placement", ["force", "force_mlp"])
def test_force_without_spring_and_momentum_equals_the_plain_residual(placement):
    off = {
        "dynamics_adaptive": "lite",
        "dynamics_alpha": 0.0,
        "dynamics_beta": 0.0,
        "dynamics_gate": 1.0,
        "dynamics_dt": 1.0,
        "dynamics_velocity_max": None,
    }
    force = randomised(small_network(dynamics_placement=placement, **off))
    plain = small_network(dynamics_placement="none")
    plain.load_state_dict({k: v for k, v in force.state_dict().items() if "dynamics" not in k})
    x, t, labels = inputs()
    torch.testing.assert_close(
        force(x, t, labels).sample, plain(x, t, labels).sample, rtol=0, atol=1e-6
    )


def test_velocity_starts_at_zero_in_every_call():
    model = randomised(small_network())
    x, t, labels = inputs()
    first = model(x, t, labels).sample
    model(torch.randn_like(x), t, labels)
    assert torch.equal(model(x, t, labels).sample, first)


def test_a_missing_label_is_the_null_row():
    model = randomised(small_network())
    x, t, _ = inputs(batch=1)
    missing = model(x, t, torch.tensor([[-1, -1]])).sample
    assert torch.equal(model(x, t).sample, missing)
    assert torch.equal(model(x, t, torch.tensor([[3, 2]])).sample, missing)  # the rows themselves
    assert not torch.equal(model(x, t, torch.tensor([[1, -1]])).sample, missing)


def test_model_without_labels():
    model = randomised(small_network(label_fields=[], num_classes=[]))
    x, t, _ = inputs()
    assert model(x, t).sample.shape == x.shape
    nothing = model.embed_labels(torch.empty(2, 0, dtype=torch.long))
    assert torch.equal(nothing, torch.zeros(2, model.config.hidden_size))


def test_non_square_inputs_and_grouped_query_attention():
    model = randomised(small_network(num_key_value_heads=2))
    x, t, labels = inputs(height=8, width=12)
    assert model(x, t, labels).sample.shape == x.shape


def test_unpatchify_inverts_patchify():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(unpatchify(tokens, 2, 2, 3), x)


def test_gradient_checkpointing_gives_the_same_gradients():
    x, t, labels = inputs()
    grads = []
    for checkpointing in (False, True):
        model = randomised(small_network(dynamics_placement="force"))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(x, t, labels).sample.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_traces_as_one_graph(placement):
    model = randomised(small_network(dynamics_placement=placement))
    x, t, labels = inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, labels).sample, model(x, t, labels).sample)


def test_save_and_load(tmp_path):
    model = randomised(small_network())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    again = ComplexityDiTTransformer2DModel.from_pretrained(tmp_path)
    x, t, labels = inputs()
    assert torch.equal(again(x, t, labels).sample, model(x, t, labels).sample)
    assert again.config.label_fields == ["style", "genre"]  # in their order


def test_lora_targets_and_attention_backends():
    from peft import LoraConfig

    model = randomised(small_network())
    x, t, labels = inputs()
    before = model(x, t, labels).sample
    model.set_attention_backend("native")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert torch.equal(model(x, t, labels).sample, before)  # a fresh adapter adds zero
    assert sum("lora_A" in n for n, _ in model.named_parameters()) == 8


@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds(size):
    with torch.device("meta"):
        model = ComplexityDiTTransformer2DModel.from_size(
            size, label_fields=["style"], num_classes=[3]
        )
    assert model.config.hidden_size == SIZES[size][0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"hidden_size": 100, "num_attention_heads": 3},
            "100 must be divisible by num_attention_heads 3",
        ),
        ({"hidden_size": 24, "num_attention_heads": 4}, "multiple of 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"sample_size": 9}, "sample_size 9 must be divisible by patch_size 2"),
        ({"dynamics_placement": "steam"}, "'steam' must be one of"),
        ({"dynamics_adaptive": "all"}, "'all' must be one of"),
        ({"network_output": "noise"}, "network_output 'noise' must be one of"),
        ({"num_layers": 10**9}, "num_layers 1000000000 must be at most"),
        ({"label_fields": ["a\nb", "c"]}, "printable name"),
        ({"label_fields": ["style"]}, "one entry each"),
    ],
)
def test_wrong_config_is_refused_with_numbers(overrides, words):
    with pytest.raises(ValueError, match=words):
        small_network(**overrides)


def test_wrong_inputs_are_refused_with_numbers():
    model = small_network()
    x, t, labels = inputs()
    with pytest.raises(ValueError, match="9x8 must be divisible by patch_size 2"):
        model(torch.randn(2, 3, 9, 8), t, labels)
    with pytest.raises(ValueError, match=r"\(2, 1\) must be \(2, 2\)"):
        model(x, t, labels[:, :1])
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        ComplexityDiTTransformer2DModel.from_size("huge")


def test_a_network_that_predicts_the_image_returns_the_velocity_to_it():
    x, t, labels = inputs()
    written = randomised(small_network(), seed=3)(x, t, labels).sample
    model = randomised(small_network(network_output="sample"), seed=3)
    assert torch.equal(model(x, t, labels).sample, velocity_towards(written, x, t))
    scalar = model(x, t[0], labels).sample  # pipelines give one time for the whole batch
    assert torch.equal(scalar, model(x, t, labels).sample)
