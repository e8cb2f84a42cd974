"""Talk to a model in the terminal: its chat template, a history, answers as they are written."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from transformers import GenerationConfig, TextStreamer, set_seed

from complexity_lm.generate import DEFAULT_NEW_TOKENS, generation_settings, left_padded
from complexity_lm.hub import report_errors
from complexity_lm.loading import Loaded
from inl_core.run.errors import UserError

HELP = "/reset forgets the conversation, /exit or the end of input leaves, Ctrl-C stops an answer"

Message = dict[str, str]


def check_template(loaded: Loaded) -> None:
    """Check that a model can be talked to.

    Raises:
        UserError: Its tokenizer has no chat template.
    """
    if not loaded.tokenizer.chat_template:
        raise UserError(
            f"{loaded.name} has no chat template (chat_template.jinja): it continues text and has "
            "not learnt to answer; use complexity-lm generate, or train it on conversations "
            "(docs/how-to/chat.md)"
        )


@dataclass
class Conversation:
    """The turns so far, as messages in the role and content convention of transformers.

    Attributes:
        loaded: The model.
        options: Fields of transformers' `GenerationConfig`.
        system: What the model is told before the first turn.
        messages: Turns of the user and of the assistant, the oldest first.
    """

    loaded: Loaded
    options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def prompt(self, message: str) -> tuple[list[int], GenerationConfig, int]:
        """Add a message and forget the oldest turns until an answer fits into the context.

        Returns:
            The ids of the conversation, the settings of the answer, and the number of turns (a
            message and its answer) that were forgotten.

        Raises:
            UserError: The message alone fills the context, or the template refuses a message; the
                conversation is as it was.
        """
        kept = [*self.messages, {"role": "user", "content": message}]
        count, longest = 0, self.loaded.context - self._room()
        while len(ids := self._encode(kept)) > longest and len(kept) > 1:
            kept, count = kept[2:], count + 1
        settings = generation_settings(self.loaded, self._answer_options(len(ids)), len(ids))
        self.messages = kept
        return ids, settings, count

    def answer(self, message: str, out: TextIO | None = None) -> tuple[str, int]:
        """Answer a message, and add both to the conversation.

        Args:
            message: What the user says.
            out: Where the answer is written while it is generated; nowhere by default.

        Returns:
            The answer, and the number of older turns that no longer fit into the context.

        Raises:
            UserError: As `prompt`, or an option is one that transformers cannot generate with.
            KeyboardInterrupt: The answer was stopped; the message is forgotten.
        """
        before = self.messages
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        ids, settings, forgotten = self.prompt(message)
        streamer = _Streamer(out, tokenizer) if out is not None else None
        try:
            sequences: Any = model.generate(  # pyright: ignore[reportCallIssue]
                **left_padded(self.loaded, [ids]),
                generation_config=settings,
                streamer=streamer,
                tokenizer=tokenizer if settings.stop_strings else None,
            )
        except (ValueError, TypeError) as error:
            self.messages = before
            raise UserError(f"transformers cannot generate with these options: {error}") from error
        except KeyboardInterrupt:
            self.messages = before
            raise
        text = str(tokenizer.decode(sequences[0, len(ids) :], skip_special_tokens=True)).strip()
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        return text, forgotten

    def _encode(self, messages: list[Message]) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        with report_errors("the chat template or tokenizer cannot write this conversation"):
            encoded: Any = self.loaded.tokenizer.apply_chat_template(
                head + messages, add_generation_prompt=True, return_dict=True
            )
        return list(encoded["input_ids"])

    def _room(self) -> int:
        """Tokens that are kept free for an answer."""
        wanted = self.options.get("max_new_tokens")
        return min(wanted or DEFAULT_NEW_TOKENS, self.loaded.context // 2)

    def _answer_options(self, used: int) -> dict[str, Any]:
        """The options, with the length of the answer that the context has room for."""
        room = max(1, self.loaded.context - used)
        wanted = self.options.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        return self.options | {"max_new_tokens": min(wanted, room)}


class _Streamer(TextStreamer):
    """Transformers' streamer, onto a file of choice."""

    def __init__(self, out: TextIO, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of the answer."""
        print(text, end="\n" if stream_end else "", flush=True, file=self.out)


def typed_lines() -> Iterator[str]:
    """The lines of standard input: with a prompt in a terminal, as they are from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    # `input` edits lines and keeps a history with it; Windows has none.
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def chat(
    loaded: Loaded,
    lines: Iterable[str],
    out: TextIO,
    options: dict[str, Any] | None = None,
    system: str | None = None,
    seed: int = 0,
) -> None:
    """Answer line after line until they end or one is ``/exit``.

    Answers go to `out`; what is said about the conversation goes to standard error. ``/reset``
    starts a new conversation. Ctrl-C stops an answer, which is then forgotten with its message. A
    message that is too long is refused and the conversation goes on.

    Raises:
        UserError: The model has no chat template, or an option is invalid.
    """
    check_template(loaded)
    options = {name: value for name, value in (options or {}).items() if value is not None}
    for name in ("num_beams", "num_return_sequences"):
        if options.get(name, 1) != 1:
            raise UserError(f"{name} is {options[name]}; a chat writes one answer as it comes: 1")
    generation_settings(loaded, options, 1)  # refuses an option before the first message
    conversation = Conversation(loaded, options, system)
    set_seed(seed)
    for line in lines:
        message = line.strip()
        if message == "/exit":
            return
        if message == "/reset":
            conversation.messages = []
            _say("the conversation is forgotten")
        elif message.startswith("/"):
            _say(f"unknown command {message.split()[0]}: {HELP}")
        elif message:
            try:
                _, forgotten = conversation.answer(message, out)
            except KeyboardInterrupt:
                print(file=out, flush=True)
                _say("stopped; the message and its answer are forgotten")
            except UserError as error:
                _say(str(error))
            else:
                if forgotten:
                    _say(
                        f"the context of {loaded.context} tokens is full: the oldest {forgotten} "
                        "turn(s) are forgotten"
                    )


def _say(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
