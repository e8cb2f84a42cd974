"""Captions of pictures: texts that come with them, or composed of what is known about each.

On few pictures a network learns one caption for each by heart. A template composes another one at
every draw: in one of several phrasings, with parts left out.
"""

import hashlib
import json
import math
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from string import Formatter
from typing import Any, NamedTuple

import datasets

from complexity_dit.config import DataConfig
from complexity_dit.seeding import derive_seed
from inl_core.run.errors import UserError

TEXT_COLUMN = "text"
"""Column of captions that needs no name, as in the training scripts of diffusers."""

PART_DROPOUT = 0.25
"""Probability that a part of a template is left out."""

LIST_SHARE = 0.25
"""Share of composed captions that list the parts in any order, between commas."""


class Captions:
    """The captions of one split, drawn from what is known about its pictures.

    Args:
        rows: Of each picture, in the order of the split, its columns as a JSON object, as
            `known_rows` writes them.
        kinds: Kind of each column, see `column_kinds`.
        config: Names text columns and template.

    Raises:
        UserError: A column is absent or has no text, the template is malformed, or there is neither
            a text column nor a template.
    """

    def __init__(self, rows: Sequence[str], kinds: Mapping[str, str], config: DataConfig) -> None:
        self.columns = text_columns(kinds, config)
        self.template = config.caption_template
        self.kinds = kinds
        self._rows = rows
        among = f"the columns are {', '.join(kinds) or 'none'}"
        if not self.columns and not self.template:
            raise UserError(
                f"{config.source} has no captions for the text encoder: {among}; name one of text "
                "with --data.text_column, or compose them with --data.caption_template"
            )
        for column in self.columns:
            if column not in kinds:
                raise UserError(f"text_column {column!r} is not in the data: {among}")
            if kinds[column] == "number":
                raise UserError(
                    f"text_column {column!r} holds numbers, and captions are text or lists of "
                    "texts: name another one, or put it into --data.caption_template"
                )
        for column in self.parts:
            if column not in kinds:
                raise UserError(
                    f"caption_template {self.template!r} names {column!r}, which is not in the "
                    f"data: {among}"
                )

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._rows)

    @property
    def parts(self) -> list[str]:
        """The columns that the template names."""
        phrasings = _phrasings(self.template or "")
        return list(dict.fromkeys(part.column for phrasing in phrasings for part in phrasing))

    def texts_of(self, index: int) -> dict[str, list[str]]:
        """What is known about a picture, by column, in the words of its captions."""
        row = json.loads(self._rows[index])
        known = {}
        for column in self.kinds:
            clean = plain if column in self.columns else partial(_as_part, column)
            known[column] = [text for text in map(clean, _texts(row.get(column))) if text]
        return {column: texts for column, texts in known.items() if texts}

    @property
    def fingerprint(self) -> str:
        """sha256 over all that the captions depend on."""
        return sha256_of([json.dumps([self.columns, self.template]), *self._rows])

    def captions_of(self, indices: Sequence[int], seed: int, step: int) -> list[str]:
        """Draw a caption for each picture, as a function of seed, step and picture alone.

        Args:
            indices: Which pictures of the split.
            seed: That of the run.
            step: That of the run; each draws others.

        Returns:
            One text for each; empty where nothing is known about a picture.
        """
        return [
            self._drawn(i, random.Random(derive_seed(seed, "caption", step, i)))
            for i in map(int, indices)
        ]

    def _drawn(self, index: int, generator: random.Random) -> str:
        """One of a picture's texts or the composed caption, each with the same probability."""
        row = json.loads(self._rows[index])
        texts = [plain(text) for column in self.columns for text in _texts(row.get(column))]
        texts = [text for text in texts if text]
        number = int(generator.random() * (len(texts) + bool(self.template)))
        if number < len(texts):
            return texts[number]
        return compose(row, self.template, generator) if self.template else ""


def compose(row: Mapping[str, Any], template: str, generator: random.Random) -> str:
    """Compose a caption of columns, each part left out with probability `PART_DROPOUT`.

    The text before a part goes with it, and a share of `LIST_SHARE` lists the parts in any order:
    of "{style} by {artist}: {title}" come "Cubism by Juan Gris", "The Lamb, Cubism" or nothing.

    Args:
        row: Columns of a picture; parts that it lacks are left out.
        template: Phrasings, separated by "|".
        generator: Draws a fixed number of times for a phrasing.
    """
    phrasings = _phrasings(template)
    kept: list[tuple[str, str, float]] = []
    for before, column in phrasings[int(generator.random() * len(phrasings))]:
        texts = _texts(row.get(column))
        which, drop, place = generator.random(), generator.random(), generator.random()
        text = _as_part(column, texts[int(which * len(texts))]) if texts else ""
        if text and drop >= PART_DROPOUT:
            kept.append((before, text, place))
    if generator.random() < LIST_SHARE:
        return ", ".join(text for _, text, _ in sorted(kept, key=lambda part: part[2]))
    return plain("".join(before + text for before, text, _ in kept)).lstrip(" ,;:.–-")


def _as_part(column: str, text: str) -> str:
    """A text of a column, as a composed caption has it."""
    return clean_title(text) if _TITLES.search(column) else _words(plain(text))


class _Part(NamedTuple):
    """A column of a template, with the text before it."""

    before: str
    column: str


