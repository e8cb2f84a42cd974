"""From documents to a held-out split, token ids and packed blocks.

Whether a document is held out depends on the sha256 of its bytes alone, not on its place or name:
copies of a document are on the same side, and adding documents moves none of the others.

In the token stream a separator precedes every document: it marks that nothing before it matters,
and the first token of a document is predicted from it. Packing cuts the stream into blocks of equal
length without padding and drops the incomplete last block. Attention may look across a separator
inside a block, unless `DataConfig.separate_documents` is set.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase

from complexity_lm.config import DataConfig, Split
from complexity_lm.conversations import message_texts, read_conversations
from complexity_lm.hub import first_line, report_errors
from complexity_lm.sources import PACKING, is_streamed, read_documents, stream_documents
from complexity_lm.tokenizer import (
    check_lossless,
    encode_text,
    separator_id,
    train_tokenizer,
    vocabulary_size,
)
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.folders import new_folder
from inl_core.run.json_files import fits, read_json_object

POSITION_FILE = "data_position.json"
"""Position in the data stream, in the checkpoint of a streamed run."""

_KEPT_POSITIONS = 64

# Data in memory are Arrow in parts of about this many bytes: Python's own strings and numbers take
# tens of bytes for each byte of text.
_PART_BYTES = 2**20


# Documents and their split ----------------------------------------------------------------------


@dataclass
class Corpus:
    """Both sides of a source; rows have the single column ``text``.

    `sample` are the training documents for the tokenizer and routing counts: all of them, or the
    first ones of a stream.
    """

    train: datasets.Dataset | datasets.IterableDataset
    heldout: datasets.Dataset | None
    sample: datasets.Dataset

    @property
    def streamed(self) -> bool:
        return isinstance(self.train, datasets.IterableDataset)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out, which depends on its bytes only."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def fingerprint(texts: Iterable[str]) -> str:
    """A sha256 of documents and their order, which identifies the text of a measurement."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def load_corpus(config: DataConfig, packing: int = PACKING) -> Corpus:
    """Read both sides of a source; `packing` is the version of a resumed run.

    Raises:
        UserError: The source cannot be read, or one side of it is empty.
    """
    # With a separate held-out source, all of the training source is trained on.
    fraction = 0.0 if config.heldout_source else config.holdout
    if is_streamed(config.source) and config.format == "text":
        train, heldout = _split_stream(config, fraction)
        sample = _dataset(row["text"] for row in islice(train, config.sample_documents))
    else:
        train, heldout = _split_documents(config, fraction, packing)
        sample = train
    if config.heldout_source:
        heldout = _read_all(config.heldout_source, config, packing)
    return Corpus(train, heldout, sample)


def load_split(config: DataConfig, split: Split) -> datasets.Dataset:
    """Read one side of a source, or all of it, into memory; of a stream the first documents.

    Raises:
        UserError: The source cannot be read, or that side is empty.
    """
    if split == "all":
        return _read_all(config.source, config)
    corpus = load_corpus(config)
    if split == "train":
        return corpus.sample
    if corpus.heldout is None:
        raise UserError(
            f"{config.source}: nothing is held out (data.holdout is 0); measure --split=all"
        )
    return corpus.heldout


def make_tokenizer(
    source: str, out: str, vocab_size: int = 4096, data: DataConfig | None = None
) -> str:
    """Train a tokenizer on the training side of a source, save it, and return a summary.

    Raises:
        UserError: The folder exists, the source cannot be read, or `vocab_size` is too small.
    """
    folder = Path(out)
    with new_folder(folder) as partial:
        settings = replace(data or DataConfig(), source=source)
        texts = load_split(settings, "train")["text"]
        tokenizer = train_tokenizer(written_texts(texts, settings), vocab_size)
        tokenizer.save_pretrained(partial)
    return f"a tokenizer of {len(tokenizer)} ids, from {len(texts)} documents, is in {folder}"


def written_texts(documents: Iterable[str], config: DataConfig) -> Iterable[str]:
    """What a tokenizer is trained on: the documents, of conversations their messages."""
    return message_texts(documents) if config.format == "chat" else documents


