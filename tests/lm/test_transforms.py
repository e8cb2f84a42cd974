"""Transforms of torch over the model: torch.func, fake and meta tensors, export; int8 weights."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from complexity_lm import DeepForCausalLM
from complexity_lm.loading import load
from complexity_lm.tokenizer import train_tokenizer

KINDS = [
    {},
    {"num_experts": 3},
    {"dynamics_placement": "force_mlp", "dynamics_adaptive": "channel"},
    {"num_experts": 3, "dynamics_placement": "none"},
]


@pytest.fixture(params=KINDS, ids=["branch", "branch, routed", "force_mlp", "none, routed"])
def model(request, lively):
    return lively("eager", **request.param)


def loss_of(model, weights: dict[str, Tensor], row: Tensor) -> Tensor:
    batch = {"labels": row[None], "use_cache": False}
    return functional_call(model, weights, (row[None],), batch).loss


# Of torch, which has no rule for searching a sorted row.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # likewise
def test_gradients_per_row_are_those_of_each_row_alone(model, ids) -> None:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    both = vmap(grad(lambda w, row: loss_of(model, w, row)), in_dims=(None, 0))(weights, ids)
    for i, row in enumerate(ids):
        model.zero_grad()
        loss_of(model, dict(model.named_parameters()), row).backward()
        for name, p in model.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(both[name][i], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, once
def test_a_tangent_is_the_slope_of_the_loss(model, ids) -> None:
    model = model.double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    direction = {name: torch.randn_like(p) for name, p in weights.items()}
    _, slope = jvp(lambda w: loss_of(model, w, ids[0]), (weights,), (direction,))
    step = 1e-6
    above, below = (
        loss_of(model, {n: p + s * direction[n] for n, p in weights.items()}, ids[0])
        for s in (step, -step)
    )
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-8)


def test_shapes_without_values(model) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = DeepForCausalLM(model.config)
        batch = torch.randint(0, 64, (2, 7))
        out = fake(batch, labels=batch)
        out.loss.backward()
        assert fake.lm_head.weight.grad is not None
        assert out.logits.shape == (2, 7, 64)
    empty = torch.empty(2, 7, dtype=torch.int64, device="meta")
    assert model.to("meta")(empty).logits.shape == (2, 7, 64)


def test_an_exported_model_takes_any_batch(model, ids) -> None:
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        model, (ids,), {"use_cache": False}, strict=False,
        dynamic_shapes={"input_ids": sizes, "use_cache": None},
    ).module()  # fmt: skip
    other = torch.randint(1, 64, (2, 17))
    expected = model(other, use_cache=False).logits
    torch.testing.assert_close(exported(other, use_cache=False).logits, expected)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
def test_int8_weights_are_saved_and_loaded(lively, ids, tmp_path, experts) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    plain = lively(num_experts=experts, vocab_size=300, eos_token_id=0)
    plain.save_pretrained(tmp_path / "plain")
    int8 = quantization.Int8WeightOnlyConfig()
    by_name = quantization.FqnToConfig({r"re:.*\.(\w+_proj|mlp\.(gate|up|down))": int8})
    settings = TorchAoConfig(by_name if experts else int8)
    small = DeepForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    kinds = {name: type(p.data).__name__ for name, p in small.named_parameters()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "Int8Tensor"
    mlp = ["gate", "up", "down"] if experts else ["up_proj.weight", "down_proj.weight"]
    assert {kinds[f"model.layers.0.mlp.{name}"] for name in mlp} == {"Int8Tensor"}
    with torch.no_grad():
        logits, expected = small(ids).logits, plain(ids).logits
        assert 0 < (logits - expected).norm() / expected.norm() < 0.05
        small.save_pretrained(tmp_path / "small")
        train_tokenizer(["ka lo mi"], 258).save_pretrained(tmp_path / "small")
        for again in (
            DeepForCausalLM.from_pretrained(tmp_path / "small"),
            load(str(tmp_path / "small")).model,
        ):
            torch.testing.assert_close(again(ids).logits, logits)
    x = torch.randn(1, 5, small.config.hidden_size, requires_grad=True)
    small(inputs_embeds=x, routing_ids=ids[:1, :5]).logits.sum().backward()  # as beside an adapter
    assert x.grad is not None
    assert (x.grad != 0).all()
