"""A tokenizer that this package did not make is used as it is, or refused with the reason."""

import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from complexity_lm import DeepConfig, DeepForCausalLM
from complexity_lm.generate import generate
from complexity_lm.loading import Loaded, load
from complexity_lm.scoring import score_texts
from inl_core.run.errors import UserError

CONTEXT = 48
WORDS = ["ka", "lo", "mi", "ne"]
SPECIAL = ["<unk>", "<end>", "<pad>"]
"""Names of special tokens, some of which a vocabulary has, or else get ids of their own."""


@functools.cache
def saved_model(place: Path, kind: str, vocab_size: int, end: int | None) -> Path:
    folder = place / f"{kind}-{vocab_size}-{end}"
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT, "eos_token_id": end, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    settings = {**sizes, "initializer_range": 0.5}
    model = (
        DeepForCausalLM(DeepConfig(**settings)) if kind == "deep"
        else LlamaForCausalLM(LlamaConfig(**settings))
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@st.composite
def tokenizers(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    """Words or bytes, with holes between ids, with and without special and added tokens."""
    special = draw(st.lists(st.sampled_from(SPECIAL), unique=True))
    if draw(st.booleans()):
        tokens = [*special, *WORDS]
        core = models.WordLevel(unk_token="<unk>")
        before = pre_tokenizers.Whitespace()
    else:
        tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        core, before = models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    holes = draw(st.sets(st.integers(0, len(tokens)), max_size=3))
    ids = [i for i in range(len(tokens) + len(holes)) if i not in holes]
    backend = Tokenizer(core)
    backend.pre_tokenizer = before
    content = json.loads(backend.to_str())
    content["model"]["vocab"] = dict(zip(tokens, draw(st.permutations(ids)), strict=True))
    if isinstance(core, models.BPE):
        content["decoder"] = {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
        }  # fmt: skip
    backend = Tokenizer.from_str(json.dumps(content))
    named = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>"}
    chosen = draw(st.lists(st.sampled_from(sorted(named)), unique=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        **{name: named[name] for name in chosen},
    )  # fmt: skip
    added = draw(st.lists(st.sampled_from(["ru ka", "☕", "<tool>"]), unique=True))
    tokenizer.add_tokens(added, special_tokens=draw(st.booleans()))
    if tokenizer.eos_token_id is not None and draw(st.booleans()):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<end> $A", special_tokens=[("<end>", tokenizer.eos_token_id)]
        )
    return tokenizer


TEXTS = st.text(max_size=6) | st.lists(
    st.sampled_from([*WORDS, *SPECIAL, "ru ka", "☕", "<tool>"]), max_size=5
).map(" ".join)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def load_with(place, tokenizer, folder, kind, room, end) -> Loaded | None:
    """The model with the tokenizer; None if they do not belong together, which is refused."""
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, own_end = list(tokenizer.get_vocab().values()), tokenizer.eos_token_id
    size = max(ids) + 1 + room
    ends = {"none": None, "same": own_end, "other": max(ids)}[end]
    wrong = room < 0 or len(set(ids)) < len(ids) or ends not in (None, own_end)
    model = saved_model(place, kind, size, ends)
    if wrong:
        with pytest.raises(UserError, match=r"do not belong together|for two tokens"):
            load(str(model), str(folder))
        return None
    loaded = load(str(model), str(folder))
    loaded.model.double()
    return loaded


def encoded(tokenizer: PreTrainedTokenizerFast, text: str, **how: bool) -> list[int] | None:
    try:
        return tokenizer.backend_tokenizer.encode(text, **how).ids
    except Exception:  # of the library: a word without an id
        return None


@torch.no_grad()
def nats(model, ids: list[int]) -> float:
    logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return -float(logits.gather(1, torch.tensor(ids[1:])[:, None]).sum())


@torch.no_grad()
def greedy(model, ids: list[int], steps: int) -> list[int]:
    for _ in range(steps):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


KINDS = {
    "kind": st.sampled_from(["deep", "llama"]), "room": st.sampled_from([0, 0, 5, 5, -1]),
    "end": st.sampled_from(["same", "same", "none", "none", "other"]),
}  # fmt: skip


@given(tokenizer=tokenizers(), text=TEXTS, **KINDS)
def test_a_text_is_scored_by_its_ids_or_refused(place, tmp_path, tokenizer, text, kind, room, end):
    loaded = load_with(place, tokenizer, tmp_path, kind, room, end)
    if loaded is None:
        return
    backend = loaded.tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # they are text in a document
    ids = encoded(loaded.tokenizer, text, add_special_tokens=False)
    separator = loaded.tokenizer.eos_token_id
    usable = ids and separator is not None and backend.decode(ids, False) == text
    backend.encode_special_tokens = False
    try:
        score = score_texts(loaded.model, loaded.tokenizer, [text], context=CONTEXT)
    except UserError:
        assert not usable
    else:
        assert usable
        assert (score.tokens, score.bytes) == (len(ids), len(text.encode()))
        assert score.nats == pytest.approx(nats(loaded.model, [separator, *ids]))


@given(tokenizer=tokenizers(), texts=st.lists(TEXTS, min_size=1, max_size=3), **KINDS)
def test_prompts_are_continued_by_their_ids_or_refused(
    place, tmp_path, tokenizer, texts, kind, room, end
):
    loaded = load_with(place, tokenizer, tmp_path, kind, room, end)
    if loaded is None:
        return
    rows = [encoded(loaded.tokenizer, text) for text in texts]
    try:
        written = list(generate(loaded, texts, {"max_new_tokens": 4, "do_sample": False}))
    except UserError:
        assert not all(rows)
    else:
        expected = [
            [loaded.tokenizer.decode(greedy(loaded.model, ids, 4), skip_special_tokens=True)]
            for ids in rows
        ]
        assert written == expected
