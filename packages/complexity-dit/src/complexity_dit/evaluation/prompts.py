"""Whether samples show what their prompts say, and whether they copy pictures of such captions.

Linear probes are fitted on the features of training images. A probe errs on real images too, so its
number for samples stands beside that for the real images whose captions are the prompts, and beside
that for the same samples and permuted prompts, the floor of samples that ignore them.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc

from complexity_dit.data.captions import Captions
from complexity_dit.data.dataset import MIN_IMAGES_PER_NAME
from complexity_dit.evaluation.breakdown import Memorisation
from complexity_dit.evaluation.distances import Array, Float64
from inl_core.run.files import atomic_file

PROMPTS_FILE = "prompts.csv"

WORD_IMAGES, MOST_WORDS = 40, 50
"""A word has a probe if that many training images have it; of these words the commonest."""

MIN_ASKED = 5
"""Prompts that must say a word, or name a label of a field, for a number."""

SHUFFLES = 20
"""Permutations of the prompts that the floor is the mean of."""

SIMILAR = 0.5
"""Share of a prompt's words from which a caption that has them is similar to it."""

Texts = Mapping[str, Sequence[str]]
"""What is known about an image: its texts by column, from `Captions.texts_of`."""

Bools = NDArray[np.bool_]


# Probes

_STRENGTHS = np.logspace(-4, 2, 13)


class Probe(NamedTuple):
    """A linear map of features; see `fit_probe`."""

    centre: Float64
    scale: Float64
    weights: Float64
    bias: Float64

    def __call__(self, features: Array) -> Float64:
        """Scores (n, K) of features (n, D)."""
        return (features - self.centre) / self.scale @ self.weights + self.bias


def fit_probe(features: Array, targets: Array) -> Probe:
    """Fit targets (n, K) by ridge regression on standardised features (n, D), in float64.

    The strength of the penalty is the one with the smallest leave-one-out error, which is known
    without n fits: that of a row is its residual / (1 - h), h its diagonal entry of the projection
    onto the fit (Allen, 1974). With one-hot targets, the largest score is the predicted class.
    """
    x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    n = len(x)
    centre, bias = x.mean(0), y.mean(0)
    scale = x.std(0)
    scale[scale == 0] = 1.0
    x, y = (x - centre) / scale, y - bias
    values, vectors = (t.numpy() for t in torch.linalg.eigh(torch.from_numpy(x.T @ x)))
    rotated = x @ vectors
    squares, projected = rotated**2, rotated.T @ y
    best, weights = np.inf, projected
    for strength in n * _STRENGTHS:
        shrunk = 1 / (values.clip(0) + strength)
        coefficients = shrunk[:, None] * projected
        held_out = 1 - 1 / n - squares @ shrunk
        error = float((((y - rotated @ coefficients) / held_out[:, None]) ** 2).mean())
        if error < best:
            best, weights = error, vectors @ coefficients
    return Probe(centre, scale, weights, bias)


def auc(scores: Array, positive: Bools) -> float:
    """Probability that a positive has a larger score than another; ties count half."""
    # As ranks: torchmetrics takes other numbers for logits.
    ranks = np.unique(scores, return_inverse=True)[1] / len(scores)
    return float(binary_auroc(torch.from_numpy(ranks), torch.from_numpy(positive).long()))


# What prompts and captions say

_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTION_WORDS = frozenset({
    "about", "after", "all", "and", "are", "before", "but", "das", "der", "des", "die", "for",
    "from", "had", "has", "have", "her", "him", "his", "into", "its", "les", "not", "off", "one",
    "our", "out", "over", "she", "than", "that", "the", "their", "them", "they", "this", "through",
    "too", "under", "une", "upon", "von", "was", "were", "what", "when", "where", "which", "while",
    "who", "with", "without", "you", "your",
})  # fmt: skip


def content_words(text: str) -> set[str]:
    """Words of a text of three letters or more, in lower case, without function words."""
    return set(_WORD.findall(text.casefold())) - _FUNCTION_WORDS


class Columns(NamedTuple):
    """Columns of names, each with a probe of its own, and those of texts, whose words have one."""

    fields: list[str]
    texts: list[str]

    def words(self, known: Texts) -> set[str]:
        """Content words of the texts of an image."""
        return {
            word for c in self.texts for text in known.get(c, ()) for word in content_words(text)
        }


