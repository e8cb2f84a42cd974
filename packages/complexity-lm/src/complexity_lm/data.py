"""Documents become a held-out split, token ids, and packed blocks.

A document is held out when the sha256 of its bytes says so, never by its place or name: copies of
a document land on one side, and adding documents moves none of the others.

In the token stream a separator stands in front of every document: it tells the model that nothing
before it matters, and gives the first token of a document something to be predicted from. Packing
lays that stream into blocks of equal length, without padding, and drops the unfinished last one.
Attention may look across a separator inside a block.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase

from complexity_lm.hub import first_line
from complexity_lm.sources import is_streamed, read_documents, stream_documents
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.json_files import fits, read_json_object

# Blocks of a streamed source that go on exactly where an earlier run stopped.

POSITION_FILE = "data_position.json"
"""In a checkpoint of a streamed run: where its data goes on."""

_KEPT_NOTES = 64


class BlockStream(IterableDataset):
    """Endless blocks: after the last document the source is read again from the first.

    The loader reads ahead of the training, so the position at a checkpoint is not where the stream
    is by then. Every `every` blocks the stream notes where it is; a checkpoint after n blocks keeps
    the last note at or before n, and a resumed run reads on from there and skips up to n.

    Args:
        blocks: Packed blocks as `data.pack` makes them of a stream.
        every: Blocks between notes; the global batch, so that checkpoints fall on notes.
    """

    def __init__(self, blocks: datasets.IterableDataset, every: int) -> None:
        super().__init__()
        self.blocks, self.every = blocks, every
        self.beginning = blocks.state_dict()
        self.skip = 0
        self.notes = deque([(0, self.beginning)], maxlen=_KEPT_NOTES)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, state = self.notes[-1]
        self.blocks.load_state_dict(state)
        wanted, self.skip = self.skip, 0
        try:
            while True:
                before = count
                for block in self.blocks:
                    count += 1
                    # Noted as it is yielded: the state is the one behind this block.
                    if count % self.every == 0:
                        self.notes.append((count, self.blocks.state_dict()))
                    if count > wanted:
                        yield block
                if count == before and state is self.beginning:
                    raise UserError("the stream holds no block; give more text")
                state = self.beginning
                self.blocks.load_state_dict(state)
        except (OSError, DatasetsError) as error:
            raise UserError(
                f"the stream broke off after block {count}: {first_line(error)}; go on from the "
                "last checkpoint with --resume auto"
            ) from error

    def save(self, folder: Path, consumed: int) -> None:
        """Write the position after `consumed` blocks into a checkpoint folder."""
        count, state = max((note for note in self.notes if note[0] <= consumed), key=lambda n: n[0])
        with atomic_file(folder / POSITION_FILE) as aside:
            aside.write_text(json.dumps({"consumed": consumed, "noted": count, "state": state}))

    def load(self, folder: Path) -> None:
        """Let the next iteration start where `save` was called.

        Raises:
            UserError: There is no position in the folder, or it is unreadable.
        """
        try:
            position = read_json_object(folder / POSITION_FILE)
            consumed, noted = position["consumed"], position["noted"]
            if not fits([consumed, noted], list[int]) or not 0 <= noted <= consumed:
                raise ValueError(f"{noted!r} and {consumed!r} blocks")
            self.blocks.load_state_dict(position["state"])  # refuses another stream's
            self.skip = consumed
            self.notes.append((noted, position["state"]))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder} says nothing about the position in the stream ({first_line(error)}): "
                "its run read another kind of source"
            ) from error


logger = logging.getLogger(__name__)

Split = Literal["train", "heldout", "all"]


@dataclass
class DataConfig:
    """The text."""

    source: str = "stdlib"
    """stdlib (the Python standard library's own source), text:PATH, or hub:NAME (streamed)."""

    heldout_source: str | None = None
    """Source of the held-out text; by default a part of `source`."""

    holdout: float = 0.1
    """Fraction of the documents held out, by a hash of their bytes; of no effect with
    `heldout_source`."""

    context: int = 256
    """Tokens in a training block."""

    piece_bytes: int | None = None
    """text: cut files into documents of about this many bytes, at line ends; 0 keeps files whole;
    null cuts a single file (8192) and keeps the files of a folder whole."""

    files: str = "*"
    """text: glob of the files read below a folder, such as *.txt."""

    text_column: str = "text"
    """hub: the column that holds the text."""

    hub_subset: str | None = None
    """hub: configuration of the data set, such as sample-10BT."""

    hub_split: str = "train"
    """hub: split that is read."""

    heldout_documents: int = 256
    """hub: how many held-out documents are kept for evaluation, the first of the stream."""

    sample_documents: int = 10000
    """hub: how many training documents the tokenizer and the routing counts are made from."""


@dataclass
class Corpus:
    """The two sides of a source; rows have the one column ``text``.

    Attributes:
        train: Training documents, in memory or streamed.
        heldout: Held-out documents, in memory; None when nothing is held out.
        sample: Training documents for the tokenizer and routing counts: all, or the first ones of
            a stream.
    """

    train: datasets.Dataset | datasets.IterableDataset
    heldout: datasets.Dataset | None
    sample: datasets.Dataset

    @property
    def streamed(self) -> bool:
        return isinstance(self.train, datasets.IterableDataset)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out side: a pure function of its bytes."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def fingerprint(texts: Iterable[str]) -> str:
    """A sha256 of documents and their order, to say which text a number was measured on."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(hashlib.sha256(text.encode()).digest())
    return whole.hexdigest()


def load_corpus(config: DataConfig) -> Corpus:
    """Read both sides of a source.

    Raises:
        UserError: The source cannot be read, or a side of it is empty.
    """
    if not 0 <= config.holdout < 1:
        raise UserError(f"data.holdout is {config.holdout}; expected a fraction from 0 to below 1")
    if config.context < 2:
        raise UserError(f"data.context is {config.context}; a block needs at least 2 tokens")
    # With a held-out source of its own, nothing of the training source is held out.
    fraction = 0.0 if config.heldout_source else config.holdout
    if is_streamed(config.source):
        train, heldout = _split_stream(config, fraction)
        sample = _dataset(row["text"] for row in islice(train, config.sample_documents))
    else:
        train, heldout = _split_documents(config, fraction)
        sample = train
    if config.heldout_source:
        heldout = _whole(config.heldout_source, config)
    return Corpus(train, heldout, sample)


def load_split(config: DataConfig, split: Split) -> datasets.Dataset:
    """One side of a source, or all of it, in memory; for a stream the first documents of it.

    Raises:
        UserError: The source cannot be read, or that side is empty.
    """
    if split == "all":
        return _whole(config.source, config)
    corpus = load_corpus(config)
    if split == "train":
        return corpus.sample
    if corpus.heldout is None:
        raise UserError(
            f"{config.source}: nothing is held out (data.holdout is 0); measure --split=all"
        )
    return corpus.heldout


def _dataset(texts: Iterable[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": list(texts)}, features=datasets.Features({"text": datasets.Value("large_string")})
    )


def _documents(source: str, config: DataConfig) -> list[str]:
    return [d.text for d in read_documents(source, config.files, config.piece_bytes)]


def _stream(source: str, config: DataConfig) -> datasets.IterableDataset:
    return stream_documents(source, config.hub_subset, config.hub_split, config.text_column)


def _whole(source: str, config: DataConfig) -> datasets.Dataset:
    if is_streamed(source):
        rows = islice(_stream(source, config), config.heldout_documents)
        return _dataset(row["text"] for row in rows)
    return _dataset(_documents(source, config))


def _split_documents(
    config: DataConfig, fraction: float
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    texts = _documents(config.source, config)
    held = [is_held_out(text, fraction) for text in texts]
    if fraction and not 0 < sum(held) < len(texts):
        raise UserError(
            f"{config.source}: of {len(texts)} documents {sum(held)} are held out at data.holdout "
            f"{fraction:g}, and both sides need one; cut files into smaller documents "
            "(--data.piece_bytes=2048), or name a --data.heldout_source"
        )
    train = _dataset(text for text, out in zip(texts, held, strict=True) if not out)
    heldout = _dataset(text for text, out in zip(texts, held, strict=True) if out)
    return train, heldout if fraction else None


def _split_stream(
    config: DataConfig, fraction: float
) -> tuple[datasets.IterableDataset, datasets.Dataset | None]:
    rows = _stream(config.source, config)
    if not fraction:
        return rows, None
    train = rows.filter(_keep, fn_kwargs={"fraction": fraction, "held_out": False})
    rest = rows.filter(_keep, fn_kwargs={"fraction": fraction, "held_out": True})
    heldout = [row["text"] for row in islice(rest, config.heldout_documents)]
    if not heldout or next(iter(train), None) is None:
        raise UserError(
            f"{config.source}: at data.holdout {fraction:g} one side of the split has no document; "
            "choose another fraction, or name a --data.heldout_source"
        )
    return train, _dataset(heldout)


def _keep(row: dict[str, Any], fraction: float, held_out: bool) -> bool:
    return is_held_out(row["text"], fraction) == held_out


def tokenize(documents: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Token ids of documents, a separator in front of each.

    Args:
        documents: A data set with the column ``text``, in memory or streamed.
        tokenizer: Has an end-of-text token, which is the separator.

    Returns:
        The same kind of data set with the one column ``input_ids``.
    """
    return documents.map(
        _token_ids,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer, "separator": separator_id(tokenizer)},
        **_described(documents, "tokenizing"),
    )


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands in front of every document: the tokenizer's end-of-text token.

    Raises:
        UserError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text (eos) token to separate documents with; set its "
            "eos_token and save it again"
        )
    return cast(int, tokenizer.eos_token_id)


