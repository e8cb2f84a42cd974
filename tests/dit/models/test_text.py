"""Text encoders: built, loaded and refused, and the hidden states of prompts."""

import logging
import sys

import pytest
import torch

from complexity_dit.config import TextEncoderConfig
from complexity_dit.models.text import (
    build_text_encoder,
    check_text_encoder,
    encode_prompts,
    text_width,
    warn_of_cut,
)
from inl_core.run.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("complexity_lm")

CAPTIONS = [
    "an impressionist landscape with a river", "a cubist portrait of a woman",
    "winter landscape", "the river in winter by Monet",
]  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}


def new_encoder(**settings):
    torch.manual_seed(0)
    config = TextEncoderConfig(source="lm", max_length=16, overrides=SMALL, **settings)
    return build_text_encoder(config, CAPTIONS)


def bert_folder(folder, **changes):
    """A BERT with a head, and a tokenizer of the captions."""
    tokenizer, _ = new_encoder()
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
        **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_none_is_no_encoder():
    assert build_text_encoder(TextEncoderConfig()) == (None, None)


def test_a_new_model_has_the_words_of_its_captions_and_trains():
    tokenizer, encoder = new_encoder()
    assert type(encoder).__name__ == "DeepModel"
    assert text_width(encoder) == 32
    assert len(tokenizer.tokenize(" landscape")) < 5  # of parts that occur in the captions
    states, mask = encode_prompts(tokenizer, encoder, CAPTIONS, 16)
    assert states.shape == (4, 16, 32)
    assert states.requires_grad
    assert mask.dtype == torch.bool
    states.square().mean().backward()
    assert encoder.embed_tokens.weight.grad.abs().sum() > 0
    again = new_encoder()[1].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in encoder.state_dict().items())


@torch.no_grad()
def test_bidirectional_tokens_see_the_whole_prompt():
    for bidirectional in (False, True):
        tokenizer, encoder = new_encoder(bidirectional=bidirectional)
        pair = ["winter landscape", "winter portrait"]
        states, _ = encode_prompts(tokenizer, encoder, pair, 16)
        assert torch.allclose(states[0, 1], states[1, 1], atol=1e-4) is not bidirectional


@torch.no_grad()
def test_an_empty_prompt_has_no_tokens_and_spaces_do_not_count():
    tokenizer, encoder = new_encoder()
    prompts = ["", None, "  \n", "the  river\n", "the river"]
    states, mask = encode_prompts(tokenizer, encoder, prompts, 16)
    assert mask.any(dim=1).tolist() == [False, False, False, True, True]
    torch.testing.assert_close(states[3], states[4])


def test_a_long_prompt_is_cut_and_named(caplog):
    tokenizer, encoder = new_encoder()
    _, mask = encode_prompts(tokenizer, encoder, ["the river", "river winter " * 12], 16)
    assert mask.sum(dim=1).tolist()[1] == 16
    with caplog.at_level(logging.WARNING, "complexity_dit"):
        warn_of_cut(tokenizer, ["the river", None], 16)
        assert not caplog.records
        warn_of_cut(tokenizer, ["the river", "river winter " * 12], 16)
    (record,) = caplog.records
    assert "1 of 2 prompts have more than 16 tokens" in record.getMessage()
    assert "winter" in record.getMessage()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a\x00b", r"U\+0000"), ("a\x1b[31m", r"U\+001B"), ("\ud800", r"U\+D800"), (3, "3 is int"),
     (b"river", "bytes"), (float("nan"), "float")],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(prompt, message):
    tokenizer, encoder = new_encoder()
    with pytest.raises(UserError, match=message):
        encode_prompts(tokenizer, encoder, ["river", prompt], 16)


def test_a_new_model_needs_captions_and_sizes_that_fit():
    config = TextEncoderConfig(source="lm", overrides=SMALL)
    for captions in ([], ["", " "]):
        with pytest.raises(UserError, match="there is none"):
            build_text_encoder(config, captions)
    for wrong in ({"hidden_size": 30, "num_attention_heads": 4}, {"width": "x"}):
        config = TextEncoderConfig(source="lm", overrides=SMALL | wrong)
        with pytest.raises(UserError, match=r"text_encoder\.overrides"):
            build_text_encoder(config, CAPTIONS)


