"""Checksums of a folder's files: what a disk, a copy or a stray hand did to them is named.

`SHA256SUMS` has the form that coreutils writes, so `sha256sum -c SHA256SUMS` checks a folder too.
Its first line, a comment there, counts the files: a list that lost its end is noticed.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_THREADS = 4


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` of all files in a folder and below it; the last thing written there."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / SUMS_FILE
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda name: _sha256(folder / name), names))
    lines = [f"# SHA-256 of {len(names)} files"]
    lines += [f"{digest}  {name}" for digest, name in zip(sums, names, strict=True)]
    (folder / SUMS_FILE).write_text("\n".join(lines) + "\n")


def damage(folder: Path, part: Path = Path()) -> list[str]:
    """What is wrong with the files that `SHA256SUMS` lists.

    Args:
        folder: Where `write_sums` wrote.
        part: A folder below it, whose files alone are compared; all by default.

    Returns:
        A phrase a damaged file, none where all are whole. A folder without the file was
        written before there were any and has nothing to compare with: none either.
    """
    if not (folder / SUMS_FILE).exists():
        return []
    try:
        wanted = _read_sums(folder)
    except (OSError, ValueError) as error:
        return [f"{SUMS_FILE} cannot be read ({error})"]
    names = [name for name in wanted if Path(name).is_relative_to(part)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _wrong(folder / name, name, wanted[name]), names)
        return [phrase for phrase in found if phrase]


def _read_sums(folder: Path) -> dict[str, str]:
    """Digest by name; ValueError for what `write_sums` did not write."""
    head, *lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines() or [""]
    wanted: dict[str, str] = {}
    for line in lines:
        parts = _LINE.fullmatch(line)
        if not parts:
            raise ValueError(f"{line[:80]!r} is no line of sha256sum")
        path = PurePosixPath(parts[2])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{parts[2][:80]!r} is outside of the folder")
        wanted[parts[2]] = parts[1]
    if head != f"# SHA-256 of {len(wanted)} files":
        raise ValueError(f"{head[:80]!r} stands above {len(wanted)} files")
    return wanted


def _wrong(path: Path, name: str, digest: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        found = _sha256(path)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return None if found == digest else f"{name} is not what was written (SHA-256 {found[:12]}…)"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
