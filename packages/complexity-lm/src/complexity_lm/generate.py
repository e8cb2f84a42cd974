"""Generate text: streamed for one prompt, in left-padded batches for several."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer, set_seed

from complexity_lm.config import GenerateConfig
from complexity_lm.hub import read_text, report_errors
from complexity_lm.loading import Loaded, repeating
from complexity_lm.tokenizer import separator_id, tokenizer_hash
from inl_core.run.errors import UserError
from inl_core.run.json_files import parse_json

DEFAULT_NEW_TOKENS = 200
"""Tokens generated if no length is set; fewer if the context has no room for them."""


def read_prompts(prompt: str | None, prompts_file: str | None, stdin: TextIO) -> list[str]:
    """Read prompts from an argument, a UTF-8 file with one per line, or all of standard input.

    A line that begins with a quote is a JSON string, which can contain line breaks.

    Raises:
        UserError: Both are given, the file cannot be read, or a prompt is empty.
    """
    if prompt is not None and prompts_file is not None:
        raise UserError("give --prompt or --prompts_file, not both")
    if prompts_file is not None:
        prompts = _prompt_lines(Path(prompts_file))
    elif prompt is not None:
        prompts = [prompt]
    elif stdin.isatty():
        raise UserError("no prompt: give --prompt or --prompts_file, or pipe text in")
    else:
        prompts = [stdin.read()]
    for number, text in enumerate(prompts, 1):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        if not text:
            raise UserError(f"{name} is empty: give at least one character")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                f"{name} contains half a surrogate pair, which is not a character: write the text "
                "as UTF-8"
            )
    return prompts


def _prompt_lines(path: Path) -> list[str]:
    # Only line ends separate lines: a form feed or U+2028 is a character of a prompt.
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} has no prompts: write one per line")
    with report_errors(f"{path}: a line that begins with a quote is not a JSON string"):
        return [parse_json(line) if line.startswith('"') else line for line in lines]


def generation_settings(loaded: Loaded, options: dict[str, Any], longest: int) -> GenerationConfig:
    """Apply options to the generation defaults of a model; None means not set.

    The length is checked against the context, given the tokens of the longest prompt.

    Raises:
        UserError: The prompt fills the context, prompt and requested length exceed it, or
            transformers rejects a value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        if name in given and given[name] < 1:
            raise UserError(f"{name} is {given[name]}; expected at least 1")
    for name in ("top_p", "min_p", "typical_p", "top_h"):
        if name in given and not 0 <= given[name] <= 1:
            raise UserError(f"{name} is {given[name]}; expected a probability in [0, 1]")
    room = loaded.context - longest
    if room < 1:
        raise UserError(
            f"the prompt has {longest} tokens, but the context of this model is {loaded.context} "
            "including at least one new token: shorten the prompt"
        )
    requested = given.get("max_new_tokens")
    if requested is None and "max_length" in given:
        requested = given["max_length"] - longest
    if requested is None:
        given["max_new_tokens"] = min(DEFAULT_NEW_TOKENS, room)
    elif requested > room:
        raise UserError(
            f"{longest} prompt tokens and {requested} new tokens exceed the context of "
            f"{loaded.context}: set --max_new_tokens to {room} or less, or shorten the prompt"
        )
    settings = GenerationConfig.from_dict(loaded.model.generation_config.to_dict())  # pyright: ignore[reportOptionalMemberAccess]
    settings.pad_token_id = loaded.tokenizer.pad_token_id
    try:
        settings.update(**given)
        settings.validate(strict=True, user_set_attributes=set(given))
    except (ValueError, TypeError) as error:
        raise UserError(f"invalid generation options: {error}") from error
    return settings


