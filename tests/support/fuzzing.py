"""Fuzzing one parser for a while: inputs by hypothesis, what came out, how much of it was reached.

The rule for every parser: any bytes give a value or an error that is meant for the user. Anything
else (another exception, a case that takes long, memory that grows without bound) is a finding, and
hypothesis prints the input that shows it.
"""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

SECONDS = float(os.environ.get("COMPLEXITY_FUZZ_SECONDS", "10"))
"""How long each parser is fuzzed."""

LOG = os.environ.get("COMPLEXITY_FUZZ_LOG")
"""File that gets one JSON line a parser; none if unset."""

MEMORY = 2 * 2**30
"""Bytes that a parser may take beyond what the process has at the start."""

CASE_SECONDS = 20.0
"""A single input that takes longer is a finding; the machine may be busy, so this is generous."""

_ROUND = 50  # inputs between two looks at the clock


class Slow(Exception):
    """An input kept a parser busy for longer than `CASE_SECONDS`."""


@dataclass
class Fuzzed:
    """What a parser did.

    Attributes:
        parser: Its name.
        executions: Inputs it was given.
        values: How many of them gave a value.
        seconds: How long that took.
        outcomes: Kinds of ends: a value, or an error without its particulars.
        slowest: Seconds of the slowest input.
        covered: Lines of its modules that ran, once the parser was given inputs.
        lines: Lines that they have, functions and methods only.
    """

    parser: str
    executions: int = 0
    values: int = 0
    seconds: float = 0.0
    outcomes: set[str] = field(default_factory=set)
    slowest: float = 0.0
    covered: int = 0
    lines: int = 0

    def as_row(self) -> dict[str, Any]:
        row = self.__dict__ | {"outcomes": len(self.outcomes)}
        return row | {"seconds": round(self.seconds, 1), "slowest": round(self.slowest, 2)}


def fuzz(name: str, parser: "Parser") -> Fuzzed:
    """Give a parser inputs for `SECONDS`; raise what it raises that is not expected."""
    done, coverage = Fuzzed(name), Coverage(parser.modules)

    def one(case: Any) -> None:
        begun = time.perf_counter()
        done.executions += 1
        try:
            # Tracing costs more than many a parser: after a while every fifth input is enough.
            is_traced = done.executions < _ROUND or done.executions % 5 == 0
            with coverage if is_traced else contextlib.nullcontext():
                parser.parse(case)
        except parser.expected as error:
            done.outcomes.add(kind_of(error))
        else:
            done.values += 1
            done.outcomes.add("a value")
        took = time.perf_counter() - begun
        done.slowest = max(done.slowest, took)
        if took > CASE_SECONDS:
            raise Slow(f"{took:.1f} s")

    begun = time.perf_counter()
    with limited_memory(MEMORY):
        for number in range(10**9):
            if time.perf_counter() - begun >= SECONDS and number:
                break
            settings(
                max_examples=_ROUND,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],  # shrinking takes minutes where a parser is slow
            )(seed(number)(given(parser.cases)(one)))()
    done.seconds = time.perf_counter() - begun
    done.covered, done.lines = coverage.counts()
    if LOG:
        with Path(LOG).open("a") as file:
            file.write(json.dumps(done.as_row() | {"commit": commit()}) + "\n")
    return done


def commit() -> str:
    """The code that was fuzzed, with `+` when files differed from it."""
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=False)
    return done.stdout.decode().strip()


def kind_of(error: BaseException) -> str:
    """An error's type and message without numbers, names in quotes and paths."""
    words = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|[^\x20-\x7e]|\d+", "", str(error))[:80]
    return f"{type(error).__name__}: {words}"


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Turn what would fill the machine into a MemoryError."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Coverage:
    """Which lines of the functions of some modules ran, by `sys.settrace` in this thread."""

    def __init__(self, modules: list[ModuleType]) -> None:
        self.files = {str(module.__file__) for module in modules}
        self.seen: set[tuple[str, int]] = set()
        self.known = {pair for module in modules for pair in _lines_of(module)}
        self.before: Any = None

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def counts(self) -> tuple[int, int]:
        """Lines that ran, and lines that there are."""
        return len(self.seen & self.known), len(self.known)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def _lines_of(module: ModuleType) -> Iterator[tuple[str, int]]:
    """Lines of functions; those of the module itself ran when it was imported."""
    path = str(module.__file__)
    waiting = [compile(Path(path).read_text(), path, "exec")]
    while waiting:
        code = waiting.pop()
        inner = [const for const in code.co_consts if isinstance(const, CodeType)]
        waiting += inner
        if code.co_flags & 0x2:  # CO_NEWLOCALS: a function
            lines = {line for _, _, line in code.co_lines() if line is not None}
            yield from ((path, line) for line in lines - {code.co_firstlineno})


@dataclass
class Parser:
    """What is given to a parser and how it is called.

    Attributes:
        cases: The inputs.
        parse: Is called with each.
        modules: Where the parser is, for the coverage.
        expected: Errors that are meant for the user.
        gives_values: Whether some inputs give a value; false where even a good one ends in a
            sentence.
    """

    cases: SearchStrategy[Any]
    parse: Callable[[Any], Any]
    modules: list[ModuleType]
    expected: tuple[type[BaseException], ...]
    gives_values: bool = True


class Rows(dict[str, Callable[[Path], Parser]]):
    """Parsers by name, each made in a folder of its own."""

    def row(self, make: Callable[[Path], Parser]) -> Callable[[Path], Parser]:
        self[make.__name__] = make
        return make

    def check(self, name: str, folder: Path) -> None:
        """Fuzz a parser, and see that its inputs are neither all refused nor all harmless."""
        parser = self[name](folder)
        done = fuzz(name, parser)
        print(json.dumps(done.as_row()))
        assert bool(done.values) == parser.gives_values, sorted(done.outcomes)
        assert len(done.outcomes) > 1


def of_file(path: Path, parse: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A parser of files as one of bytes."""

    def write_and_parse(data: bytes) -> Any:
        path.write_bytes(data)
        return parse(path)

    return write_and_parse


MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(int(SECONDS) * 2 + 240),
    # What libraries remark on broken files is not what is tested.
    pytest.mark.filterwarnings("ignore"),
]
"""Of a module with a fuzz test."""
