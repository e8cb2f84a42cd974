"""Training on conversations: what is read, what is learnt, what is left out, and what is saved."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from complexity_lm.chat import Conversation
from complexity_lm.config import DataConfig, EvalConfig, TrainConfig
from complexity_lm.conversations import (
    IGNORED,
    encode_conversations,
    pack_conversations,
    use_template,
)
from complexity_lm.data import collate, load_corpus, load_split, make_tokenizer
from complexity_lm.evaluate import evaluate
from complexity_lm.loading import load
from complexity_lm.scoring import score_conversations
from complexity_lm.tokenizer import CHAT_TEMPLATE
from complexity_lm.train import train
from inl_core.run.checkpoints import all_checkpoints
from inl_core.run.errors import UserError
from support.outcomes import rows_of

ANIMALS = {"dog": "wuff wuff", "cat": "miau", "cow": "muuuh", "owl": "schuhu"}


def conversation(draw, turns: int = 1) -> list[dict[str, str]]:
    """Questions of random letters about an animal; what it says can be learnt, the letters not."""
    messages = []
    for _ in range(turns):
        animal = str(draw.choice(list(ANIMALS)))
        noise = "".join(draw.choice(list("abcdefghijkl"), 2))
        messages.append({"role": "user", "content": f"{noise} {animal}?"})
        messages.append({"role": "assistant", "content": ANIMALS[animal]})
    return messages


def lines_of(count: int, seed: int) -> str:
    draw = np.random.default_rng(seed)
    rows = [{"messages": conversation(draw, int(draw.integers(1, 3)))} for _ in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def talks(tmp_path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text(lines_of(300, 0))
    return path


@pytest.fixture
def chat_run(small_run, talks) -> TrainConfig:
    data = DataConfig(source=f"text:{talks}", format="chat", context=80, holdout=0.2)
    return dataclasses.replace(small_run, data=data, steps=160, batch_size=12, eval_every=40)


def losses_of_kinds(loaded, texts: list[str]) -> tuple[float, float]:
    """Mean nats of the tokens of answers, and of all others."""
    answers, others = [], []
    for text in texts:
        encoded = loaded.tokenizer.apply_chat_template(
            json.loads(text), return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            logits = loaded.model(ids).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        mask = torch.tensor(encoded["assistant_masks"][1:]).bool()
        answers += nats[mask].tolist()
        others += nats[~mask].tolist()
    return float(np.mean(answers)), float(np.mean(others))


def test_only_answers_are_learnt_and_the_model_talks(chat_run, capsys) -> None:
    folder = train(chat_run)
    loaded = load(str(folder))
    texts = list(load_split(chat_run.data, "heldout")["text"])
    answers, others = losses_of_kinds(loaded, texts)
    assert answers < 0.4
    assert others > np.log(len(loaded.tokenizer)) - 0.5  # as at the start, or worse

    # The logs and the result count the same.
    first, *_, last = rows_of(Path(chat_run.out) / "heldout_log.csv")
    assert float(last["loss"]) < 0.5 * float(first["loss"])
    result = json.loads((Path(chat_run.out) / "result.json").read_text())
    assert result["metrics"]["loss"] == pytest.approx(answers, rel=1e-4)
    contents = [m["content"] for t in texts for m in json.loads(t) if m["role"] == "assistant"]
    assert result["n_bytes"] == sum(len(content.encode()) for content in contents)
    measured = evaluate(str(folder), chat_run.data.source)
    assert measured["metrics"] == {k: result["metrics"][k] for k in measured["metrics"]}
    with pytest.raises(UserError, match="scored as wholes"):
        evaluate(str(folder), chat_run.data.source, config=EvalConfig(baselines=True))

    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.chat_template == CHAT_TEMPLATE
    talk = Conversation(loaded, {"do_sample": False, "max_new_tokens": 20})
    said = [talk.answer(f"ba {animal}?")[0] for animal in ("cow", "dog")]
    assert said == [ANIMALS["cow"], ANIMALS["dog"]]


def test_a_chat_run_resumes_exactly(chat_run, tmp_path) -> None:
    run = dataclasses.replace(chat_run, steps=8, checkpoint_every=4, eval_every=4)
    train(run)
    cut = dataclasses.replace(run, out=str(tmp_path / "cut"))
    train(dataclasses.replace(cut, steps=4))
    train(dataclasses.replace(cut, resume="auto"))
    # The schedule of the first half was shorter; from step 4 on rates are those of the long run.
    assert [row["step"] for row in rows_of(cut.out)] == [row["step"] for row in rows_of(run.out)]
    again = dataclasses.replace(run, resume="auto")
    last = all_checkpoints(Path(run.out) / "checkpoints")[-1]
    weights = (last / "model.safetensors").read_bytes()
    for path in sorted(last.iterdir()):
        path.unlink()
    last.rmdir()
    train(again)
    assert (last / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match=r"data\.format is chat there and text here"):
        train(dataclasses.replace(again, data=dataclasses.replace(run.data, format="text")))


def tokenizer_of(talks: Path):
    out = talks.parent / "tokenizer"
    if not out.exists():
        make_tokenizer(f"text:{talks}", str(out), 300, DataConfig("", format="chat", holdout=0))
    tokenizer = AutoTokenizer.from_pretrained(out)
    use_template(tokenizer)
    return tokenizer


def test_blocks_hold_whole_conversations_that_do_not_see_each_other(talks, lively) -> None:
    tokenizer = tokenizer_of(talks)
    documents = load_split(DataConfig(f"text:{talks}", format="chat"), "all").select(range(40))
    tokens = encode_conversations(documents, tokenizer, 80, "training")
    assert len(tokens) == 40
    blocks = pack_conversations(tokens, 80, tokenizer)
    assert sum(blocks["bytes"]) == sum(tokens["bytes"])
    filled = sorted(80 - ids.count(tokenizer.pad_token_id) for ids in blocks["input_ids"])
    assert len(blocks) < 40
    assert filled[0] + filled[1] > 80  # no two blocks would fit into one
    batch = collate([blocks[i] for i in range(len(blocks))])
    assert {name: tuple(value.shape[1:]) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (80,)
    )
    begins = (batch["position_ids"] == 0) & (batch["input_ids"] != tokenizer.pad_token_id)
    assert begins.sum() == 40
    assert (batch["labels"][begins] == IGNORED).all()
    assert (batch["labels"] != IGNORED).sum() == sum(
        label != IGNORED for row in tokens["labels"] for label in row
    )
    model = lively(vocab_size=300, max_position_embeddings=80).double()
    packed = model(**batch)
    texts = list(documents["text"])
    alone = score_conversations(model, tokenizer, texts, 80)
    assert packed.loss.item() == pytest.approx(alone.loss, rel=1e-6)
    assert alone.tokens == (batch["labels"] != IGNORED).sum()


def test_rows_that_are_no_conversation_are_counted_and_named(talks, caplog, chat_run) -> None:
    good = talks.read_text().splitlines()
    bad = [
        "{not JSON",
        '{"text": "no messages"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "No answer."}]}',
        '{"messages": [{"role": "judge", "content": "Silence!"}]}',
        json.dumps({"messages": [{"role": "user", "content": "long " * 100},
                                 {"role": "assistant", "content": "yes"}]}),
    ]  # fmt: skip
    talks.write_text("\n".join([good[0], *bad, *good[1:], ""]))
    data = dataclasses.replace(chat_run.data, holdout=0)
    train(dataclasses.replace(chat_run, data=data, steps=1, eval_every=0))
    read, encoded = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "3 of 306 conversations are left out (2 no list of messages with" in read
    assert "1 not JSON" in read
    assert "talks.jsonl:2: not JSON: " in read
    assert "talks.jsonl:3: no list of messages with role and content in 'messages'" in read
    assert "the training text: 3 of 303 conversations are left out" in encoded
    for words in (
        "that which begins with 'No answer.': without an answer of the assistant",
        "'Silence!': refused by the chat template: role judge is not system, user or assistant",
        "longer than data.context 80",
    ):
        assert words in encoded
    talks.write_text("\n".join(bad[:3]))
    with pytest.raises(UserError, match=r"has no conversation to train on: talks\.jsonl:1: not JS"):
        load_corpus(data)


def test_a_dataset_with_a_column_of_messages(talks, tmp_path) -> None:
    import datasets

    rows = [{"chat": json.loads(line)["messages"]} for line in talks.read_text().splitlines()]
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "rows.parquet")
    source = f"hub:{tmp_path / 'rows'}"
    data = DataConfig(source, format="chat", messages_column="chat")
    lines = load_split(DataConfig(f"text:{talks}", format="chat"), "all")["text"]
    assert sorted(map(sorted_keys, load_split(data, "all")["text"])) == sorted(
        map(sorted_keys, lines)
    )
    with pytest.raises(UserError, match=r"no messages in column 'messages' \(its columns: chat\)"):
        load_corpus(DataConfig(source, format="chat"))


def sorted_keys(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)


def test_a_template_without_marks_is_refused(chat_run, talks, tmp_path) -> None:
    tokenizer = tokenizer_of(talks)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "own")
    own = dataclasses.replace(chat_run.tokenizer, path=str(tmp_path / "own"))
    with pytest.raises(UserError, match=r"does not mark the answers with {% generation %}"):
        train(dataclasses.replace(chat_run, tokenizer=own))
    with pytest.raises(UserError, match="not stdlib"):
        DataConfig(format="chat")