def _token_ids(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, separator: int
) -> dict[str, list[list[int]]]:
    # verbose=False: documents longer than the model's context are no reason for a warning here.
    encoded = tokenizer(
        rows["text"], add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return {"input_ids": [[separator, *ids] for ids in encoded["input_ids"]]}


def pack(tokens: Any, context: int, side: str = "training") -> Any:
    """Lay tokenised documents into blocks of `context` ids.

    In memory all documents form one stream; of a streamed source every 1000 do, so that a resumed
    run can start at any of them.

    Args:
        tokens: A data set with the column ``input_ids``, in memory or streamed.
        context: Tokens in a block.
        side: What the text is, for the error.

    Returns:
        The same kind of data set; every row has `context` ids.

    Raises:
        UserError: Text in memory that does not fill one block.
    """
    in_memory = isinstance(tokens, datasets.Dataset)
    if in_memory and (total := sum(map(len, tokens["input_ids"]))) < context:
        raise UserError(
            f"the {side} text has {total} tokens in {len(tokens)} documents, fewer than a block of "
            f"{context}: give more text, or shorten --data.context"
        )
    return tokens.map(
        _blocks,
        batched=True,
        batch_size=len(tokens) if in_memory else 1000,
        fn_kwargs={"context": context},
        **_described(tokens, "packing"),  # pyright: ignore[reportArgumentType]
        features=datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int32"), length=context)}
        ),
    )


