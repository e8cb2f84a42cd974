"""Conversations to train on: read as messages, encoded by the chat template, packed as wholes.

In a corpus a conversation is a document, whose text is the JSON of its messages: held out by its
bytes, as any document is. Loss is on the tokens that the template marks as the assistant's
(``{% generation %}``) and on no other. A block has whole conversations, the rest of it is padding;
positions begin again with each, which keeps attention within it.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from complexity_lm.config import DataConfig
from complexity_lm.hub import decode_text, open_text
from complexity_lm.sources import is_streamed, stream_documents, text_files
from complexity_lm.tokenizer import CHAT_TEMPLATE
from inl_core.run.errors import UserError
from inl_core.run.json_files import parse_json

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is not learnt, of transformers."""

_MARK = re.compile(r"\{%[-+]?\s*generation\b")
_SHOWN = 3


def read_conversations(source: str, config: DataConfig) -> Iterator[str]:
    """Read ``text:PATH`` (JSON lines) or ``hub:NAME``: each conversation as JSON of its messages.

    Rows that are not conversations are left out, counted and named in the log.

    Raises:
        UserError: The source cannot be read or has no conversation.
    """
    problems, count = [], 0
    column = config.messages_column
    for name, row, problem in _rows(source, config):
        count += 1
        messages = row.get(column) if isinstance(row, dict) else row
        if not problem and not _is_conversation(messages):
            problem = f"no list of messages with role and content in {column!r}"
        if problem:
            problems.append((name, problem))
        else:
            yield json.dumps(messages, ensure_ascii=False)
    _report(problems, count, source)


def _rows(source: str, config: DataConfig) -> Iterator[tuple[str, Any, str]]:
    """Name and content of each row, and what is wrong with it."""
    if is_streamed(source):
        rows = stream_documents(
            source, config.hub_subset, config.hub_split, config.messages_column, list
        )
        yield from ((f"row {number}", row, "") for number, row in enumerate(rows))
        return
    root, paths = text_files(source, config.files)
    for path in paths:
        for number, line in _json_lines(path):
            name = f"{path.relative_to(root)}:{number}"
            try:
                yield name, parse_json(line), ""
            except ValueError as error:
                yield name, None, f"not JSON: {error}"


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    begin = 0
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, decode_text(path, line, begin)
            begin += len(line)


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        and all(m.get("content") is not None for m in messages)
    )


def _report(problems: list[tuple[str, str]], count: int, what: str) -> None:
    """Name in the log what was left out; a `UserError` if that is all."""
    if len(problems) == count:
        first = f": {problems[0][0]}: {problems[0][1]}" if problems else ""
        raise UserError(f"{what} has no conversation to train on{first}")
    if not problems:
        return
    reasons = Counter(reason.partition(":")[0] for _, reason in problems)
    logger.warning(
        "%s: %d of %d conversations are left out (%s); %s",
        what,
        len(problems),
        count,
        ", ".join(f"{number} {reason}" for reason, number in reasons.most_common()),
        "; ".join(f"{name}: {reason}" for name, reason in problems[:_SHOWN]),
    )


def message_texts(conversations: Iterable[str]) -> Iterator[str]:
    """What is said in conversations, message by message, for training a tokenizer."""
    for text in conversations:
        for message in json.loads(text):
            if isinstance(message["content"], str):
                yield message["content"]


def use_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template that of this package.

    Raises:
        UserError: Its own does not mark the answers.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        logger.info("the tokenizer has no chat template and gets CHAT_TEMPLATE of this package")
    # An answer in several templates by name is not looked for.
    if not isinstance(tokenizer.chat_template, str) or not _MARK.search(tokenizer.chat_template):
        raise UserError(
            "the tokenizer's chat template does not mark the answers with {% generation %} and "
            "{% endgeneration %}, so they cannot be told from the rest: add the marks to its "
            "chat_template.jinja, in a folder for --tokenizer.path"
        )


