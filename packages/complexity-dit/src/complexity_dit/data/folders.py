"""Folders of pictures: which files are pictures, and which labels they have.

The rules are those of `docs/tutorials/own-paintings.md`, section 1. `datasets` has others for its
`imagefolder`: it drops all labels for one picture at another depth, makes labels of splits, takes
None and 001 in a table for no value and 1, and drops pictures without saying so.
"""

import csv
import io
import logging
import os
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher

from complexity_dit.pictures import SUFFIXES
from inl_core.run.errors import UserError
from inl_core.run.files import open_regular, read_bytes
from inl_core.run.json_files import parse_json

SPLIT_FOLDERS = frozenset(
    {"train", "training", "test", "testing", "eval", "evaluation", "val", "valid", "validation",
     "dev"}
)  # fmt: skip
"""Names of folders, in lower case, that are splits and not labels."""

MAX_TABLE_BYTES = 2**30

log = logging.getLogger(__name__)

_TABLE_NAMES = ("metadata", "labels")  # the second only if there is none of the first
_TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
_FILE_COLUMN = "file_name"
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_TRUE, _FALSE = ("True", "TRUE", "true"), ("False", "FALSE", "false")
_NO_NUMBER = frozenset({"NA", "N/A", "n/a", "<NA>", "NaN", "nan", "NULL", "null", "None"})


@dataclass(frozen=True)
class File:
    """A file in a folder of pictures, or in an archive there.

    Attributes:
        place: Names of the folders below the root, then of the file.
        path: Where it is read: a path, or `zip://MEMBER::ARCHIVE`.
        stamp: Changes when the content does: size, times and inode; of a member also its checksum.
    """

    place: tuple[str, ...]
    path: str
    stamp: tuple[int, ...]

    @property
    def suffix(self) -> str:
        """The ending of the name, in lower case."""
        return _suffix(self.place[-1])


@dataclass(frozen=True)
class PictureTable:
    """The pictures of a folder.

    Attributes:
        paths: Of every row, as bytes, since file names need not be text; None if the row has none.
        columns: What labels are read from, with the same rows.
        key: Changes with the files.
        left_out: What was not taken, as "NUMBER REASON".
    """

    paths: list[bytes | None]
    columns: datasets.Dataset
    key: str
    left_out: list[str]