@torch.no_grad()
def test_a_trained_model_of_complexity_lm(tmp_path):
    from complexity_lm import DeepForCausalLM

    tokenizer, encoder = new_encoder()
    model = DeepForCausalLM(encoder.config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for trainable in (None, True):
        config = TextEncoderConfig(f"lm:{tmp_path}", trainable=trainable, max_length=16)
        own, loaded = build_text_encoder(config)
        assert all(p.requires_grad is bool(trainable) for p in loaded.parameters())
        states, _ = encode_prompts(own, loaded, CAPTIONS, 16)
        model.model.eval()
        torch.testing.assert_close(states, encode_prompts(tokenizer, model.model, CAPTIONS, 16)[0])
    with pytest.raises(UserError, match="no-such"):
        build_text_encoder(TextEncoderConfig(f"lm:{tmp_path}/no-such"))


@torch.no_grad()
def test_an_encoder_of_transformers_without_its_head(tmp_path):
    tokenizer, encoder = build_text_encoder(
        TextEncoderConfig(f"hf:{bert_folder(tmp_path)}", max_length=16)
    )
    assert type(encoder).__name__ == "BertModel"
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.pooler.dense.weight.any()  # of which the file has none
    states, mask = encode_prompts(tokenizer, encoder, CAPTIONS, 16)
    assert states.shape == (4, 16, 24)
    assert 0 < mask.sum() < mask.numel()
    with pytest.raises(UserError, match="32 positions, fewer than max_length 64"):
        build_text_encoder(TextEncoderConfig(f"hf:{tmp_path}"))


@pytest.mark.parametrize("family", ["t5", "clip"])
@torch.no_grad()
def test_of_a_model_with_two_halves_the_one_that_reads(tmp_path, family):
    tokenizer, _ = new_encoder()
    tokenizer.save_pretrained(tmp_path)
    if family == "t5":
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=300, d_model=24, d_kv=8, d_ff=32, num_layers=2,
                                  num_heads=2, decoder_start_token_id=0)
        )  # fmt: skip
        reader = model.encoder
    else:
        text = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
                "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
        vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        )
        reader = model.text_model
    model.eval().save_pretrained(tmp_path)
    own, encoder = build_text_encoder(TextEncoderConfig(f"hf:{tmp_path}", max_length=16))
    assert type(encoder).__name__ == {"t5": "T5EncoderModel", "clip": "CLIPTextModel"}[family]
    states, _ = encode_prompts(own, encoder, CAPTIONS, 16)
    batch = own(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt")
    expected = reader(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    torch.testing.assert_close(states, expected.last_hidden_state)


def test_tokenizer_and_encoder_that_differ_are_refused(tmp_path):
    tokenizer, encoder = new_encoder()
    folder = bert_folder(tmp_path)
    small = transformers.BertModel(
        transformers.BertConfig(vocab_size=100, hidden_size=24, num_hidden_layers=1,
                                num_attention_heads=2, intermediate_size=32)
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the text encoder 100 \(vocab_size\)"):
        check_text_encoder(tokenizer, small, 16)
    with pytest.raises(UserError, match="no fast version"):
        check_text_encoder(None, encoder, 16)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        build_text_encoder(TextEncoderConfig(f"hf:{folder}", max_length=16))
    with pytest.raises(UserError, match="no folder"):
        build_text_encoder(TextEncoderConfig(f"hf:{folder}/no-such/folder"))


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = bert_folder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense\.weight is missing"):
        build_text_encoder(TextEncoderConfig(f"hf:{tmp_path}", max_length=16))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "complexity_lm", None)
    with pytest.raises(UserError, match="needs complexity-lm: pip install"):
        build_text_encoder(TextEncoderConfig(source="lm"), CAPTIONS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers: pip install"):
        build_text_encoder(TextEncoderConfig(source="hf:a/b"))
