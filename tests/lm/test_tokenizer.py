"""Tokenizers: lossless encoding, saving, and the ones that are rejected."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from complexity_lm import DeepConfig
from complexity_lm.config import DataConfig
from complexity_lm.data import load_split, make_tokenizer
from complexity_lm.tokenizer import (
    END_OF_TEXT,
    PADDING,
    check_tokenizer,
    load_tokenizer,
    separator_id,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from inl_core.run.errors import UserError
from support.disk import small_files

TRICKY = ["", " ", "\n\n\ttab  two  spaces ", "naïve ☕ 中文 \U0001f680", "a\x00b\r\n", "x" * 300]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(load_split(DataConfig(source=f"text:{texts}"), "train")["text"], 300)


def test_encoding_is_lossless(tokenizer, texts):
    for text in [*TRICKY, (texts / "00.txt").read_text()]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_training_gives_tokens_longer_than_bytes(tokenizer, texts):
    text = (texts / "00.txt").read_text()
    assert len(tokenizer) == 300
    assert len(tokenizer(text)["input_ids"]) < 0.75 * len(text.encode())


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token) == (END_OF_TEXT, END_OF_TEXT)
    assert tokenizer.pad_token == PADDING
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    # A text begins with a separator, as in training.
    assert tokenizer("ka")["input_ids"][0] == separator_id(tokenizer)


def test_a_loaded_tokenizer_equals_the_saved_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    before = tokenizer_hash(tokenizer)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_hash(loaded) == before
    loaded(["ka", "ka lo"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(loaded) == before
    assert loaded.padding_side == "left"
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain("ka lo mi")["input_ids"] == tokenizer("ka lo mi")["input_ids"]


def test_training_is_deterministic(texts):
    data = load_split(DataConfig(source=f"text:{texts}"), "train")["text"]
    assert tokenizer_hash(train_tokenizer(data, 290)) == tokenizer_hash(train_tokenizer(data, 290))


def test_a_vocabulary_smaller_than_the_bytes_is_rejected(texts):
    with pytest.raises(UserError, match=r"vocab_size is 100; .*at least 258"):
        train_tokenizer(["ka"], 100)


def test_a_missing_padding_token_becomes_the_end_token(words, tmp_path):
    words("<unk>", "<end>", "ka", unk_token="<unk>", eos_token="<end>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<end>"


def test_a_tokenizer_without_end_token_is_rejected(words):
    with pytest.raises(UserError, match=r"no end-of-text \(eos\) token"):
        separator_id(words("<unk>", "ka", unk_token="<unk>"))


def test_the_largest_id_counts_where_ids_are_missing(words):
    inner = json.loads(words("<eos>", "ka", "lu", eos_token="<eos>").backend_tokenizer.to_str())
    inner["model"]["vocab"]["lu"] = 70_000
    holes = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)), eos_token="<eos>"
    )
    assert vocabulary_size(holes) == 70_001 > len(holes)
    with pytest.raises(UserError, match="has ids up to 70000, the model 10"):
        check_tokenizer(holes, DeepConfig(vocab_size=10), None)


def test_a_tokenizer_of_another_model_is_rejected(tokenizer):
    def config(**changes):
        return DeepConfig(**({"vocab_size": 300, "eos_token_id": 0} | changes))

    check_tokenizer(tokenizer, config(), tokenizer_hash(tokenizer))
    check_tokenizer(tokenizer, config(vocab_size=512, eos_token_id=[3, 0]), None)
    with pytest.raises(UserError, match=r"has ids up to 299, the model 256"):
        check_tokenizer(tokenizer, config(vocab_size=256), None)
    with pytest.raises(UserError, match=r"id of the tokenizer is 0, that of the model 2"):
        check_tokenizer(tokenizer, config(eos_token_id=2), None)
    with pytest.raises(UserError, match="not the one that the model was trained with"):
        check_tokenizer(tokenizer, config(), "0" * 64)


def test_a_full_disk_is_one_line(texts, tmp_path):
    with small_files(1000), pytest.raises(UserError, match=r"cannot write .*free space.*--out"):
        make_tokenizer(f"text:{texts}", str(tmp_path / "tok"), 300)
    assert list(tmp_path.iterdir()) == []


def test_make_tokenizer_uses_the_training_side(texts, tokenizer, tmp_path):
    summary = make_tokenizer(f"text:{texts}", str(tmp_path / "tok"), 300)
    assert "300 ids" in summary
    assert tokenizer_hash(load_tokenizer(tmp_path / "tok")) == tokenizer_hash(tokenizer)
    with pytest.raises(UserError, match="exists; choose another --out"):
        make_tokenizer(f"text:{texts}", str(tmp_path / "tok"), 300)


def test_folders_without_a_tokenizer_are_rejected(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "rubbish"}))
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
