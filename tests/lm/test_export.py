"""GGUF files of plain transformers: read back by transformers, and refused where not the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from complexity_lm.data import load_split
from complexity_lm.export import export_gguf
from complexity_lm.loading import load
from complexity_lm.tokenizer import CHAT_TEMPLATE, train_tokenizer
from inl_core.run.errors import UserError

gguf = pytest.importorskip("gguf")

PLAIN = {"dynamics_placement": "none", "head_dim": 128}  # 128: transformers' reader has no other


@pytest.fixture
def save(lively, small_run, tmp_path):
    """Save a model with a tokenizer of a few hundred ids; returns the folder."""
    texts = load_split(small_run.data, "all")["text"]

    def folder(**settings):
        tokenizer = train_tokenizer(texts, 288)
        tokenizer.chat_template = CHAT_TEMPLATE
        sizes = {"vocab_size": 300, "eos_token_id": 0, "pad_token_id": 1}
        lively(**(sizes | settings)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_logits_and_tokens(save, ids, texts, tmp_path, tied) -> None:
    folder = save(**PLAIN, tie_word_embeddings=tied, rope_parameters={
        "rope_type": "default", "rope_theta": 5000.0})  # fmt: skip
    path = export_gguf(str(folder), str(tmp_path / "model.gguf"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert again.config.model_type == "qwen3"
    ours = load(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, ours.model(ids).logits)
    reader = gguf.GGUFReader(path)
    stored = [str(field) for field in reader.get_field("tokenizer.ggml.tokens").contents()]
    assert stored[:288] == [ours.tokenizer.convert_ids_to_tokens(i) for i in range(288)]
    assert stored[288:] == [f"[PAD{i}]" for i in range(288, 300)]
    assert reader.get_field("tokenizer.chat_template").contents() == CHAT_TEMPLATE
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    assert len(merges) == 288 - 258
    with pytest.raises(UserError, match="exists: choose another"):
        export_gguf(str(folder), str(path))


@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 1e-2), ("bf16", 8e-2), ("q8_0", 8e-2)])
def test_smaller_types(save, ids, tmp_path, outtype, tolerance) -> None:
    folder = save(**PLAIN, intermediate_size=64)
    path = export_gguf(str(folder), str(tmp_path / "small.gguf"), outtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = load(str(folder)).model(ids).logits
        error = (again.eval()(ids).logits - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    whole = export_gguf(str(folder), str(tmp_path / "whole.gguf"))
    assert path.stat().st_size < 0.6 * whole.stat().st_size


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dynamics_placement": "force_mlp"}, r"cannot run dynamics_placement 'force_mlp': docs"),
        ({"num_experts": 2}, r"cannot run dynamics_placement 'branch', num_experts 2: "),
        ({**PLAIN, "sliding_window": 8}, "sliding_window 8"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(save, tmp_path, settings, words) -> None:
    defaults = {"dynamics_placement": "branch"} if "num_experts" in settings else {}
    folder = save(**(defaults | settings))
    with pytest.raises(UserError, match=words):
        export_gguf(str(folder), str(tmp_path / "x.gguf"))
    assert not (tmp_path / "x.gguf").exists()


def test_rows_that_do_not_fill_blocks_and_other_tokenizers_are_refused(
    save, words, tmp_path
) -> None:
    folder = save(**PLAIN)
    with pytest.raises(UserError, match=r"down_proj\.weight cannot be stored as q8_0"):
        export_gguf(str(folder), str(tmp_path / "x.gguf"), "q8_0")
    words("<unk>", "ka", "lo", eos_token="<unk>").save_pretrained(folder)
    with pytest.raises(UserError, match="not a byte-level BPE in GPT-2's form"):
        export_gguf(str(folder), str(tmp_path / "x.gguf"))
