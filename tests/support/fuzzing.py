"""Fuzzing one parser for a while with inputs by hypothesis.

The rule for every parser: any bytes give a value or a `UserError`. Anything else (another
exception, an input that takes long, memory that grows without bound) fails the test, and hypothesis
prints the input.
"""

import contextlib
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from inl_core.run.errors import UserError

SECONDS = float(os.environ.get("COMPLEXITY_FUZZ_SECONDS", "10"))
"""How long each parser is fuzzed."""

MEMORY = 2 * 2**30
"""Bytes that a parser may take beyond what the process has at the start."""

CASE_SECONDS = 20.0
"""Limit for a single input; generous, because the machine may be busy."""


class Slow(Exception):
    """An input kept a parser busy for longer than `CASE_SECONDS`."""


@dataclass
class Parser:
    """The inputs of a parser and the function that parses one.

    Attributes:
        cases: The inputs.
        parse: Is called with each.
        gives_values: Whether some inputs give a value; false where even a good one is an error.
    """

    cases: SearchStrategy[Any]
    parse: Callable[[Any], Any]
    gives_values: bool = True


def fuzz(parser: Parser) -> set[str]:
    """Give a parser inputs for `SECONDS`; return the kinds of errors, and "a value"."""
    outcomes: set[str] = set()

    def one(case: Any) -> None:
        begun = time.perf_counter()
        try:
            parser.parse(case)
        except UserError as error:
            outcomes.add(kind_of(error))
        else:
            outcomes.add("a value")
        took = time.perf_counter() - begun
        if took > CASE_SECONDS:
            raise Slow(f"{took:.1f} s")

    end, number = time.perf_counter() + SECONDS, 0
    with limited_memory(MEMORY):
        while number == 0 or time.perf_counter() < end:
            settings(
                max_examples=50,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],  # shrinking takes minutes where a parser is slow
            )(seed(number)(given(parser.cases)(one)))()
            number += 1
    return outcomes


def kind_of(error: BaseException) -> str:
    """An error's message without numbers, names in quotes and paths."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|[^\x20-\x7e]|\d+", "", str(error))[:80]


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


class Rows(dict[str, Callable[[Path], Parser]]):
    """Parsers by name, each made in a folder of its own."""

    def row(self, make: Callable[[Path], Parser]) -> Callable[[Path], Parser]:
        self[make.__name__] = make
        return make

    def check(self, name: str, folder: Path) -> None:
        """Fuzz a parser, and check that its inputs are neither all refused nor all harmless."""
        parser = self[name](folder)
        outcomes = fuzz(parser)
        assert ("a value" in outcomes) == parser.gives_values, sorted(outcomes)
        assert len(outcomes) > 1


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
