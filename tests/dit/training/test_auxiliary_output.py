"""The second output layer after some of the blocks: what it reads, and training with it."""

import dataclasses
import math

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file

from complexity_dit.config import LoraOptions, ModelConfig, ObjectiveConfig, OptimConfig
from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.seeding import generator_for
from complexity_dit.training.plan import count_flops, state_bytes
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.networks import randomised, small_network
from support.outcomes import rows_of

INPUTS = (torch.full((2,), 300.0), torch.tensor([[0, 1], [2, -1]]))


def pictures():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(**overrides):
    return randomised(small_network(**({"num_layers": 4, "auxiliary_layer": 1} | overrides)))


def with_head(run, **settings):
    model = dataclasses.replace(run.model, auxiliary_layer=1)
    return dataclasses.replace(run, model=model, **settings)


def test_a_network_starts_and_predicts_as_without():
    model, plain = (small_network(num_layers=4, auxiliary_layer=early) for early in (1, 0))
    tensors = model.state_dict()
    added = set(tensors) - set(plain.state_dict())
    assert {name.split(".")[0] for name in added} == {"adaln_out_aux", "proj_out_aux"}
    assert all(torch.equal(tensors[name], value) for name, value in plain.state_dict().items())
    assert not model(pictures(), *INPUTS, return_auxiliary=True).auxiliary.any()  # as the last one

    model = network()
    plain = small_network(num_layers=4)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in added})
    with torch.no_grad():
        found = model(pictures(), *INPUTS)
        assert found.auxiliary is None
        assert torch.equal(found.sample, plain(pictures(), *INPUTS).sample)
        both = model(pictures(), *INPUTS, return_dict=False, return_auxiliary=True)
    assert len(both) == 2
    assert torch.equal(both[0], found.sample)
    assert plain(pictures(), *INPUTS, return_dict=False)[0].shape == both[1].shape


@pytest.mark.parametrize("output", ["target", "sample"])
@torch.no_grad()
def test_it_is_the_output_of_the_shorter_network(output):
    model = network(auxiliary_layer=2, network_output=output)
    short = small_network(num_layers=2, network_output=output)
    weights = {
        name.replace("_aux", ""): value
        for name, value in model.state_dict().items()
        if not name.startswith(("norm_out.", "adaln_out.", "proj_out.", "blocks.2", "blocks.3"))
    }
    short.load_state_dict(weights)
    found = model(pictures(), *INPUTS, return_auxiliary=True).auxiliary
    assert torch.equal(found, short(pictures(), *INPUTS).sample)


@pytest.mark.parametrize("early", [1, 2, 3])
@torch.no_grad()
def test_dropped_tokens_are_read_as_they_bypass_the_middle(early):
    plain = network(auxiliary_layer=1)
    model = network(auxiliary_layer=early)
    kept = draw_kept_tokens(2, 16, 0.5, generator_for(0, "test"))
    calls = {"kept_tokens": kept, "return_auxiliary": True}
    found = model(pictures(), *INPUTS, **calls)
    # Where the second layer is makes no difference to the first one.
    assert torch.equal(found.sample, plain(pictures(), *INPUTS, **calls).sample)
    # Blocks 1 and 2 are the middle: a dropped token has there the prediction that it had before.
    before = plain(pictures(), *INPUTS, return_auxiliary=True).auxiliary
    same = (found.auxiliary == before).all(dim=1).unfold(1, 2, 2).unfold(2, 2, 2).all(-1).all(-1)
    dropped = torch.ones(2, 16, dtype=torch.bool).scatter(1, kept, False).view(2, 4, 4)
    assert torch.equal(same, dropped if early > 1 else torch.ones_like(dropped))


def test_every_parameter_has_a_gradient_and_checkpointing_the_same_one():
    grads = []
    for checkpointing in (False, True):
        model = network().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        found = model(pictures(), *INPUTS, return_auxiliary=True)
        (found.sample + found.auxiliary).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_the_whole_network_compiles():
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = (m(pictures(), *INPUTS, return_auxiliary=True) for m in (compiled, model))
    torch.testing.assert_close(found.auxiliary, expected.auxiliary)