def scan(folder: Path, left_out: Counter[str]) -> list[File]:
    """List the files of a folder and of the folders below it, in the order of their paths.

    Args:
        folder: The folder. A folder to which several links lead, or a link upwards, is read once.
        left_out: Counts hidden pictures and folders that cannot be read.
    """
    above = [folder.resolve(), *folder.resolve().parents]
    seen = {(status.st_dev, status.st_ino) for status in (path.stat() for path in above[1:])}
    files: list[File] = []
    plain: list[tuple[str, ...]] = [()]
    links: list[tuple[str, ...]] = []
    while plain or links:
        # Real folders come first, so that a link is what is left out.
        place = plain.pop() if plain else links.pop(links.index(min(links)))
        path = os.path.join(folder, *place)
        try:
            status = os.stat(path)
            entries = list(os.scandir(path))
        except OSError:
            left_out["unreadable folder(s)"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out["link(s) to a folder that is read already or lies above"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        if os.path.islink(path):
            log.info("reading the linked folder %s", as_text(path))
        for entry in entries:
            inner, is_folder = (*place, entry.name), os.path.isdir(entry.path)
            if _is_hidden(inner[-1:], is_folder):
                hidden = "hidden folder(s)" if is_folder else "hidden picture(s)"
                left_out[hidden] += is_folder or _suffix(entry.name) in SUFFIXES
            elif is_folder:
                (links if entry.is_symlink() else plain).append(inner)
            else:
                files.append(File(inner, entry.path, _stamp(entry.path)))
    return sorted(files, key=lambda file: file.path)


def picture_files(folder: Path) -> list[File]:
    """The pictures of a folder and of the folders below it, without those in archives."""
    return [file for file in scan(folder, Counter()) if file.suffix in SUFFIXES]


def read_folder(source: str, image_column: str | None) -> PictureTable:
    """Read which pictures a folder has, and what is known about each.

    Args:
        source: The folder.
        image_column: For a table with several columns of files (`file_name`, `mask_file_name`):
            which of them (`image`, `mask`).

    Raises:
        UserError: It is not a folder, has no pictures, or a table cannot be read.
    """
    folder = Path(source).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(
            f"imagefolder:{source}: {folder} is not a folder; give one with images in it"
        )
    left_out: Counter[str] = Counter()
    files = scan(folder, left_out)
    members = [m for file in files if file.suffix == ".zip" for m in _members(file, left_out)]
    files = [*files, *members]
    pictures = [file for file in files if file.suffix in SUFFIXES]
    tables = _tables(files)
    if tables:
        parts = [(file, _read_table(file)) for file in tables]
        named = dict.fromkeys(name for _, part in parts for name in _file_columns(part))
        choice = {name: [p for t in parts for p in _paths(*t, name)] for name in named}
        paths = choice[pick_column(choice, image_column)]
        columns = _joined([part for _, part in parts])
        names = " or ".join(sorted({as_text(file.place[-1]) for file in tables}))
        if not paths:
            raise UserError(f"imagefolder:{source}: {names} lists no pictures")
        listed = {path for column in choice.values() for path in column}
        left_out[f"not listed in {names}"] = sum(file.path not in listed for file in pictures)
    else:
        if not pictures:
            raise UserError(f"imagefolder:{source}: there are no images in {folder}")
        pick_column(["image"], image_column)
        paths = [file.path for file in pictures]
        columns = _folder_labels([file.place[:-1] for file in pictures])
    others = Counter(
        file.suffix or "without ending"
        for file in files
        if file not in tables and file.suffix not in {*SUFFIXES, ".zip"}
    )
    if others:
        endings = ", ".join(name for name, _ in others.most_common(3))
        left_out[f"other file(s) ({endings}{', …' if len(others) > 3 else ''})"] = others.total()
    stamps = {file.path: file.stamp for file in files}
    raw = [None if path is None else _encoded(path) for path in paths]
    key = Hasher.hash([raw, [stamps.get(p) or _stamp(p) if p else None for p in paths]])
    counts = [f"{count} {reason}" for reason, count in left_out.items() if count]
    return PictureTable(raw, columns, key, counts)


def pick_column(columns: Iterable[str], wanted: str | None, others: Iterable[str] = ()) -> str:
    """Choose the column of pictures: the one that is wanted, `image`, or the only one.

    Raises:
        UserError: There is no such column, or several and none is wanted.
    """
    columns = list(columns)
    if wanted is None and "image" in columns:
        return "image"
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted in columns:
        return str(wanted)
    problem = "no image_column is set" if wanted is None else f"image_column {wanted!r} is not one"
    among = f" among {list(others)}" if others else ""
    raise UserError(f"the image columns of the data are {columns}{among}; {problem}")


def _is_hidden(place: tuple[str, ...], is_folder: bool = False) -> bool:
    folders = place if is_folder else place[:-1]
    return any(n.startswith(".") for n in place) or any(n.startswith("__") for n in folders)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _stamp(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a broken link; a null character in a name
        return ()
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _open_archive(path: str) -> IO[bytes]:
    return open_regular(Path(path), follow_links=True)


def _members(archive: File, left_out: Counter[str]) -> list[File]:
    try:
        with _open_archive(archive.path) as handle, zipfile.ZipFile(handle) as file:
            found = [info for info in file.infolist() if not info.is_dir()]
    except Exception as error:  # zipfile raises almost any on broken bytes
        raise UserError(f"{as_text(archive.path)} cannot be read as a zip file: {error}") from error
    members = []
    for info in found:
        place = tuple(info.filename.split("/"))
        if _is_hidden(place):
            left_out["hidden picture(s)"] += _suffix(place[-1]) in SUFFIXES
            continue
        path = f"zip://{info.filename}::{archive.path}"
        stamp = (*archive.stamp, info.file_size, info.CRC)
        members.append(File((*archive.place[:-1], *place), path, stamp))
    return sorted(members, key=lambda member: member.path)


def _folder_labels(folders: list[tuple[str, ...]]) -> datasets.Dataset:
    """The column `label`, or none, of pictures in these folders below the root."""
    columns: dict[str, Any] = {"image": pa.nulls(len(folders))}
    features: dict[str, Any] = {"image": datasets.Value("null")}
    while first := {place[0] for place in folders if place}:
        if len(first) > 1:
            if not {name.lower() for name in first} <= SPLIT_FOLDERS:
                break
            log.info("joining its splits %s", ", ".join(sorted(first)))
        folders = [place[1:] for place in folders]
    if first:
        labels = [as_text(place[0]) if place else None for place in folders]
        names = sorted({label for label in labels if label is not None})
        ids = {name: number for number, name in enumerate(names)}
        columns["label"] = [None if label is None else ids[label] for label in labels]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


# Tables


def _tables(files: list[File]) -> list[File]:
    for name in _TABLE_NAMES:
        found = [
            file for file in files
            if file.suffix in _TABLE_SUFFIXES and file.place[-1].lower() == name + file.suffix
        ]  # fmt: skip
        if name == "labels":  # a common name for other things
            found = [file for file in found if _names_files(file)]
        if found:
            return found
    return []


def _names_files(file: File) -> bool:
    try:
        return bool(_file_columns(_read_table(file)))
    except UserError:
        return False


def _read_table(file: File) -> dict[str, list[Any]]:
    """The columns of a table.

    Raises:
        UserError: It cannot be read, or (`metadata` only) has no column of files.
    """
    name = as_text(file.path)
    try:
        data = _table_bytes(file)
        if file.suffix == ".csv":
            columns = _read_csv(data.decode("utf-8-sig"))
        elif file.suffix == ".jsonl":
            columns = _read_jsonl(data)
        else:
            import pyarrow.parquet as pq

            columns = pq.read_table(io.BytesIO(data)).to_pydict()
    # pyarrow, csv and zipfile have exceptions of their own.
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read {name}: {message}; correct or remove it") from error
    spelt = {n.strip().lower().replace(" ", "_"): n for n in reversed(columns)}
    other = spelt.get(_FILE_COLUMN) or spelt.get("filename")
    if other is not None:
        columns = {(_FILE_COLUMN if n == other else n): v for n, v in columns.items()}
    if file.place[-1].lower().startswith("metadata") and not _file_columns(columns):
        raise UserError(
            f"{name} has the columns {', '.join(columns) or '(none)'}; one must be {_FILE_COLUMN}, "
            "the pictures' paths from its folder"
        )
    return columns


def _table_bytes(file: File) -> bytes:
    member, joint, archive = file.path.removeprefix("zip://").rpartition("::")
    if not joint:
        return read_bytes(Path(file.path), MAX_TABLE_BYTES, follow_links=True)
    with _open_archive(archive) as handle, zipfile.ZipFile(handle) as opened:
        if (size := opened.getinfo(member).file_size) > MAX_TABLE_BYTES:
            raise ValueError(f"it has {size} bytes; the limit is {MAX_TABLE_BYTES}")
        return opened.read(member)


def _read_csv(text: str) -> dict[str, list[Any]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(rows, [])
    names = [name for name in header if name]  # pandas writes its row numbers without a name
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"it has two columns {repeated[0]!r}")
    cells: list[list[str]] = [[] for _ in header]
    for row in rows:
        if len(row) > len(header):
            raise ValueError(f"line {rows.line_num} has {len(row)} cells, the first {len(header)}")
        for i, column in enumerate(cells if row else []):
            column.append(row[i] if i < len(row) else "")
    pairs = zip(header, cells, strict=True)
    return {n: c if _is_file_column(n) else _typed(c) for n, c in pairs if n}


def _typed(cells: list[str]) -> list[Any]:
    """Numbers if all cells of a column are some, else their text; None for an empty one."""
    values = [cell for cell in cells if cell.strip() and cell not in _NO_NUMBER]
    kind: Any = str
    if values and all(_INTEGER.fullmatch(value) for value in values):
        kind = int
    elif values and all(_NUMBER.fullmatch(value) for value in values):
        kind = float
    elif values and all(value in (*_TRUE, *_FALSE) for value in values):
        kind = _TRUE.__contains__
    if kind is str:
        return [cell or None for cell in cells]
    return [kind(cell) if cell.strip() and cell not in _NO_NUMBER else None for cell in cells]


def _read_jsonl(data: bytes) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    count = 0
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object")
        for name, value in row.items():
            columns.setdefault(name, [None] * count).append(value)
        count += 1
        for column in columns.values():
            column.extend([None] * (count - len(column)))
    return columns


def _is_file_column(name: str) -> bool:
    plain = name.strip().lower().replace(" ", "_")
    return plain == "filename" or plain == _FILE_COLUMN or name.endswith("_" + _FILE_COLUMN)


def _file_columns(table: dict[str, list[Any]]) -> dict[str, str]:
    """What a column of pictures is called, and the column of their files."""
    names = [name for name in table if name == _FILE_COLUMN or name.endswith("_" + _FILE_COLUMN)]
    return {name.removesuffix(_FILE_COLUMN).removesuffix("_") or "image": name for name in names}


def _paths(file: File, table: dict[str, list[Any]], column: str) -> list[str | None]:
    """The paths that a table names, as `File.path` writes them."""
    names = table.get(_file_columns(table).get(column, ""), [None] * _length(table))
    return [_beside(file.path, name) if isinstance(name, str) and name else None for name in names]


def _beside(table: str, name: str) -> str:
    member, joint, archive = table.rpartition("::")
    if not joint:
        return os.path.normpath(os.path.join(os.path.dirname(table), name))
    inside = posixpath.join(posixpath.dirname(member.removeprefix("zip://")), name)
    return f"zip://{posixpath.normpath(inside)}::{archive}"


def _length(table: dict[str, list[Any]]) -> int:
    return len(next(iter(table.values()), []))


def _joined(tables: list[dict[str, list[Any]]]) -> datasets.Dataset:
    """The columns of all tables but those of files; a column that a table lacks is empty there."""
    names = dict.fromkeys(
        name for table in tables for name in table if name not in _file_columns(table).values()
    )
    columns: dict[str, pa.Array] = {"image": pa.nulls(sum(map(_length, tables)))}
    for name in names:
        values = [v for table in tables for v in table.get(name, [None] * _length(table))]
        values = [as_text(v) if isinstance(v, str) else v for v in values]
        try:
            column = pa.array(values)
            datasets.Features.from_arrow_schema(pa.schema({"column": column.type}))
        except (pa.ArrowException, OverflowError, TypeError, ValueError):  # such as mixed types
            column = pa.array([None if v is None else as_text(str(v)) for v in values])
        columns[as_text(name).replace("\0", "\\0")] = column  # Arrow would end the name there
    return datasets.Dataset(pa.table(columns))


def as_text(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 are written in hexadecimal."""
    return _encoded(name).decode("utf-8", "backslashreplace")


def _encoded(name: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair, from JSON
        return name.encode("utf-8", "backslashreplace")
