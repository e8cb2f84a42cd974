"""What a language model has to beat: gzip, and an order-3 model of bytes.

Both see the bytes of the same held-out documents as the model. gzip starts from nothing and adapts
as it goes; the byte model is counted on the training bytes once and then stays as it is.
"""

import gzip
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from inl_core.run.errors import UserError

ORDER = 3
"""Bytes of context of the byte model."""


def gzip_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits a byte of `gzip -9` over the documents, one behind the other.

    Raises:
        UserError: There is no text.
    """
    whole = "".join(texts).encode()
    if not whole:
        raise UserError("there is no text to compress")
    return 8 * len(gzip.compress(whole, compresslevel=9, mtime=0)) / len(whole)


class ByteModel:
    """Interpolated n-gram model of bytes with Witten-Bell smoothing (Bell, Witten, Cleary 1989).

    With n(c·b) the count of byte b behind context c, n(c) that of c with any byte behind it, and
    t(c) the number of different bytes seen behind c,

        P_k(b | c) = (n(c·b) + t(c) P_{k-1}(b | c')) / (n(c) + t(c)),

    where c' is c without its oldest byte and P_{-1} = 1/256. A context that was never seen leaves
    P_{k-1}. Three zero bytes stand in front of each document.

    Args:
        texts: Training documents.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        keys = _keys(texts)
        self.tables = [_count(keys & (256 ** (order + 1) - 1)) for order in range(ORDER + 1)]

    def bits_per_byte(self, texts: Sequence[str]) -> float:
        """Bits a byte of other documents.

        Raises:
            UserError: There is no text.
        """
        keys = _keys(texts)
        if not len(keys):
            raise UserError("there is no text to predict")
        p = np.full(len(keys), 1 / 256)
        for order, (grams, gram_counts, contexts, totals, kinds) in enumerate(self.tables):
            gram = keys & (256 ** (order + 1) - 1)
            n = _look_up(grams, gram_counts, gram)
            total = _look_up(contexts, totals, gram >> 8)
            kind = _look_up(contexts, kinds, gram >> 8)
            seen = total > 0
            p[seen] = (n[seen] + kind[seen] * p[seen]) / (total[seen] + kind[seen])
        return float(-np.log2(p).sum() / len(keys))


_Table = tuple[
    NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]
]


def _keys(texts: Iterable[str]) -> NDArray[np.uint32]:
    """For each byte the number whose base-256 digits are its three predecessors and itself."""
    parts = [np.zeros(0, np.uint32)]
    for text in texts:
        padded = np.frombuffer(bytes(ORDER) + text.encode(), np.uint8).astype(np.uint32)
        length = len(padded) - ORDER
        parts.append(
            sum(
                (padded[i : i + length] << np.uint32(8 * (ORDER - i)) for i in range(ORDER + 1)),
                np.zeros(length, np.uint32),
            )
        )
    return np.concatenate(parts)


def _count(grams: NDArray[np.uint32]) -> _Table:
    """Distinct grams and their counts; their contexts, those' totals and numbers of followers."""
    unique, counts = np.unique(grams, return_counts=True)
    contexts, first, kinds = np.unique(
        unique >> np.uint32(8), return_index=True, return_counts=True
    )
    return (
        unique,
        counts,
        contexts,
        np.add.reduceat(counts, first) if len(counts) else counts,
        kinds,
    )


def _look_up(
    known: NDArray[np.uint32], values: NDArray[np.int64], wanted: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """The value of each wanted key; 0 where it is unknown. `known` is sorted."""
    if not len(known):
        return np.zeros(len(wanted), np.int64)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, values[place], 0)
