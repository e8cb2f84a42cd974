"""Sources of text, read as documents: ``stdlib``, ``text:PATH`` and ``hub:NAME``.

* ``stdlib``: the source code of Python's standard library on this machine, one document per file,
  ordered by path. It excludes tests (folders ``test``, ``tests``, ``idle_test``), installed
  packages (``site-packages``, ``dist-packages``), and data in the form of code: the character
  tables of ``encodings``, the help texts of ``pydoc_data``, and ``_sysconfigdata*`` (which contains
  paths of the machine). It differs between Python versions; the fingerprint of an evaluation shows
  that.
* ``text:PATH``: a UTF-8 file, or the files of a folder; links to files elsewhere are refused.
* ``hub:NAME``: a dataset of the Hub, streamed. NAME may also be a local folder that ``datasets``
  can read (parquet, JSON lines, CSV, text); files outside of it, which its card may name, are not
  read.

Text is not stripped or normalised, so that the bytes of a document can be counted. Rows of a
dataset without text (null) are left out.
"""

import logging
import sys
import sysconfig
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import datasets
from datasets.exceptions import DatasetsError

from complexity_lm.hub import decode_text, locate, open_text, read_text, report_errors
from inl_core.run.dataset_files import check_card, check_data_files, check_inside
from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)

PACKING = 2
"""Version of the way from text to blocks. A checkpoint names it, and a run that is resumed goes on
with its own. Version 1, of checkpoints that name none, keeps lines of any length whole and reads
the name of a special token in a document as the token."""

PIECE_BYTES = 8192
"""Length of the pieces that a single file is cut into."""

_LONGEST_LINE = 4
"""A line longer than this many pieces is cut inside, after a space if it has one."""

_DATA_FOLDERS = ("encodings", "pydoc_data")
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_READERS = ("parquet", "json", "csv", "text", "arrow")
_FORMS = "stdlib, text:PATH or hub:NAME"
_HUB_HINT = "download it elsewhere and use hub:FOLDER or text:PATH"


@dataclass(frozen=True)
class Document:
    """A text and the name of the file that it was read from."""

    name: str
    text: str


def is_streamed(source: str) -> bool:
    """Whether a source is streamed instead of read into memory."""
    return source.startswith("hub:")