def _blocks(rows: dict[str, list[list[int]]], context: int) -> dict[str, NDArray[np.int32]]:
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in rows["input_ids"]])
    whole = len(stream) // context
    return {"input_ids": stream[: whole * context].reshape(whole, context)}


def _described(rows: Any, what: str) -> dict[str, str]:
    """The title of a map's progress bar; a streamed one has none."""
    return {"desc": what} if isinstance(rows, datasets.Dataset) else {}


def count_tokens(tokens: datasets.Dataset, vocab_size: int) -> Tensor:
    """How often each id occurs: (vocab_size,) int64, what balanced routing packs experts by.

    Args:
        tokens: A data set in memory with the column ``input_ids``.
        vocab_size: Number of ids.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for rows in tokens.iter(batch_size=1000):
        for ids in cast(dict[str, list[list[int]]], rows)["input_ids"]:
            counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return counts


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks to a batch: ``input_ids`` and ``labels``, both (B, context) int64."""
    ids = torch.tensor(np.asarray([row["input_ids"] for row in rows]), dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


class BlockOrder(Sampler[int]):
    """Which block is drawn when: a fresh permutation for each pass over the data, without a seam.

    The order is a function of (seed, number of draws), so a resumed run reads on as if it had
    never stopped, and any number of processes shares one order. A pass ends inside a batch where
    it ends: no short batch, no block left out.

    Args:
        blocks: Blocks in the data.
        draws: Indices to yield in all.
        seed: The run's seed.
    """

    def __init__(self, blocks: int, draws: int, seed: int) -> None:
        self.blocks, self.draws, self.seed = blocks, draws, seed

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self.draws, self.blocks):
            rng = np.random.default_rng([self.seed, first // self.blocks])
            order = rng.permutation(self.blocks)
            yield from order[: self.draws - first].tolist()
