"""PEFT's adapters, dense and routed: trained, saved, and loaded in each way that PEFT has."""

import pytest
import torch

from complexity_lm import DeepForCausalLM

peft = pytest.importorskip("peft")
pytestmark = [
    # PEFT uses a deprecated name of transformers, and warns in each `generate` with a prompt and of
    # any norm but torch's LayerNorm, also of Llama's.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

ROUTED = ["mlp.gate", "mlp.up", "mlp.down", "mlp.shared_gate"]
NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]
CAUSAL = {"task_type": "CAUSAL_LM"}

# What is injected into layers, and so can be loaded by transformers alone.
INJECTED = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **CAUSAL),
    "all-linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear", **CAUSAL),
    "norms": lambda: peft.LNTuningConfig(target_modules=NORMS, **CAUSAL),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj"], feedforward_modules=[], **CAUSAL
    ),
}
# What PEFT puts before the text or into the cache; PeftModel alone can do that, for any model.
PREPENDED = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
}


@pytest.fixture(params=[0, 3], ids=["dense", "routed"])
def base(request, lively, tmp_path):
    lively(num_experts=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base, settings, ids, folder, **more):
    """An adapter fitted for a few steps and saved; the losses, its logits and its greedy text."""
    model = peft.get_peft_model(DeepForCausalLM.from_pretrained(base), settings).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=ids, **more).logits
        text = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    return logits, text


def check(model, ids, logits, text, **more):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids, **more).logits, logits)
        again = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, text)


@pytest.mark.parametrize("kind", INJECTED)
def test_an_adapter_loads_in_every_way(base, ids, tmp_path, kind) -> None:
    logits, text = trained(base, INJECTED[kind](), ids, tmp_path / "adapter")
    check(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), ids, logits, text)
    check(DeepForCausalLM.from_pretrained(tmp_path / "adapter"), ids, logits, text)
    plain = DeepForCausalLM.from_pretrained(base)
    plain.load_adapter(str(tmp_path / "adapter"))
    check(plain, ids, logits, text)
    plain.disable_adapters()
    with torch.no_grad():
        assert (plain(ids).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", PREPENDED)
def test_a_learned_prompt_loads_and_generates(base, ids, tmp_path, kind) -> None:
    model = DeepForCausalLM.from_pretrained(base)
    # PEFT hands embeddings to the model: a routed one needs the ids of the text beside them.
    more = {"routing_ids": ids} if model.config.num_experts and kind == "prompt" else {}
    logits, text = trained(base, PREPENDED[kind](), ids, tmp_path / "adapter", **more)
    check(
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ids,
        logits,
        text,
        **more,
    )
    # The cached text is that of full passes.
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    written = ids
    for _ in range(5):
        more = {"routing_ids": written} if more else {}
        with torch.no_grad():
            last = model(input_ids=written, **more).logits[:, -1:]
        written = torch.cat([written, last.argmax(-1)], dim=1)
    assert torch.equal(written, text)


def test_lora_reaches_routed_experts_and_merges(lively, ids, tmp_path) -> None:
    lively(num_experts=3).save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=ROUTED, **CAUSAL)
    logits, text = trained(tmp_path / "base", settings, ids, tmp_path / "adapter")
    check(DeepForCausalLM.from_pretrained(tmp_path / "adapter"), ids, logits, text)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    names = {name.rsplit(".lora_", 1)[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert sum("mlp" in name for name in names) == 3 * len(ROUTED)
    check(model.merge_and_unload(), ids, logits, text)