def read_documents(
    source: str,
    files: str,
    piece_bytes: int | None,
    packing: int = PACKING,
    separator: str | None = None,
) -> Iterator[Document]:
    """Read ``stdlib`` or ``text:PATH`` one document after the other, in a fixed order.

    `files`, `piece_bytes` and `separator` are those of `DataConfig`, `packing` is the version
    (`PACKING`). Hidden files and empty documents are left out. A file that is cut is never in
    memory as a whole.

    Raises:
        UserError: The source has another form, does not exist, is empty or is not UTF-8, or no file
            has the separator.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        filled = [path for path in _stdlib_files(root) if path.stat().st_size]
    else:
        root, filled = text_files(source, files)
    if piece_bytes is None and separator is None and len(filled) == 1 and source != "stdlib":
        piece_bytes = PIECE_BYTES
        logger.info("%s: a single file, cut into documents of about %d bytes", source, piece_bytes)
    separated = False
    for path in filled:
        name = str(path.relative_to(root))
        if piece_bytes or separator is not None:
            size = piece_bytes or sys.maxsize
            longest = _LONGEST_LINE * size if piece_bytes and packing > 1 else sys.maxsize
            separated |= yield from _pieces(name, path, size, longest, separator)
        else:
            yield Document(name, read_text(path))
    if separator is not None and not separated:
        raise UserError(
            f"{source}: no line of its {len(filled)} file(s) is {separator!r}; correct "
            "--data.document_separator, or set it to null"
        )


def _stdlib_files(root: Path) -> list[Path]:
    paths = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        is_data = parts[0] in _DATA_FOLDERS or path.name.startswith("_sysconfigdata")
        if not is_data and _EXCLUDED_FOLDERS.isdisjoint(parts):
            paths.append(path)
    if not paths:
        raise UserError(
            f"stdlib: {root} contains no Python source (some systems install it separately); use "
            "text:PATH"
        )
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def text_files(source: str, pattern: str) -> tuple[Path, list[Path]]:
    """The folder of ``text:PATH`` and the files in it that have content, in a fixed order.

    Raises:
        UserError: The source has another form, does not exist or is empty.
    """
    scheme, _, name = source.partition(":")
    if scheme != "text" or not name:
        raise UserError(f"source is {source!r}; expected {_FORMS}")
    root, paths = _matching_files(name, pattern)
    filled = [path for path in paths if path.stat().st_size]
    if not filled:
        raise UserError(f"{source}: the {len(paths)} file(s) contain no text")
    return root, filled


def _matching_files(name: str, pattern: str) -> tuple[Path, list[Path]]:
    target = Path(name).expanduser()
    if target.is_file():
        return target.parent, [target]
    if not target.is_dir():
        raise UserError(f"text:{name}: no such file or folder")
    paths = {path.relative_to(target).as_posix(): path for path in target.rglob("*")}
    names = sorted(
        name
        for name, path in paths.items()
        if path.is_file()
        and fnmatch(name, pattern)
        and not any(part.startswith(".") for part in name.split("/"))
    )
    if not names:
        raise UserError(f"text:{name}: no file in the folder matches {pattern!r}")
    check_inside((str(paths[name]) for name in names), target)
    return target, [paths[name] for name in names]


def _pieces(
    name: str, path: Path, size: int, longest: int, separator: str | None
) -> Generator[Document, None, bool]:
    """The documents of a file that is cut; returns whether it has the separator."""
    piece: list[str] = []
    length = count = 0
    separated = False
    for line in _lines(path, longest):
        is_end = separator is not None and line.strip() == separator.strip()
        separated |= is_end
        if not is_end:
            piece.append(line)
            length += len(line.encode())
        if piece and (is_end or length >= size):
            yield Document(f"{name}[{count}]", "".join(piece))
            piece, length, count = [], 0, count + 1
    if piece:
        yield Document(f"{name}[{count}]", "".join(piece))
    return separated


def _lines(path: Path, longest: int) -> Iterator[str]:
    """The lines of a file as `str.splitlines` cuts them, those above `longest` bytes cut again."""
    longest = max(longest, 8)  # a whole character and the end of its line
    begin, data = 0, b""  # what is not yet a line, and where it begins in the file
    with open_text(path) as file:
        while chunk := file.readline(longest - len(data)):
            data += chunk
            is_whole = data.endswith(b"\n") or len(data) < longest
            text = decode_text(path, data, begin, is_whole)
            if is_whole:
                lines = text.splitlines(keepends=True)
            else:
                # The end may be half a line end.
                lines = text.removesuffix("\r").splitlines(keepends=True)
                if len(lines) > 1:
                    lines.pop()
                elif end := lines[0].rfind(" ") + 1:
                    lines[0] = lines[0][:end]
            yield from lines
            taken = len("".join(lines).encode())
            begin, data = begin + taken, data[taken:]
        if data:
            yield from decode_text(path, data, begin, True).splitlines(keepends=True)


def stream_documents(
    source: str, subset: str | None, split: str, column: str, kind: type = str
) -> datasets.IterableDataset:
    """Open a streamed source, ``hub:NAME``; rows have the single column ``text``.

    Of another kind than str, such as a list of messages, the column keeps its name.

    Raises:
        UserError: There is no network, no such dataset, or no such column.
    """
    name = source.partition(":")[2]
    if not name:
        raise UserError(f"source is {source!r}; expected {_FORMS}")
    folder = locate(name, _HUB_HINT, source)
    if folder is not None:
        check_card(folder)
    kinds = (OSError, ValueError, RuntimeError, DatasetsError)
    failure = f"cannot read {source} (subset {subset}, split {split})"
    with report_errors(failure, _HUB_HINT, kinds):
        builder = datasets.load_dataset_builder(str(folder or name), subset)
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in _READERS:
        raise UserError(
            f"{source} has files of the kind {reader!r}; text is read from {', '.join(_READERS)}"
        )
    check_data_files(builder.config.data_files, name, folder)
    with report_errors(failure, _HUB_HINT, kinds):
        # Without decoding: a picture or sound of a row may be a path of any file.
        rows = cast(datasets.IterableDataset, builder.as_streaming_dataset(split=split))
        rows = rows.decode(False)
        first = next(iter(rows), None)
        if first is not None and first.get(column, "") is None:
            first = next((row for row in rows if row[column] is not None), first)
    if first is None:
        raise UserError(f"{source}: split {split} has no rows")
    if not isinstance(first.get(column), kind):
        what, option = ("text", "text_column") if kind is str else ("messages", "messages_column")
        raise UserError(
            f"{source}: no {what} in column {column!r} (its columns: {', '.join(first)}); set "
            f"--data.{option}"
        )
    rows = rows.select_columns(column)
    return rows if kind is not str or column == "text" else rows.rename_column(column, "text")
