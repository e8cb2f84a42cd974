"""Tokenizers: a byte-level BPE trained on the corpus, or any fast tokenizer of transformers."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from complexity_lm.hub import locate, report_errors
from inl_core.run.errors import UserError
from inl_core.run.files import refuse_strange_files

END_OF_TEXT = "<|endoftext|>"
"""Token before every document; it also ends a generated one."""

PADDING = "<|padding|>"
"""Left padding of a batch of prompts; never occurs in training text."""

SMALLEST_VOCAB = 256 + 2
"""All bytes and the two tokens above."""

CHAT_TEMPLATE = """\
{{- bos_token if bos_token is defined and bos_token else '' -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role ' ~ message['role'] ~ ' is not system, user or assistant') -}}
{%- endif -%}
{{- message['role'].capitalize() + ':\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] | trim + eos_token -}}
{%- endgeneration -%}
{{- '\n\n' -}}
{%- else -%}
{{- message['content'] | trim + '\n\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:\n' -}}
{%- endif -%}
"""
"""A chat template for any tokenizer with an end-of-text token, in the form of transformers.

It writes roles as words. An answer ends with the end-of-text token, and the marks around it
(``{% generation %}``) tell a trainer which tokens to learn.
"""

_HINT = "use the tokenizer in the model's folder"
_LOSSLESS = "use a byte-level tokenizer"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which encodes every text and decodes it to itself.

    Of the `vocab_size` ids, 256 are bytes and two are `END_OF_TEXT` and `PADDING`.

    Raises:
        UserError: `vocab_size` leaves no room for the bytes.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}; 256 bytes and 2 special tokens need at least "
            f"{SMALLEST_VOCAB}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # A text begins with a separator, as in training; code that packs documents adds it itself.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, bpe.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or the Hub.

    Raises:
        UserError: It does not exist, cannot be reached, or has no fast version.
    """
    folder = locate(str(name), "give the path of a folder", f"tokenizer {name}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"tokenizer {name}: no such folder")
    hint = "give a folder that complexity-lm tokenizer or save_pretrained wrote, or a Hub id"
    with report_errors(f"cannot load a tokenizer from {name}", hint):
        if folder is not None:
            refuse_strange_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder or name, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer {name} is a {type(tokenizer).__name__}, which has no fast version"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask covers padding
    tokenizer.padding_side = "left"
    return tokenizer


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str | list[str],
    split_special_tokens: bool = True,
    **options: Any,
) -> BatchEncoding:
    """Encode the text of documents as it stands there, with no token added.

    The name of a special token is text in a document, so that `<|endoftext|>` written in one does
    not end it. In a prompt it is the token, as everywhere in transformers. `options` are those of
    the tokenizer. Without `split_special_tokens` the name is the token in documents too, as in
    runs of old versions.

    Raises:
        UserError: The tokenizer has no ids for some of it, nor one for unknown text.
    """
    with report_errors("the tokenizer cannot encode the text", _LOSSLESS):
        # verbose=False: documents longer than the context of the model need no warning here.
        return tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            verbose=False,
            **options,
        )


def check_lossless(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> None:
    """Check that the ids of a text decode to it.

    Raises:
        UserError: They decode to another text.
    """
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise UserError(
            f"the tokenizer loses some of the text that begins with {text[:40]!r} (its ids decode "
            f"to another text), so bits per byte would be wrong; {_LOSSLESS}"
        )


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that precedes every document: the tokenizer's end-of-text token.

    Raises:
        UserError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text (eos) token to separate documents with; set its "
            "eos_token and save it again"
        )
    return cast(int, tokenizer.eos_token_id)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A sha256 of a tokenizer's vocabulary, merges and steps, without its settings."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with truncation or padding store these in the tokenizer.
    content["truncation"] = content["padding"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: the largest id plus 1.

    More than `len(tokenizer)` where ids are missing between others.
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, trained_with: str | None
) -> None:
    """Check that a tokenizer belongs to a model; `trained_with` is the hash of its own, if known.

    Raises:
        UserError: It has larger ids than the model, one id for two tokens, another end-of-text id,
            or another hash.
    """
    size = vocabulary_size(tokenizer)
    tokens: dict[int, str] = {}
    for token, number in tokenizer.get_vocab().items():
        if (other := tokens.setdefault(number, token)) != token:
            # As a token gets that is added to a vocabulary with holes.
            raise UserError(
                f"the tokenizer has the id {number} for two tokens, {other!r} and {token!r}: give "
                "one of them an id that is free"
            )
    if size > config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {size - 1}, the model {config.vocab_size} (vocab_size): "
            f"they do not belong together; {_HINT}"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        raise UserError(
            f"the end-of-text id of the tokenizer is {tokenizer.eos_token_id}, that of the model "
            f"{config.eos_token_id}: they do not belong together; {_HINT}"
        )
    if trained_with is not None and tokenizer_hash(tokenizer) != trained_with:
        raise UserError(
            "the tokenizer is not the one that the model was trained with (its vocabulary or "
            f"merges differ); {_HINT}"
        )