class _Rows:
    """Documents in memory; those without text (null) are left out."""

    def __init__(self) -> None:
        self.parts: list[datasets.Dataset] = []
        self.waiting: list[str] = []
        self.size = 0

    def add(self, text: str | None) -> None:
        if text is not None:
            self.waiting.append(text)
            self.size += len(text)
        if self.size > _PART_BYTES:
            self._finish_part()

    def _finish_part(self) -> None:
        features = datasets.Features({"text": datasets.Value("large_string")})
        self.parts.append(datasets.Dataset.from_dict({"text": self.waiting}, features=features))
        self.waiting, self.size = [], 0

    def dataset(self) -> datasets.Dataset:
        if self.waiting or not self.parts:
            self._finish_part()
        return datasets.concatenate_datasets(self.parts)


def _dataset(texts: Iterable[str | None]) -> datasets.Dataset:
    rows = _Rows()
    for text in texts:
        rows.add(text)
    return rows.dataset()


def _stream(source: str, config: DataConfig) -> datasets.IterableDataset:
    return stream_documents(source, config.hub_subset, config.hub_split, config.text_column)


def _read_all(source: str, config: DataConfig, packing: int = PACKING) -> datasets.Dataset:
    if is_streamed(source) and config.format == "text":
        rows = islice(_stream(source, config), config.heldout_documents)
        return _dataset(row["text"] for row in rows)
    return _dataset(_texts(source, config, packing))


def _texts(source: str, config: DataConfig, packing: int) -> Iterator[str]:
    if config.format == "chat":
        return read_conversations(source, config)
    documents = read_documents(
        source, config.files, config.piece_bytes, packing, config.document_separator
    )
    return (document.text for document in documents)


