"""Where text comes from: ``stdlib``, ``text:PATH`` and ``hub:NAME``, as documents.

* ``stdlib``: the Python standard library's own source on this machine, one file a document, in the
  order of the paths. Left out: tests (folders ``test``, ``tests``, ``idle_test``), installed
  packages (``site-packages``, ``dist-packages``), and what is data rather than code: the character
  tables of ``encodings``, the help texts of ``pydoc_data``, and ``_sysconfigdata*`` (it holds paths
  of this machine). The rest differs between Python versions, which the fingerprint of an evaluation
  shows.
* ``text:PATH``: a UTF-8 file, or the files of a folder.
* ``hub:NAME``: a data set of the hub, streamed. NAME may also be a local folder that ``datasets``
  can read (parquet, json lines).

Text is taken as it is: no stripping, no normalisation, so a document's bytes can be counted.
"""

import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from complexity_lm.hub import first_line, is_local, require_hub
from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)

PIECE_BYTES = 8192
"""Length of the pieces that a source of a single file is cut into."""

_NOT_CODE = ("encodings", "pydoc_data")
_NOT_OURS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_FORMS = "stdlib, text:PATH or hub:NAME"


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str


def is_streamed(source: str) -> bool:
    """Whether a source is read as a stream and not into memory."""
    return source.startswith("hub:")


def read_documents(source: str, files: str, piece_bytes: int | None) -> list[Document]:
    """Read a local source into memory, in a fixed order.

    Args:
        source: ``stdlib`` or ``text:PATH``.
        files: Glob of the files to read below a ``text:`` folder; hidden files are never read.
        piece_bytes: Cut files into pieces of about this many bytes, at line ends; 0 keeps files
            whole; None cuts a source of one file into `PIECE_BYTES` and keeps several whole.

    Returns:
        The documents that are not empty.

    Raises:
        UserError: The source has another form, is not there, is empty or is not UTF-8.
    """
    scheme, _, name = source.partition(":")
    if source == "stdlib":
        paths, root = _stdlib_files()
    elif scheme == "text" and name:
        paths, root = _text_files(name, files)
    else:
        raise UserError(f"source is {source!r}; expected {_FORMS}")
    documents = [_read(path, str(path.relative_to(root))) for path in paths]
    documents = [document for document in documents if document.text]
    if not documents:
        raise UserError(f"{source}: the {len(paths)} file(s) found hold no text")
    if piece_bytes is None and len(documents) == 1 and source != "stdlib":
        piece_bytes = PIECE_BYTES
        logger.info("%s: one file, cut into documents of about %d bytes", source, piece_bytes)
    if piece_bytes:
        documents = [piece for document in documents for piece in _pieces(document, piece_bytes)]
    return documents


def _stdlib_files() -> tuple[list[Path], Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        data = parts[0] in _NOT_CODE or path.name.startswith("_sysconfigdata")
        if not data and _NOT_OURS.isdisjoint(parts):
            found.append(path)
    if not found:
        raise UserError(
            f"stdlib: there is no Python source in {root} (some systems install it separately); "
            "use text:PATH"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix()), root


def _text_files(name: str, pattern: str) -> tuple[list[Path], Path]:
    target = Path(name).expanduser()
    if target.is_file():
        return [target], target.parent
    if not target.is_dir():
        raise UserError(f"text:{name}: there is no such file or folder")
    found = [
        path
        for path in target.rglob("*")
        if path.is_file()
        and fnmatch(path.relative_to(target).as_posix(), pattern)
        and not any(part.startswith(".") for part in path.relative_to(target).parts)
    ]
    if not found:
        raise UserError(f"text:{name}: no file in the folder matches {pattern!r}")
    return sorted(found, key=lambda path: path.relative_to(target).as_posix()), target


def _read(path: Path, name: str) -> Document:
    try:
        return Document(name, path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert it (iconv -t UTF-8), or leave it out with --data.files"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _pieces(document: Document, size: int) -> Iterator[Document]:
    piece: list[str] = []
    length = count = 0
    for line in document.text.splitlines(keepends=True):
        piece.append(line)
        length += len(line.encode())
        if length >= size:
            yield Document(f"{document.name}[{count}]", "".join(piece))
            piece, length, count = [], 0, count + 1
    if piece:
        yield Document(f"{document.name}[{count}]", "".join(piece))


def stream_documents(
    source: str, subset: str | None, split: str, text_column: str
) -> datasets.IterableDataset:
    """Open a streamed source; rows have the one column ``text``.

    Args:
        source: ``hub:NAME``.
        subset: Configuration of the data set, such as "sample-10BT"; None for its only one.
        split: Its split.
        text_column: The column that holds the text.

    Raises:
        UserError: No network, no such data set, or no such column.
    """
    name = source.partition(":")[2]
    if not name:
        raise UserError(f"source is {source!r}; expected {_FORMS}")
    if not is_local(name):
        require_hub(source, "download it elsewhere and use hub:FOLDER or text:PATH")
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
        first = next(iter(rows), None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"cannot read {source} (subset {subset}, split {split}): {first_line(error)}; download "
            "it elsewhere and use hub:FOLDER or text:PATH"
        ) from error
    if first is None:
        raise UserError(f"{source}: its split {split} has no rows")
    if not isinstance(first.get(text_column), str):
        raise UserError(
            f"{source}: no text in column {text_column!r} (its columns: {', '.join(first)}); set "
            "--data.text_column"
        )
    rows = rows.select_columns(text_column)
    return rows if text_column == "text" else rows.rename_column(text_column, "text")
