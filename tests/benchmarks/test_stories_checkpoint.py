"""The script that makes the committed checkpoint of a run of stories, on a run of two steps."""

import json

import pytest
from benchmarks.study import stories_checkpoint
from safetensors import safe_open
from transformers import AutoConfig

from complexity_lm.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)
from complexity_lm.evaluate import evaluate
from complexity_lm.loading import load
from complexity_lm.train import train
from support.benchmark_rows import call


@pytest.fixture
def run(tmp_path):
    stories = [f"Story {i} of {i * i} mice.\nThey saw {i + 2} cats.\n" for i in range(200)]
    text = tmp_path / "stories.txt"
    text.write_text("<|endoftext|>\n".join(stories))
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    config = TrainConfig(
        out=str(tmp_path / "run"), steps=2, batch_size=2, eval_every=1, keep_best=True,
        report_to="none", mixed_precision="no",
        data=DataConfig(
            source=f"text:{text}", context=128, document_separator="<|endoftext|>", holdout=0.2
        ),
        tokenizer=TokenizerConfig(vocab_size=300), model=ModelConfig(overrides=sizes),
        optim=OptimConfig(warmup_steps=1),
    )  # fmt: skip
    train(config)
    return tmp_path / "run"


def test_a_checkpoint_has_weights_in_bf16_and_a_card_of_its_own_numbers(
    run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "checkpoints/lm-stories"
    monkeypatch.setattr(stories_checkpoint, "PROMPTS", ("Story",))
    monkeypatch.setattr(stories_checkpoint, "NEW_TOKENS", 20)
    call(monkeypatch, stories_checkpoint, run, "--out", out, "--rounds", 1)
    card = (out / "README.md").read_text()
    assert card in capsys.readouterr().out
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert AutoConfig.from_pretrained(out).dtype is not None
    everything = "".join(path.read_text() for path in out.glob("*.json"))
    assert str(tmp_path) not in everything + card

    result = json.loads((out / "result.json").read_text())
    source = json.loads((run / "result.json").read_text())["settings"]["data"]["source"]
    loaded = load(str(out))
    again = evaluate(loaded, source, config=EvalConfig(split="heldout", quiet=True))
    assert again["metrics"]["bits_per_byte"] == result["metrics"]["bits_per_byte"]
    assert again["text_fingerprint"] == result["text_fingerprint"]
    llama = json.loads((run / "llama/run/result.json").read_text())
    assert llama["text_fingerprint"] == result["text_fingerprint"]
    assert llama["parameters"] == pytest.approx(result["run"]["parameters"], rel=0.005)
    for value in (
        result["metrics"]["bits_per_byte"], result["metrics"]["gzip_bits_per_byte"],
        result["metrics"]["order5_bits_per_byte"], llama["metrics"]["bits_per_byte"],
    ):  # fmt: skip
        assert f"| {value:.3f} |" in card

    # The Llama is there: only the folder is made again.
    before = (run / "llama/run/result.json").stat().st_mtime_ns
    call(monkeypatch, stories_checkpoint, run, "--out", out, "--rounds", 1)
    assert (run / "llama/run/result.json").stat().st_mtime_ns == before
