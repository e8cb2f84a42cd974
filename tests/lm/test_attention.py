"""Which attention the language model uses, and that all of them agree."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from complexity_lm import DeepConfig, DeepForCausalLM, DeepModel

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(2 * 12).reshape(2, 12) % 50


def model_of(**changes):
    torch.manual_seed(0)
    return DeepForCausalLM(DeepConfig(**SIZES | changes)).to(torch.bfloat16).eval()


def test_bf16_on_a_cpu_uses_products_unless_an_implementation_is_named(product_calls, tmp_path):
    model = model_of()
    assert model.config._attn_implementation == "sdpa"
    model(IDS)
    assert len(product_calls) == 2  # one per layer
    named = model_of(attn_implementation="sdpa")
    named(IDS)
    model.set_attn_implementation("sdpa")  # the one it has
    model(IDS)
    model.set_attn_implementation("eager")
    model(IDS)
    assert len(product_calls) == 2

    named.save_pretrained(tmp_path)
    assert "attention" not in (tmp_path / "config.json").read_text().replace(
        "num_attention_heads", ""
    ).replace("full_attention", "").replace("use_bidirectional_attention", "")
    for options, count in (({}, 2), ({"attn_implementation": "sdpa"}, 0)):
        product_calls.clear()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
        loaded(IDS)
        copy.deepcopy(loaded)(IDS)
        assert len(product_calls) == 2 * count


def test_fp32_keeps_the_function_of_transformers(product_calls):
    model = model_of().float()
    found = model(IDS).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(found, model(IDS).logits)
    assert not product_calls


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_products_agree_with_the_other_implementations(product_calls, padding, window):
    model = model_of(sliding_window=window)
    mask = torch.ones_like(IDS)
    if padding:
        mask[0, :5] = 0
    exact = copy.deepcopy(model).double()
    expected = exact(IDS, attention_mask=mask).logits[mask.bool()]
    errors = {}
    for name in ("own", "sdpa", "eager"):
        if name != "own":
            model.set_attn_implementation(name)
        logits = model(IDS, attention_mask=mask).logits[mask.bool()]
        errors[name] = ((logits.double() - expected).norm() / expected.norm()).item()
    assert len(product_calls) == 2
    assert errors["own"] < 2 * max(errors["sdpa"], errors["eager"]) < 0.1


def test_cached_decoding_equals_the_whole_forward_in_bf16(product_calls):
    model = model_of()
    whole = model(IDS).logits.float()
    cache, parts = None, []
    for piece in IDS.split([7, 3, 1, 1], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits.float())
    found = torch.cat(parts, dim=1)
    assert (found - whole).norm() < 0.03 * whole.norm()
    assert {shape[2] for shape in product_calls} == {12, 7, 3}


def test_training_in_bf16_has_the_gradients_of_fp64(product_calls):
    model = model_of().float().train()
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    exact(IDS, labels=IDS).loss.backward()
    assert len(product_calls) == 2
    for (name, a), b in zip(model.named_parameters(), exact.parameters(), strict=True):
        if b.grad is not None and b.grad.norm() > 1e-6:
            assert (a.grad - b.grad).norm() < 0.1 * b.grad.norm(), name


def test_it_compiles_as_one_graph_and_checkpoints(product_calls):
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    )
    gradients = []
    for checkpointing in (False, True):
        model = model_of().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", None])
@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_a_bidirectional_model_reads_what_follows(implementation, window, tmp_path):
    torch.manual_seed(0)
    config = DeepConfig(**SIZES, sliding_window=window, use_bidirectional_attention=True)
    if implementation:
        config._attn_implementation = implementation
    model = DeepModel(config).eval()
    plain = model(IDS).last_hidden_state
    other = IDS.clone()
    other[:, 5] = 7
    changed = model(other).last_hidden_state
    near = slice(2, 9) if window else slice(0, 12)  # a token farther away is seen through layers
    assert not torch.isclose(changed[:, near], plain[:, near]).all(dim=-1).any()
    padded = torch.cat([IDS, torch.zeros_like(IDS)[:, :3]], dim=1)
    mask = (torch.arange(15) < 12).long().expand(2, -1)
    found = model(padded, attention_mask=mask).last_hidden_state[:, :12]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = DeepModel.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    torch.testing.assert_close(again(IDS).last_hidden_state, plain)
    config.use_bidirectional_attention = False
    earlier = slice(0, 5)
    before, after = (model(ids).last_hidden_state[:, earlier] for ids in (IDS, other))
    assert torch.equal(before, after)


def test_a_bidirectional_model_does_not_generate():
    model = model_of(use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="reads whole texts"):
        model.generate(IDS, max_new_tokens=2)
