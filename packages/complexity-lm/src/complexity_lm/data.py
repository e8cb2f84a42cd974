"""From documents to a held-out split, token ids and packed blocks.

Whether a document is held out depends on the sha256 of its bytes alone, not on its place or name:
copies of a document are on the same side, and adding documents moves none of the others.

In the token stream a separator precedes every document: it marks that nothing before it matters,
and the first token of a document is predicted from it. Packing cuts the stream into blocks of equal
length without padding and drops the incomplete last block. Attention may look across a separator
inside a block.
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
from complexity_lm.hub import first_line, report_errors
from complexity_lm.sources import is_streamed, read_documents, stream_documents
from complexity_lm.tokenizer import separator_id, train_tokenizer
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.folders import new_folder
from inl_core.run.json_files import fits, read_json_object

POSITION_FILE = "data_position.json"
"""Position in the data stream, in the checkpoint of a streamed run."""

_KEPT_POSITIONS = 64


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


def load_corpus(config: DataConfig) -> Corpus:
    """Read both sides of a source.

    Raises:
        UserError: The source cannot be read, or one side of it is empty.
    """
    # With a separate held-out source, all of the training source is trained on.
    fraction = 0.0 if config.heldout_source else config.holdout
    if is_streamed(config.source):
        train, heldout = _split_stream(config, fraction)
        sample = _dataset(row["text"] for row in islice(train, config.sample_documents))
    else:
        train, heldout = _split_documents(config, fraction)
        sample = train
    if config.heldout_source:
        heldout = _read_all(config.heldout_source, config)
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
        texts = load_split(replace(data or DataConfig(), source=source), "train")["text"]
        tokenizer = train_tokenizer(texts, vocab_size)
        tokenizer.save_pretrained(partial)
    return f"a tokenizer of {len(tokenizer)} ids, from {len(texts)} documents, is in {folder}"


def _dataset(texts: Iterable[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": list(texts)}, features=datasets.Features({"text": datasets.Value("large_string")})
    )


def _stream(source: str, config: DataConfig) -> datasets.IterableDataset:
    return stream_documents(source, config.hub_subset, config.hub_split, config.text_column)


def _read_all(source: str, config: DataConfig) -> datasets.Dataset:
    if is_streamed(source):
        rows = islice(_stream(source, config), config.heldout_documents)
        return _dataset(row["text"] for row in rows)
    return _dataset(d.text for d in read_documents(source, config.files, config.piece_bytes))


def _split_documents(
    config: DataConfig, fraction: float
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    train: list[str] = []
    heldout: list[str] = []
    for document in read_documents(config.source, config.files, config.piece_bytes):
        (heldout if is_held_out(document.text, fraction) else train).append(document.text)
    if fraction and not (train and heldout):
        raise UserError(
            f"{config.source}: data.holdout {fraction:g} holds out {len(heldout)} of "
            f"{len(train) + len(heldout)} documents, and both sides need one; cut files into "
            "smaller documents (--data.piece_bytes=2048), or set --data.heldout_source"
        )
    return _dataset(train), _dataset(heldout) if fraction else None


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
    return is_held_out(row["text"], fraction) == held_out


# Token ids and blocks ---------------------------------------------------------------------------


def tokenize(documents: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Encode the column ``text`` of a dataset, in memory or streamed, as ``input_ids``.

    Each document is preceded by the separator, the tokenizer's end-of-text token.
    """
    return documents.map(
        _token_ids,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer, "separator": separator_id(tokenizer)},
        **_progress_title(documents, "tokenizing"),
    )


def _token_ids(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, separator: int
) -> dict[str, list[list[int]]]:
    # verbose=False: documents longer than the context of the model need no warning here.
    encoded = tokenizer(
        rows["text"], add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return {"input_ids": [[separator, *ids] for ids in encoded["input_ids"]]}


def token_bytes(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, count: int
) -> NDArray[np.int64]:
    """UTF-8 bytes of the first `count` tokens of the stream that `tokenize` and `pack` make.

    A separator has none, and a character that several tokens share counts for the first of them.
    """
    parts: list[NDArray[np.int64]] = []
    missing = count
    for text in documents["text"]:
        if missing <= 0:
            break
        offsets = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
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
    in_memory = isinstance(tokens, datasets.Dataset)
    if in_memory and (total := sum(map(len, tokens["input_ids"]))) < context:
        raise UserError(
            f"the {side} text has {total} tokens in {len(tokens)} documents, fewer than a block of "
            f"{context}: use more text, or a smaller --data.context"
        )
    return tokens.map(
        _blocks,
        batched=True,
        batch_size=len(tokens) if in_memory else 1000,
        fn_kwargs={"context": context},
        **_progress_title(tokens, "packing"),  # pyright: ignore[reportArgumentType]
        features=datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int32"), length=context)}
        ),
    )


def _blocks(rows: dict[str, list[list[int]]], context: int) -> dict[str, NDArray[np.int32]]:
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in rows["input_ids"]])
    count = len(stream) // context
    return {"input_ids": stream[: count * context].reshape(count, context)}


def _progress_title(rows: Any, title: str) -> dict[str, str]:
    """The argument of `map` for the title of its progress bar; a stream has no bar."""
    return {"desc": title} if isinstance(rows, datasets.Dataset) else {}


def count_tokens(tokens: datasets.Dataset, vocab_size: int) -> Tensor:
    """Occurrences of each id, (vocab_size,) int64; balanced routing distributes experts by them."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for rows in tokens.iter(batch_size=1000):
        for ids in cast(dict[str, list[list[int]]], rows)["input_ids"]:
            counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return counts


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Join blocks to a batch: ``input_ids`` and ``labels``, both (B, context) int64."""
    ids = torch.tensor(np.asarray([row["input_ids"] for row in rows]), dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


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
