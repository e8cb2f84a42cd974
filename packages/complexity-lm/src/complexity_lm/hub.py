"""Access to the Hub and to files, with errors that are one line for the user."""

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from inl_core.run.errors import UserError
from inl_core.run.hub import is_offline, unreachable


def locate(name: str, hint: str, wanted: str | None = None) -> Path | None:
    """Return the path that a name means, or None for a Hub id, once the Hub has answered.

    A name is a path if such a folder exists, or if it begins with ".", "/" or "~". For a Hub id the
    front page of the Hub is requested first, because without a network the libraries would retry
    for 23 s; with ``HF_HUB_OFFLINE=1`` it is not, and the cache is used.

    Raises:
        UserError: It is a Hub id and the Hub does not answer: "WANTED: cannot reach ...; HINT".
    """
    if os.path.isdir(name) or name.startswith((".", "/", "~")):
        return Path(name).expanduser()
    if is_offline():
        return None
    if (problem := unreachable()) is None:
        return None
    raise UserError(
        f"{wanted or name}: {problem}; {hint}, or set HF_HUB_OFFLINE=1 if it is in the cache of "
        "this machine"
    )


@contextmanager
def report_errors(
    action: str, hint: str = "", kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Translate errors of libraries into one line.

    By default all errors: transformers, tokenizers and safetensors raise almost any type.

    Raises:
        UserError: "ACTION: first line of the innermost cause; HINT".
    """
    try:
        yield
    except kinds as error:
        message = f"{action}: {first_line(error)}"
        raise UserError(f"{message}; {hint}" if hint else message) from error


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause: errors of the Hub wrap each other in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_text(path: Path) -> str:
    """Read a UTF-8 file without translating line ends.

    Raises:
        UserError: The file cannot be read or is not UTF-8.
    """
    with open_text(path) as file:
        return decode_text(path, file.read())


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for its bytes.

    Raises:
        UserError: The file cannot be opened, or read inside the `with` statement.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def decode_text(path: Path, data: bytes, begin: int = 0, final: bool = True) -> str:
    """Decode the bytes of a UTF-8 file from `begin` on; half a character may end all but the last.

    Raises:
        UserError: They are not UTF-8; names the byte and its place in the file.
    """
    try:
        return codecs.utf_8_decode(data, "strict", final)[0]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {begin + error.start}; "
            "convert it with iconv -t UTF-8 (or exclude it from a folder with --data.files)"
        ) from error
