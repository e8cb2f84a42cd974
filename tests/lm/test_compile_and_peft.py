"""torch.compile and LoRA."""

import copy

import pytest
import torch
from transformers import CompileConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "experts"), [("branch", 0), ("force", 3)])
def test_forward_and_backward_compile_to_one_graph(lively, ids, placement, experts) -> None:
    model = lively(dynamics_placement=placement, num_experts=experts, num_hidden_layers=2).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    losses = []
    for each in (eager, compiled):
        loss = each(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
def test_compiled_generation_gives_the_eager_text(lively, ids, experts) -> None:
    model = lively(num_experts=experts, num_hidden_layers=2)
    how = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **how)
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators by itself
    current = model.generate(
        ids, **how, cache_implementation="static", compile_config=compile_config
    )
    assert model._compiled_call is not None  # otherwise nothing was compiled
    assert torch.equal(current, expected)


# PEFT uses a deprecated name of transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_its_weights_only_and_merges(lively, ids, fit) -> None:
    peft = pytest.importorskip("peft")
    base = lively(num_experts=3).double()
    before = copy.deepcopy(base)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings).double().train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 3 * 2
    assert all("lora_" in name for name in trained)

    losses = fit(model, ids, 12, 1e-2)
    assert losses[-1] < losses[0] - 0.1

    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert type(merged) is type(before)
        torch.testing.assert_close(merged(ids).logits, expected)
        assert (merged(ids).logits - before(ids).logits).abs().max() > 0.1
    for (name, a), b in zip(before.named_parameters(), merged.parameters(), strict=True):
        is_target = any(part in name for part in ("q_proj", "v_proj", "o_proj"))
        assert torch.equal(a, b) != is_target, name