def encode_conversations(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, context: int, side: str
) -> datasets.Dataset:
    """Encode the column ``text`` as ``input_ids``, ``labels`` and ``bytes``, those of the answers.

    Labels are the ids of answers, and `IGNORED` elsewhere. Conversations that the template refuses,
    without an answer or longer than `context` are left out, counted and named in the log.

    Raises:
        UserError: That is all of them; `side` names the text.
    """
    numbers = datasets.List(datasets.Value("int32"))
    features = {
        "input_ids": numbers,
        "labels": numbers,
        "bytes": datasets.Value("int64"),
        "problem": datasets.Value("string"),
    }
    encoded = documents.map(
        _encoded,
        fn_kwargs={"tokenizer": tokenizer, "context": context},
        remove_columns=["text"],
        features=datasets.Features(features),
        desc="tokenizing",
    )
    reasons = list(encoded["problem"])
    problems = [
        (f"that which begins with {_beginning(documents[i]['text'])!r}", reason)
        for i, reason in enumerate(reasons)
        if reason
    ]
    _report(problems, len(reasons), f"the {side} text")
    good = [i for i, reason in enumerate(reasons) if not reason]
    return encoded.select(good).remove_columns("problem")


def _beginning(text: str) -> str:
    return next(iter(message_texts([text])), "")[:40]


def _encoded(
    row: dict[str, str], tokenizer: PreTrainedTokenizerBase, context: int
) -> dict[str, Any]:
    nothing: dict[str, Any] = {"input_ids": [], "labels": [], "bytes": 0}
    try:
        encoded: Any = tokenizer.apply_chat_template(
            json.loads(row["text"]), return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return nothing | {"problem": f"refused by the chat template: {reason[0]}"}
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    # Nothing of its own conversation precedes the first token.
    labels = [i if answer else IGNORED for i, answer in zip(ids, mask, strict=True)]
    labels[0] = IGNORED
    answer = [i for i in labels if i != IGNORED]
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = len(str(text).encode())
    if not size:
        return nothing | {"problem": "without an answer of the assistant"}
    if len(ids) > context:
        return nothing | {"problem": f"longer than data.context {context}"}
    return {"input_ids": ids, "labels": labels, "bytes": size, "problem": ""}


def pack_conversations(
    tokens: datasets.Dataset, context: int, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Pack encoded conversations into blocks of `context` ids, as many in one as fit.

    Columns are ``input_ids``, ``labels``, ``position_ids``, (context,) each, and ``bytes``.
    """
    number = datasets.List(datasets.Value("int32"), context)
    columns = dict.fromkeys(("input_ids", "labels", "position_ids"), number)
    return tokens.map(
        _packed,
        batched=True,
        fn_kwargs={"context": context, "padding": tokenizer.pad_token_id},
        remove_columns=tokens.column_names,
        features=datasets.Features(columns | {"bytes": datasets.Value("int64")}),
        desc="packing",
    )


def _packed(rows: dict[str, list[Any]], context: int, padding: int) -> dict[str, list[Any]]:
    """First-fit decreasing: the longest first, each into the first block that has room."""
    blocks: list[list[int]] = []
    rooms: list[int] = []
    lengths = [len(ids) for ids in rows["input_ids"]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (b for b, room in enumerate(rooms) if room >= lengths[i])
        place = next(fitting, len(blocks))
        if place == len(blocks):
            blocks.append([])
            rooms.append(context)
        blocks[place].append(i)
        rooms[place] -= lengths[i]

    def filled(name: str, block: list[int], room: int, value: int) -> list[int]:
        return [x for i in block for x in rows[name][i]] + [value] * room

    together = list(zip(blocks, rooms, strict=True))
    return {
        "input_ids": [filled("input_ids", block, room, padding) for block, room in together],
        "labels": [filled("labels", block, room, IGNORED) for block, room in together],
        "position_ids": [
            np.concatenate([np.arange(n) for n in (*(lengths[i] for i in block), room)]).tolist()
            for block, room in together
        ],
        "bytes": [sum(rows["bytes"][i] for i in block) for block in blocks],
    }