def _split_documents(
    config: DataConfig, fraction: float, packing: int
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    sides = {False: _Rows(), True: _Rows()}
    for text in _texts(config.source, config, packing):
        sides[is_held_out(text, fraction)].add(text)
    train, heldout = sides[False].dataset(), sides[True].dataset()
    if fraction and not (train and heldout):
        raise UserError(
            f"{config.source}: data.holdout {fraction:g} holds out {len(heldout)} of "
            f"{len(train) + len(heldout)} documents, and both sides need one; cut files into "
            "smaller documents (--data.piece_bytes=2048), or set --data.heldout_source"
        )
    return train, heldout if fraction else None


def _split_stream(
    config: DataConfig, fraction: float
) -> tuple[datasets.IterableDataset, datasets.Dataset | None]:
    rows = _stream(config.source, config)
    if not fraction:
        return rows, None
    train, rest = (
        rows.filter(_is_on_side, fn_kwargs={"fraction": fraction, "held_out": held_out})
        for held_out in (False, True)
    )
    heldout = [row["text"] for row in islice(rest, config.heldout_documents)]
    if not heldout or next(iter(train), None) is None:
        raise UserError(
            f"{config.source}: with data.holdout {fraction:g} one side of the split has no "
            "document; choose another fraction, or set --data.heldout_source"
        )
    return train, _dataset(heldout)


def _is_on_side(row: dict[str, Any], fraction: float, held_out: bool) -> bool:
    return row["text"] is not None and is_held_out(row["text"], fraction) == held_out


# Token ids and blocks ---------------------------------------------------------------------------


def tokenize(documents: Any, tokenizer: PreTrainedTokenizerBase, packing: int = PACKING) -> Any:
    """Encode the column ``text`` of a dataset, in memory or streamed, as ``input_ids``.

    Each document is preceded by the separator, the tokenizer's end-of-text token, which occurs
    nowhere else (in `packing` 1 also where its name is written).

    Raises:
        UserError: The tokenizer loses some of the text; of a stream only that in memory is checked.
    """
    in_memory = isinstance(documents, datasets.Dataset)
    settings: dict[str, Any] = {}
    if in_memory:
        number = datasets.Value("uint16" if vocabulary_size(tokenizer) <= 2**16 else "int32")
        features = datasets.Features({"input_ids": datasets.List(number)})
        # Encodings of a batch take a hundred bytes for each token.
        settings = {"features": features, "batch_size": 64, "desc": "tokenizing"}
    return documents.map(
        _token_ids,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={
            "tokenizer": tokenizer, "separator": separator_id(tokenizer), "check": in_memory,
            "packing": packing,
        },
        **settings,
    )  # fmt: skip


def _token_ids(
    rows: dict[str, list[str | None]],
    tokenizer: PreTrainedTokenizerBase,
    separator: int,
    check: bool,
    packing: int,
) -> dict[str, list[list[int]]]:
    texts = [text for text in rows["text"] if text is not None]
    split = packing > 1
    encoded: Any = (
        encode_text(tokenizer, texts, split, return_attention_mask=False) if texts else {}
    )
    documents = encoded.get("input_ids", [])
    for text, ids in zip(texts if check else [], documents if check else [], strict=True):
        check_lossless(tokenizer, text, ids)
    return {"input_ids": [[separator, *ids] for ids in documents]}


def token_bytes(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    packing: int = PACKING,
) -> NDArray[np.int64]:
    """UTF-8 bytes of the first `count` tokens of the stream that `tokenize` and `pack` make.

    A separator has none, and a character that several tokens share counts for the first of them.
    """
    parts: list[NDArray[np.int64]] = []
    missing = count
    for text in documents["text"]:
        if missing <= 0:
            break
        encoded: Any = encode_text(tokenizer, text, packing > 1, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        codes = np.fromiter(map(ord, text), np.int64, len(text))
        # Length of the text in bytes up to each character.
        length = np.cumsum([0, *(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))])
        ends = np.maximum.accumulate([0, *(end for _, end in offsets)])
        if offsets:
            ends[-1] = len(text)  # a tokenizer may leave white space out of its offsets
        parts.append(np.diff(length[ends], prepend=0))
        missing -= len(parts[-1])
    return np.concatenate(parts)[:count]


def pack(tokens: Any, context: int, side: str = "training") -> Any:
    """Pack tokenised documents into blocks of `context` ids.

    Documents in memory form one stream. Of a streamed source, every 1000 documents do, so that a
    resumed run can start at any of these groups.

    Raises:
        UserError: Text in memory (`side` names it) does not fill one block.
    """
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), context)})
    if not isinstance(tokens, datasets.Dataset):
        return tokens.map(_blocks, batched=True, fn_kwargs={"context": context}, features=features)
    number = tokens.features["input_ids"].feature
    features = datasets.Features({"input_ids": datasets.List(number, context)})
    parts, rest = [], np.zeros(0, np.dtype(number.dtype))
    for ids in _flat_parts(tokens):
        rest = np.concatenate([rest, ids])
        if len(rest) >= context:
            blocks = rest[: len(rest) // context * context].reshape(-1, context)
            parts.append(datasets.Dataset.from_dict({"input_ids": blocks}, features=features))
            rest = rest[blocks.size :]
    if not parts:
        raise UserError(
            f"the {side} text has {len(rest)} tokens in {len(tokens)} documents, fewer than a "
            f"block of {context}: use more text, or a smaller --data.context"
        )
    return datasets.concatenate_datasets(parts)


def _flat_parts(tokens: datasets.Dataset) -> Iterator[NDArray[Any]]:
    """The stream of ids in parts of about `_PART_BYTES`."""
    waiting: list[NDArray[Any]] = []
    for table in tokens.with_format("arrow").iter(batch_size=64):
        waiting.append(cast(Any, table)["input_ids"].combine_chunks().flatten().to_numpy())
        if sum(ids.nbytes for ids in waiting) > _PART_BYTES:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _blocks(rows: dict[str, list[list[int]]], context: int) -> dict[str, NDArray[np.int32]]:
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in rows["input_ids"]])
    count = len(stream) // context
    return {"input_ids": stream[: count * context].reshape(count, context)}