def columns_of(captions: Captions, train: Sequence[Texts], labels: Collection[str]) -> Columns:
    """The columns of a source: fields as `read_labels` chooses them, with `labels`, and texts."""
    fields = []
    for column, kind in captions.kinds.items():
        known = [texts[column][0] for texts in train if column in texts]
        different = len(set(known))
        repeated = different >= 2 and len(known) >= MIN_IMAGES_PER_NAME * different
        if column in labels or (kind == "text" and column not in captions.columns and repeated):
            fields.append(column)
    texts = [c for c in dict.fromkeys([*captions.columns, *captions.parts]) if c not in fields]
    return Columns(fields, texts)


def says(prompt: str, name: str) -> bool:
    """Whether a prompt has a name, as whole words, in any case."""
    return bool(re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", prompt.casefold()))


# The measures


@dataclass
class PromptMeasures:
    """Result of the measures.

    Attributes:
        summary: Numbers as JSON: ``n_train``, ``fields``, ``words`` and ``copies``.
        absent: What could not be measured -> the reason.
        table: Column -> its value for each sample.
    """

    summary: dict[str, Any]
    absent: dict[str, str] = field(default_factory=dict)
    table: dict[str, Sequence[Any]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the table as CSV, atomically."""
        with (
            atomic_file(path) as scratch,
            scratch.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["sample", *self.table])
            rows = zip(*self.table.values(), strict=True)
            writer.writerows([sample, *row] for sample, row in enumerate(rows))


class Sides(NamedTuple):
    """Features of the samples (n, D), of their n real images, and of the training images (m, D)."""

    generated: Array
    real: Array
    train: Array


def measure_prompts(
    prompts: Sequence[str],
    known: Sequence[Texts],
    sides: Sides,
    train_known: Sequence[Texts],
    columns: Columns,
    copies: Memorisation,
    labelled: Mapping[str, Bools] | None = None,
    seed: int = 0,
) -> PromptMeasures:
    """Measure how well samples follow their prompts.

    Args:
        prompts: Of each sample; each was drawn from the captions of a real image.
        known: What is known about that real image.
        sides: Features.
        train_known: What is known about each training image.
        columns: From `columns_of`.
        copies: Nearest training images of the samples.
        labelled: Field -> which samples (n,) were asked for the label of their real image, besides
            the prompt.
        seed: Seed of the permutations.
    """
    n = len(prompts)
    shuffles = [np.random.default_rng([seed, i]).permutation(n) for i in range(SHUFFLES)]
    found = PromptMeasures({"n_train": len(sides.train), "fields": {}}, table={"prompt": prompts})
    for column in columns.fields:
        asked = np.array(
            [
                column in texts and (says(prompt, texts[column][0]) or given)
                for prompt, texts, given in zip(
                    prompts, known, (labelled or {}).get(column, np.zeros(n, bool)), strict=True
                )
            ]
        )
        _measure_field(column, asked, known, sides, train_known, shuffles, found)
    _measure_words(prompts, known, sides, train_known, columns, shuffles, found)
    _measure_copies(prompts, known, train_known, columns, copies, shuffles, found)
    return found


def _over(shuffles: list[NDArray[np.int64]], number: Callable[..., float]) -> dict[str, float]:
    """Mean and standard deviation of a number of permuted prompts."""
    values = [number(order) for order in shuffles]
    return {"shuffled": float(np.mean(values)), "shuffled_std": float(np.std(values))}


def _measure_field(
    column: str,
    asked: Bools,
    known: Sequence[Texts],
    sides: Sides,
    train_known: Sequence[Texts],
    shuffles: list[NDArray[np.int64]],
    found: PromptMeasures,
) -> None:
    """Share of images that the probe of a column assigns to the name that the prompt asks for."""
    rows = [i for i, texts in enumerate(train_known) if column in texts]
    names, ids = np.unique([train_known[i][column][0] for i in rows], return_inverse=True)
    number = {name: i for i, name in enumerate(names.tolist())}
    wanted = np.array([number.get(texts.get(column, [""])[0], -1) for texts in known])
    asked = asked & (wanted >= 0)
    if asked.sum() < MIN_ASKED:
        found.absent[f"prompts.{column}"] = (
            f"{int(asked.sum())} of {len(asked)} prompts say it; {MIN_ASKED} are needed"
        )
        return
    probe = fit_probe(sides.train[rows], np.eye(len(names))[ids])
    painted, real = (probe(side).argmax(1) for side in (sides.generated, sides.real))

    def share(assigned: NDArray[np.int64], order: NDArray[np.int64] | slice = slice(None)) -> float:
        return float((assigned == wanted[order])[asked[order]].mean())

    on_real = share(real)
    found.summary["fields"][column] = {
        "n": int(asked.sum()),
        "classes": len(names),
        "painted": share(painted),
        "real": on_real,
        "ratio": share(painted) / on_real if on_real else None,
        **_over(shuffles, lambda order: share(painted, order)),
    }
    found.table |= {
        column: np.where(asked, names[wanted], "").tolist(),
        f"{column}_painted": names[painted].tolist(),
        f"{column}_real": names[real].tolist(),
    }


def _measure_words(
    prompts: Sequence[str],
    known: Sequence[Texts],
    sides: Sides,
    train_known: Sequence[Texts],
    columns: Columns,
    shuffles: list[NDArray[np.int64]],
    found: PromptMeasures,
) -> None:
    """AUC of the probe of each common word: prompts that say it against those that do not."""
    in_train = [columns.words(texts) for texts in train_known]
    counts = Counter(word for words in in_train for word in words)
    common = sorted((-count, word) for word, count in counts.items() if count >= WORD_IMAGES)
    words = [word for _, word in common[:MOST_WORDS]]
    said, shown = [content_words(one) for one in prompts], [columns.words(one) for one in known]
    # 1 where prompt and real image have the word, -1 where neither has, 0 where they disagree.
    states = np.array(
        [
            [(word in a and word in b) - (word not in a and word not in b) for word in words]
            for a, b in zip(said, shown, strict=True)
        ]
    ).reshape(len(prompts), len(words))
    enough = ((states == 1).sum(0) >= MIN_ASKED) & ((states == -1).sum(0) >= MIN_ASKED)
    words, states = [w for w, keep in zip(words, enough, strict=True) if keep], states[:, enough]
    if not words:
        found.absent["prompts.words"] = (
            f"no word occurs in {WORD_IMAGES} training captions and in {MIN_ASKED} prompts; "
            f"text columns: {', '.join(columns.texts) or 'none'}"
        )
        return
    has_word = np.array([[word in texts for word in words] for texts in in_train], np.float64)
    probe = fit_probe(sides.train, has_word)
    painted, real = probe(sides.generated), probe(sides.real)

    def aucs(scores: Float64, order: NDArray[np.int64] | slice = slice(None)) -> list[float]:
        pairs = zip(scores.T, states[order].T, strict=True)
        return [auc(s[state != 0], state[state != 0] == 1) for s, state in pairs]

    by_word = zip(words, (states == 1).sum(0), aucs(painted), aucs(real), strict=True)
    table = {
        word: {"n": int(n), "n_train": counts[word], "painted": a, "real": b}
        for word, n, a, b in by_word
    }
    found.summary["words"] = {
        "n": len(words),
        **{
            side: float(np.mean([row[side] for row in table.values()]))
            for side in ("painted", "real")
        },
        **_over(shuffles, lambda order: float(np.mean(aucs(painted, order)))),
        "auc": table,
    }


def _measure_copies(
    prompts: Sequence[str],
    known: Sequence[Texts],
    train_known: Sequence[Texts],
    columns: Columns,
    copies: Memorisation,
    shuffles: list[NDArray[np.int64]],
    found: PromptMeasures,
) -> None:
    """Near copies, apart by whether the caption of the nearest training image is similar."""
    said = [
        content_words(prompt) & columns.words(texts)
        for prompt, texts in zip(prompts, known, strict=True)
    ]
    theirs = [columns.words(train_known[j]) for j in copies.neighbours]

    def similarities(order: Sequence[int] | NDArray[np.int64]) -> Float64:
        """Share of the words of each prompt in the other caption; NaN without words."""
        pairs = [(said[i], words) for i, words in zip(order, theirs, strict=True)]
        return np.array([len(a & b) / len(a) if a else np.nan for a, b in pairs])

    own, near = similarities(range(len(prompts))), copies.near_copies
    found.table |= {
        "training_image": copies.neighbours.tolist(),
        "distance": copies.samples.tolist(),
        "caption_similarity": ["" if np.isnan(s) else s for s in own.tolist()],
    }
    with_words = ~np.isnan(own)
    if not with_words.any():
        found.absent["prompts.copies"] = "no prompt has a word of a text of its real image"
        return

    def row(chosen: Bools) -> dict[str, Any]:
        share = float(near[chosen].mean()) if chosen.any() else None
        return {"n": int(chosen.sum()), "near_copies": share}

    similar = with_words & (own >= SIMILAR)
    found.summary["copies"] = {
        **row(np.ones(len(near), bool)),
        "similar_caption": row(similar),
        "other_caption": row(with_words & ~similar),
        "similar": float(similar.sum() / with_words.sum()),
        **_over(
            shuffles,
            lambda order: float((similarities(order) >= SIMILAR).sum() / with_words.sum()),
        ),
    }
