"""Tokenizers: a byte-level BPE trained on the corpus, or any that transformers can load."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from complexity_lm.data import DataConfig, load_split
from complexity_lm.hub import first_line, is_local, require_hub
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder

END_OF_TEXT = "<|endoftext|>"
"""Stands in front of every document, and ends a generated one."""

PADDING = "<|padding|>"
"""Fills the left of a batch of prompts; never in training text."""

SMALLEST_VOCAB = 256 + 2
"""All bytes and the two tokens above."""


@dataclass
class TokenizerConfig:
    """How text becomes ids."""

    path: str | None = None
    """A tokenizer to use: a folder or Hub id; null trains a byte-level BPE on the training text."""

    vocab_size: int = 4096
    """Ids of a trained tokenizer; a short text may give fewer."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text can be encoded, and decodes to itself.

    Args:
        texts: Training documents.
        vocab_size: Number of ids to aim for; two are `END_OF_TEXT` and `PADDING`, 256 are bytes.

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
    # As in training, a text begins behind a separator; callers who pack add it themselves.
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


def make_tokenizer(
    source: str, out: str, vocab_size: int = 4096, data: DataConfig | None = None
) -> str:
    """Train a tokenizer on the training side of a source and save it.

    Args:
        source: stdlib, text:PATH or hub:NAME.
        out: Folder of the tokenizer; must not exist.
        vocab_size: Number of ids to aim for.
        data: How the source is read and what of it is held out.

    Returns:
        A line that says what was made.

    Raises:
        UserError: The folder exists, the source cannot be read, or `vocab_size` is too small.
    """
    folder = Path(out)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --out")
    texts = load_split(replace(data or DataConfig(), source=source), "train")["text"]
    tokenizer = train_tokenizer(texts, vocab_size)
    with atomic_folder(folder) as aside:
        tokenizer.save_pretrained(aside)
    return f"a tokenizer of {len(tokenizer)} ids, from {len(texts)} documents, is in {folder}"


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or the hub.

    Raises:
        UserError: It is not there, is not reachable, or has no fast version.
    """
    name = str(name)
    if is_local(name):
        if not Path(name).expanduser().is_dir():
            raise UserError(f"tokenizer {name}: there is no such folder")
    else:
        require_hub(f"tokenizer {name}", "give the path of a folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            Path(name).expanduser() if is_local(name) else name, trust_remote_code=False
        )
    # The tokenizers library raises bare Exceptions, transformers anything.
    except Exception as error:
        raise UserError(
            f"cannot load a tokenizer from {name}: {first_line(error)}; give a folder that "
            "complexity-lm tokenizer or save_pretrained wrote, or a hub id"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer {name} is a {type(tokenizer).__name__}, which has no fast version"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    tokenizer.padding_side = "left"
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A sha256 of what a tokenizer does: its vocabulary, merges and steps, not its settings."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with truncation or padding leave these on the tokenizer.
    content["truncation"] = content["padding"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, trained_with: str | None
) -> None:
    """Refuse a tokenizer that is not the model's.

    Args:
        tokenizer: The tokenizer.
        config: The model's configuration.
        trained_with: `tokenizer_hash` of the training, where the model folder tells it.

    Raises:
        UserError: It has more ids than the model, another end-of-text id, or another hash.
    """
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} ids and the model {config.vocab_size} (vocab_size)"
            ": they do not belong together; use the tokenizer in the model's folder"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        raise UserError(
            f"the tokenizer ends a text with id {tokenizer.eos_token_id} and the model with "
            f"{config.eos_token_id}: they do not belong together; use the tokenizer in the model's "
            "folder"
        )
    if trained_with is not None and tokenizer_hash(tokenizer) != trained_with:
        raise UserError(
            "the tokenizer is not the one that the model was trained with (its vocabulary or "
            "merges differ); use the tokenizer in the model's folder"
        )