def count_tokens(tokens: datasets.Dataset, vocab_size: int) -> Tensor:
    """Occurrences of each id, (vocab_size,) int64; balanced routing distributes experts by them."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for rows in tokens.iter(batch_size=1000):
        for ids in cast(dict[str, list[list[int]]], rows)["input_ids"]:
            counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return counts


def collate(rows: list[dict[str, Any]], separator: int | None = None) -> dict[str, Tensor]:
    """Join blocks to a batch: ``input_ids`` and ``labels``, both (B, context) int64.

    Blocks of conversations have labels and ``position_ids`` of their own. With the id of the
    separator, ``position_ids`` begin again at each one: transformers' form of
    documents in a row that attention does not look across.
    """
    batch = {
        name: torch.tensor(np.asarray([row[name] for row in rows]), dtype=torch.int64)
        for name in ("input_ids", "labels", "position_ids")
        if name in rows[0]
    }
    ids = batch["input_ids"]
    batch.setdefault("labels", ids)
    if separator is not None:
        places = torch.arange(ids.shape[1]).expand_as(ids)
        begins = torch.where(ids == separator, places, 0).cummax(dim=1).values
        batch["position_ids"] = places - begins
    return batch


# The order of blocks ----------------------------------------------------------------------------


class BlockOrder(Sampler[int]):
    """The order of blocks in memory: a new permutation for each pass over the data.

    The order is a function of the seed, so that a resumed run continues as if it had not stopped,
    and any number of processes shares one order. A pass may end inside a batch: no batch is short
    and no block is left out.
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


class BlockStream(IterableDataset):
    """Endless blocks of a streamed source, which starts again after its last document.

    The data loader reads ahead of the training, so at a checkpoint the stream is past the blocks
    that were trained on. Every `every` blocks the stream records its position. A checkpoint after n
    blocks keeps the last position at or before n; a resumed run reads from there and skips up to n.
    `every` is the global batch, so that checkpoints coincide with positions.
    """

    def __init__(self, blocks: datasets.IterableDataset, every: int) -> None:
        super().__init__()
        self.blocks, self.every = blocks, every
        self.beginning = blocks.state_dict()
        self.skip = 0
        self.positions = deque([(0, self.beginning)], maxlen=_KEPT_POSITIONS)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, state = self.positions[-1]
        self.blocks.load_state_dict(state)
        start, self.skip = self.skip, 0
        try:
            while True:
                before = count
                for block in self.blocks:
                    count += 1
                    # Recorded before the yield: the state is already the one after this block.
                    if count % self.every == 0:
                        self.positions.append((count, self.blocks.state_dict()))
                    if count > start:
                        yield block
                if count == before and state is self.beginning:
                    raise UserError("the stream does not fill one block: use more text")
                state = self.beginning
                self.blocks.load_state_dict(state)
        except (OSError, DatasetsError) as error:
            raise UserError(
                f"the stream was interrupted after block {count}: {first_line(error)}; continue "
                "from the last checkpoint with --resume auto"
            ) from error

    def save(self, folder: Path, consumed: int) -> None:
        """Write the position after `consumed` blocks into a checkpoint folder."""
        earlier = (position for position in self.positions if position[0] <= consumed)
        count, state = max(earlier, key=lambda position: position[0])
        with atomic_file(folder / POSITION_FILE) as partial:
            partial.write_text(json.dumps({"consumed": consumed, "noted": count, "state": state}))

    def load(self, folder: Path) -> None:
        """Start the next iteration where `save` was called.

        Raises:
            UserError: The folder has no position file, or that of another kind of source.
        """
        with report_errors(
            f"cannot read the position in the stream from {folder}",
            "use a checkpoint of a run on the same source",
            (OSError, ValueError, KeyError),
        ):
            position = read_json_object(folder / POSITION_FILE, follow_links=False)
            consumed, recorded = position["consumed"], position["noted"]
            if not fits([consumed, recorded], list[int]) or not 0 <= recorded <= consumed:
                raise ValueError(f"position {recorded!r} of {consumed!r} blocks")
            self.blocks.load_state_dict(position["state"])  # raises for another dataset
            self.skip = consumed
            self.positions.append((recorded, position["state"]))
