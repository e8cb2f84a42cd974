"""Every row of the checklist, the reported problems and the promises names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

PAGES = {"how-to/checklist": 40, "how-to/reported-problems": 40, "promises": 25}
"""Pages below docs/, with the number of rows that each has at least."""
NAMED = re.compile(r"`(\S+\.py)::(test_\w+)`")
HEAD = re.compile(r"^(\|.*\|)\n\|[-|: ]+\|$", re.MULTILINE)


def rows(page):
    text = Path("docs", f"{page}.md").read_text()
    heads = HEAD.findall(text)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line not in heads]


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_a_test(page):
    assert len(rows(page)) > PAGES[page]
    bare = [row for row in rows(page) if not NAMED.search(row)]
    assert not bare, bare


@pytest.mark.parametrize("page", PAGES)
def test_every_named_test_exists(page):
    known = {}
    for row in rows(page):
        for file, name in NAMED.findall(row):
            if file not in known:
                tree = ast.parse(Path("tests", file).read_text())
                known[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert name in known[file], f"{file} has no {name}: {row}"