@lru_cache(maxsize=16)
def _phrasings(template: str) -> list[list[_Part]]:
    """The parts of each phrasing; text behind the last part is not used."""
    try:
        parsed = [list(Formatter().parse(one)) for one in template.split("|")]
    except ValueError as error:
        raise UserError(
            f"caption_template {template!r}: {error}; columns are named in braces, such as "
            '"{style} by {artist}: {title}"'
        ) from error
    phrasings = []
    for fields in parsed:
        parts, before = [], ""
        for text, column, how, conversion in fields:
            if how or conversion:
                raise UserError(
                    f"caption_template {template!r} formats {column!r}, and columns are put in as "
                    f"they are: write {{{column}}}"
                )
            before += text
            if column is not None:
                parts.append(_Part(before, column))
                before = ""
        phrasings.append(parts)
    if template.strip() and not all(phrasings):
        raise UserError(
            f"caption_template {template!r} has a phrasing without a column: name one in braces, "
            'such as "{title}"'
        )
    return phrasings


# Texts.


def plain(text: str) -> str:
    """One line of composed Unicode (NFC) without control characters or needless spaces."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


_TITLES = re.compile(r"(title|name)$", re.IGNORECASE)
"""Names of columns whose texts `clean_title` cleans."""

_FILE_ENDING = re.compile(r"\.(jpe?g|png|webp|tiff?|gif|bmp)$", re.IGNORECASE)
_NO_TITLE = re.compile(
    r"\b(not detected|unknown title|title unknown|untitled|no title|(img|dsc[nf]?|pxl) ?\d+)\b",
    re.IGNORECASE,
)
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
_DATE = re.compile(
    r"(?:\b(?:in|of|from|dated|c|ca|circa|about|around|before|after)\b\.? ?)?"
    rf"(?:(?:\b\d{{1,2}}(?:st|nd|rd|th)?\.? )?\b{_MONTH}\b\.?,? (?:\d{{1,2}}, )?)?"
    r"\b\d{3,4}s?(?:(?: ?[–/-] ?| and | or )\d{1,4}s?)*\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?:(?:\b(?:no|nr|vol|pl|plate)\b|\bn[°º]|№|#)\.? ?)?(?<![^\W_])\d+(?:[.,:/–-]\d+)*(?![^\W_])",
    re.IGNORECASE,
)
_EMPTY_BRACKETS = re.compile(r"\([^\w(]*\)|\[[^\w\[]*\]")
_POSSESSIVE = re.compile(r"\b(\w{2,}) s\b")


def clean_title(text: str) -> str:
    """Take dates, numbers and what is left of a file name out of a title.

    "the-lady-s-cove-1897-1.jpg" becomes "the lady's cove", "Harvest (c. 1665/66), No. 2" becomes
    "Harvest", and "not_detected_233126" nothing.
    """
    is_file_name = " " not in text.strip()
    text = _words(_FILE_ENDING.sub("", plain(text)))
    if is_file_name:
        text = _POSSESSIVE.sub(r"\1's", text)
    for pattern in (_NO_TITLE, _DATE, _NUMBER, _EMPTY_BRACKETS):
        text = pattern.sub(" ", text)
    text = re.sub(r" +(?=[,;:.)])", "", " ".join(text.split()))
    return text.strip(" ,;:.-–/_#&")


def _words(text: str) -> str:
    """A name or a file name as words: marks of a text without any space become spaces."""
    return text.replace("_", " ") if " " in text else re.sub(r"[_+-]+", " ", text)


# What is known about pictures.


def column_kinds(columns: datasets.Dataset) -> dict[str, str]:
    """The columns that captions can be made of: text, texts (lists of them), or number."""
    kinds = {}
    for name, feature in columns.features.items():
        inner = getattr(feature, "feature", None)
        dtype = getattr(inner if inner is not None else feature, "dtype", "")
        if isinstance(feature, datasets.ClassLabel) or dtype in ("string", "large_string"):
            kinds[name] = "text" if inner is None else "texts"
        elif inner is None and re.fullmatch(r"u?int\d+|float\d+|bool", dtype):
            kinds[name] = "number"
    return kinds


def text_columns(kinds: Mapping[str, str], config: DataConfig) -> list[str]:
    """The columns of captions that a config names, or else `text` if it is there."""
    named = config.text_column
    if named is None:
        usual = config.caption_template is None and kinds.get(TEXT_COLUMN) in ("text", "texts")
        return [TEXT_COLUMN] if usual else []
    return [named] if isinstance(named, str) else list(named)


def known_rows(columns: datasets.Dataset, indices: Sequence[int]) -> list[str]:
    """What is known about pictures, each as a JSON object of the columns in `column_kinds`."""
    if not (kinds := column_kinds(columns)):
        return ["{}"] * len(indices)  # a table without columns has no rows either
    chosen = columns.select_columns(list(kinds))
    names = {n: f.names for n, f in chosen.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = chosen.with_format("arrow")[list(indices)].to_pylist()
    for row in rows:
        for name, known in names.items():
            value = row[name]
            row[name] = None if value is None or value < 0 else known[value]
    return [json.dumps({n: v for n, v in row.items() if _is_known(v)}) for row in rows]


def sha256_of(rows: Sequence[str]) -> str:
    """sha256 over rows of JSON."""
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _texts(value: Any) -> list[str]:
    """The texts of a value of a column."""
    if isinstance(value, float) and value.is_integer():  # a CSV column of whole numbers with gaps
        value = int(value)
    values = value if isinstance(value, list) else [value]
    return [str(one) for one in values if one is not None]