def encode_prompt(loaded: Loaded, prompt: str) -> list[int]:
    """Encode a prompt as a text begins in training: with a separator before it.

    For a model that this package did not train, the tokenizer decides what comes first.

    Raises:
        UserError: The tokenizer has no ids for the prompt.
    """
    ours = loaded.data is not None
    with report_errors(f"the tokenizer cannot encode the prompt {prompt[:40]!r}"):
        ids: list[int] = loaded.tokenizer(prompt, add_special_tokens=not ours)["input_ids"]
    if ours:
        ids = [separator_id(loaded.tokenizer), *ids]
    if not ids:
        raise UserError(f"the tokenizer makes no token of the prompt {prompt[:40]!r}; give another")
    return ids


def left_padded(loaded: Loaded, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Ids and attention mask of a batch; its padding needs no token, because it is masked."""
    width, pad = max(map(len, rows)), loaded.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = loaded.model.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generate(
    loaded: Loaded,
    prompts: Sequence[str],
    options: dict[str, Any] | None = None,
    config: GenerateConfig | None = None,
    stream: bool = False,
    assistant: Loaded | None = None,
) -> Iterator[list[str]]:
    """Continue prompts.

    Args:
        loaded: The model and its tokenizer.
        prompts: Non-empty texts.
        options: Fields of transformers' `GenerationConfig`, e.g. {"temperature": 0.8}.
        config: Seed, batch size, whether to repeat the prompt, repetitions of a loop.
        stream: Print tokens as they are generated; needs one prompt, one beam and one sequence.
        assistant: A smaller model with the same tokenizer that drafts tokens.

    Yields:
        For each prompt its `num_return_sequences` texts.

    Raises:
        UserError: A prompt or an option is invalid.
    """
    config, options = config or GenerateConfig(), options or {}
    ids = [encode_prompt(loaded, prompt) for prompt in prompts]
    settings = generation_settings(loaded, options, max(map(len, ids), default=0))
    streamer = TextStreamer(
        loaded.tokenizer,  # pyright: ignore[reportArgumentType]
        skip_prompt=config.only_new,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    if assistant is not None and tokenizer_hash(assistant.tokenizer) != tokenizer_hash(
        loaded.tokenizer
    ):
        raise UserError(
            f"the assistant {assistant.name} has another tokenizer than {loaded.name}: train both "
            "with the same one (--tokenizer.path)"
        )
    helpers = {
        "streamer": streamer if stream else None,
        "assistant_model": assistant.model if assistant else None,
        "tokenizer": loaded.tokenizer if settings.stop_strings else None,
    }
    set_seed(config.seed)
    for first in range(0, len(ids), config.batch_size):
        rows = ids[first : first + config.batch_size]
        batch = left_padded(loaded, rows)
        try:
            with repeating(loaded, config.num_loops):
                out = loaded.model.generate(  # pyright: ignore[reportCallIssue]
                    **batch, generation_config=settings, **helpers
                )
        except (ValueError, TypeError) as error:
            raise UserError(f"transformers cannot generate with these options: {error}") from error
        sequences = out if isinstance(out, Tensor) else out.sequences
        count, width = len(sequences) // len(rows), batch["input_ids"].shape[1]
        # Padding is cut off: its id may be that of a word.
        starts = [width if config.only_new else width - len(row) for row in rows]
        texts = loaded.tokenizer.batch_decode(
            [row[starts[i // count] :] for i, row in enumerate(sequences.tolist())],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        yield from (texts[i : i + count] for i in range(0, len(texts), count))


def print_generated(
    loaded: Loaded,
    prompts: Sequence[str],
    options: dict[str, Any],
    config: GenerateConfig,
    assistant: Loaded | None = None,
) -> None:
    """Stream a single text, or print each of several texts below a title; see `generate`."""
    texts_per_prompt = options.get("num_return_sequences") or 1
    stream = len(prompts) == 1 and texts_per_prompt == 1 and (options.get("num_beams") or 1) == 1
    results = generate(loaded, prompts, options, config, stream, assistant)
    for number, texts in enumerate(results, 1):
        for sequence, text in enumerate(texts if not stream else (), 1):
            print(f"=== prompt {number}, text {sequence}\n{text}")
