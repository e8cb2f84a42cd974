"""Conversations: the template, the history, and the terminal."""

import io
import subprocess
import sys
from typing import Any

import pytest

from complexity_lm import DeepConfig, DeepForCausalLM
from complexity_lm.chat import Conversation, chat
from complexity_lm.loading import Loaded, load
from complexity_lm.tokenizer import CHAT_TEMPLATE, train_tokenizer
from inl_core.run.errors import UserError

TEXT = "User: Once upon a time there was a small model. Assistant: It had a short context."
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A small model."},
    {"role": "user", "content": "And how small?"},
    {"role": "assistant", "content": "Very."},
]


def _loaded(context: int = 64, template: str | None = CHAT_TEMPLATE) -> Loaded:
    tokenizer: Any = train_tokenizer([TEXT], 300)
    tokenizer.chat_template = template
    config = DeepConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Loaded(DeepForCausalLM(config).eval(), tokenizer, None, "a model")


def test_template_marks_the_answers_and_their_ends():
    tokenizer: Any = _loaded().tokenizer
    whole = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, marks = whole["input_ids"], whole["assistant_masks"]
    learnt = [i for i, mark in zip(ids, marks, strict=True) if mark]
    end = tokenizer.eos_token
    assert tokenizer.decode(learnt) == f"A small model.{end}Very.{end}"
    # The prompt of the last answer is the beginning of the whole conversation.
    prompt = tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=True)
    assert ids[: len(prompt["input_ids"])] == prompt["input_ids"]


def test_answers_are_streamed_and_remembered():
    conversation, out = Conversation(_loaded(256), {"max_new_tokens": 5}), io.StringIO()
    first, _ = conversation.answer("Once", out)
    conversation.answer("And then?")
    assert out.getvalue().strip() == first
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == first


def test_oldest_turns_leave_a_full_context(capsys):
    loaded = _loaded(64)
    conversation = Conversation(loaded, {"max_new_tokens": 8}, system="Be brief.")
    forgotten = 0
    for number in range(6):
        ids, settings, count = conversation.prompt(f"message {number}")
        assert len(ids) + settings.max_new_tokens <= loaded.context
        assert "Be brief." in loaded.tokenizer.decode(ids)
        conversation.messages.append({"role": "assistant", "content": "short"})
        forgotten += count
    assert forgotten > 0
    assert conversation.messages[-2]["content"] == "message 5"
    assert conversation.messages[0]["content"] == f"message {forgotten}"

    chat(loaded, [f"message {i}" for i in range(6)], io.StringIO(), {"max_new_tokens": 8})
    assert "are forgotten" in capsys.readouterr().err


def test_a_message_longer_than_the_context_is_refused_and_the_chat_goes_on(capsys):
    out = io.StringIO()
    chat(_loaded(64), ["Once " * 200, "Once"], out, {"max_new_tokens": 4})
    assert "the context of this model is 64" in capsys.readouterr().err
    assert out.getvalue().count("\n") >= 1


def test_reset_exit_and_unknown_commands(capsys):
    seen = []

    def lines():
        for line in ("Once", "/reset", "", "/help", "/exit", "never read"):
            seen.append(line)
            yield line

    chat(_loaded(), lines(), io.StringIO(), {"max_new_tokens": 2})
    assert seen[-1] == "/exit"
    said = capsys.readouterr().err
    assert "the conversation is forgotten" in said
    assert "unknown command /help: /reset forgets" in said


def test_interrupt_stops_the_answer_only(capsys, monkeypatch):
    loaded, generate = _loaded(), DeepForCausalLM.generate  # pyright: ignore
    calls = []

    def interrupted(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments, **named)

    monkeypatch.setattr(DeepForCausalLM, "generate", interrupted)
    chat(loaded, ["Once", "upon", "a time"], io.StringIO(), {"max_new_tokens": 2})
    assert len(calls) == 3
    assert "stopped; the message and its answer are forgotten" in capsys.readouterr().err


def test_a_model_without_a_template_is_refused():
    with pytest.raises(UserError, match="has no chat template"):
        chat(_loaded(template=None), ["Once"], io.StringIO())


def test_options_are_checked_before_the_first_message():
    with pytest.raises(UserError, match="num_beams is 2"):
        chat(_loaded(), [], io.StringIO(), {"num_beams": 2})
    with pytest.raises(UserError, match="top_p is 3"):
        chat(_loaded(), [], io.StringIO(), {"top_p": 3.0})


def test_command_talks_over_a_pipe(tmp_path):
    loaded = _loaded()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert load(str(tmp_path)).tokenizer.chat_template == CHAT_TEMPLATE
    done = subprocess.run(
        [
            sys.executable, "-m", "complexity_lm", "chat", str(tmp_path), "--max_new_tokens", "3",
            "--system", "Be brief.",
        ],
        input="Once\nupon\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") >= 2
