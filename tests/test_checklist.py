"""docs/checklist.md: every row of a feature names tests, and they are there."""

import ast
import re
from pathlib import Path

PAGE = Path("docs/checklist.md")
NAMED = re.compile(r"`(\S+\.py)::(test_\w+)`")


def rows():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith(("| feature |", "|---"))]


def test_every_row_names_a_test():
    assert len(rows()) > 40
    bare = [row for row in rows() if not NAMED.search(row)]
    assert not bare, bare


def test_every_named_test_exists():
    known = {}
    for row in rows():
        for file, name in NAMED.findall(row):
            if file not in known:
                tree = ast.parse(Path("tests", file).read_text())
                known[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert name in known[file], f"{file} has no {name}: {row}"