@torch.no_grad()
def test_its_weights_can_be_offloaded():
    model = network()
    expected = model(pictures(), *INPUTS, return_auxiliary=True).auxiliary
    cpu_offload(model, torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(model(pictures(), *INPUTS, return_auxiliary=True).auxiliary, expected)


def test_a_plan_counts_it():
    plain, model = small_network(num_layers=4), network()
    D, N, P = 32, 16, 12
    head = 2 * (2 * D * D + N * D * P)
    assert count_flops(model.config)[0] - count_flops(plain.config)[0] == head
    more = model.num_parameters() - plain.num_parameters()
    sizes = [state_bytes(m.config, "no", OptimConfig())["weights"] for m in (model, plain)]
    assert sizes[0] - sizes[1] == 4 * more


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ValueError, match=f"auxiliary_layer {layer} must be 0"):
        small_network(num_layers=4, auxiliary_layer=layer)
    with pytest.raises(ValueError, match="auxiliary_layer is 0"):
        small_network()(pictures(), *INPUTS, return_auxiliary=True)


@pytest.mark.parametrize("weight", [0.0, 0.6, -0.1, float("nan")])
def test_a_weight_above_one_half_is_refused(weight):
    with pytest.raises(UserError, match=f"auxiliary_weight {weight} must be above 0 and at most"):
        ObjectiveConfig(auxiliary_weight=weight)
    with pytest.raises(UserError, match="auxiliary_layer"):
        ModelConfig(auxiliary_layer=-1)


def test_the_loss_adds_that_of_the_auxiliary_output(small_run, tmp_path):
    """The first step of a new network predicts zero twice: its loss is that of one 1.25 times."""
    half = with_head(small_run, objective=ObjectiveConfig(auxiliary_weight=0.25))
    losses = []
    for name, run in (("plain", small_run), ("half", half)):
        train(dataclasses.replace(run, out=str(tmp_path / name), steps=1))
        losses.append(float(rows_of(tmp_path / name)[0]["loss"]))
    assert losses[1] == pytest.approx(1.25 * losses[0], rel=1e-6)


def test_training_resumes_exactly_and_saves_the_layer_with_its_average(
    small_run, resumed_as_straight, tmp_path
):
    resumed_as_straight(with_head(small_run))
    out = tmp_path / "straight"
    model = ComplexityDiTTransformer2DModel.from_pretrained(out / "pipeline" / "transformer")
    assert model.config.auxiliary_layer == 1
    assert model.proj_out_aux.weight.any()
    raw = load_file(sorted((out / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert not torch.equal(model.proj_out_aux.weight, raw["proj_out_aux.weight"])

    # A checkpoint of another layer has the same shapes and another meaning.
    moved = dataclasses.replace(with_head(small_run, steps=9), init_from=str(out / "pipeline"))
    layers = dataclasses.replace(
        moved.model, auxiliary_layer=2, overrides=moved.model.overrides | {"num_layers": 3}
    )
    with pytest.raises(UserError, match="auxiliary_layer is 1 there and 2 here"):
        train(dataclasses.replace(moved, model=layers, out=str(tmp_path / "moved")))


def test_an_adapter_is_trained_with_the_frozen_layer(small_run, tmp_path):
    optim = dataclasses.replace(small_run.optim, lr=0.1)  # so that few steps are seen
    base = with_head(small_run, out=str(tmp_path / "base"), optim=optim)
    train(base)
    run = dataclasses.replace(
        base, out=str(tmp_path / "run"), init_from=base.out, lora=LoraOptions(rank=2)
    )
    train(run)
    rows = [float(row["loss"]) for row in rows_of(tmp_path / "run")]
    assert all(math.isfinite(loss) for loss in rows)
    pipe = load_pipeline(run.out)
    pipe.set_progress_bar_config(disable=True)
    assert all(
        "_aux" not in name for name, _ in pipe.transformer.named_parameters() if "lora" in name
    )

    def paint(**settings):
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 2, "output_type": "latent"} | settings
        return pipe(generator=generator, **call).images

    strong = {"internal_guidance_scale": 3.0}
    guided = paint(**strong)
    assert not torch.equal(guided, paint())
    assert not torch.equal(guided, paint(**strong, attention_kwargs={"scale": 0.0}))
