"""A small file-system shim: Python's file operations fail as a broken disk makes them fail.

Python tells its audit hooks of every open, rename, removal and making of a folder before it does
it, and a hook that raises prevents it. Hooks cannot be taken away again, so there is one, and
`failing` sets what it does. What native code opens (safetensors) Python does not see: there
`small_files` sets the operating system's own limit.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
_rule: Callable[[str, str, bool], OSError | None] | None = None
_hooked = False


def _hook(event: str, arguments: tuple) -> None:
    global _rule
    rule = _rule
    if rule is None or not (event == "open" or event in CHANGES):
        return
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return  # a descriptor that is open already
    if event == "open":
        flags = arguments[2] or 0
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        writes = True
    _rule = None  # the rule may look at files itself
    try:
        error = rule(event, os.fsdecode(path), writes)
    finally:
        _rule = rule
    if error is not None:
        raise error


@contextmanager
def failing(rule: Callable[[str, str, bool], OSError | None]) -> Iterator[None]:
    """While it is entered, an operation for which `rule(event, path, writes)` is an error fails."""
    global _rule, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _rule = rule
    try:
        yield
    finally:
        _rule = None


def below(folder: Path, number: int, reads: bool = False) -> Callable:
    """A rule: everything that writes (or, with `reads`, opens) below a folder fails with errno."""

    def rule(event: str, path: str, writes: bool) -> OSError | None:
        concerned = writes != reads if event == "open" else not reads
        if concerned and Path(os.path.abspath(path)).is_relative_to(folder):
            return OSError(number, os.strerror(number), path)
        return None

    return rule


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """While it is entered, no file can grow beyond so many bytes, whoever writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
