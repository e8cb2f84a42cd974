"""The site builds strictly and loads nothing from elsewhere; every link leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKDOWN = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.md")),
    *sorted((ROOT / "packages").glob("*/README.md")),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as the repository and the site both make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)} links {link}"
        assert target.is_relative_to(ROOT), f"{page.relative_to(ROOT)} links {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.relative_to(ROOT)} links {link}"


def test_links_are_found_and_code_is_not_prose(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A Title, twice\n[a](b.md#c) ![d](e.png)\n```sh\n# no [link](x.md)\n```\n")
    assert LINK.findall(prose(page)) == ["b.md#c", "e.png"]
    assert anchors(page) == {"a-title-twice"}


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package, reason="the site needs the dependency group docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 18
    for page in pages:
        text = page.read_text()
        loaded = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", text
        )
        assert not loaded, f"{page.name} loads {loaded}"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?https?:|@import\s+[\"']https?:", sheet.read_text())
    reference = (tmp_path / "reference" / "inl_core" / "index.html").read_text()
    assert "(…, D)" in reference or "(..., D)" in reference  # shapes, from the docstrings


def test_examples_trust_the_code_of_a_folder_in_so_many_words():
    """Without the argument a user is asked a question in the middle of the example.

    Not seen when a block runs in this process, where the package is imported already.
    """
    found = []
    for page in MARKDOWN:
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            if "complexity_lm" in block:
                continue  # imported: nothing in the folder needs to run
            loads = r"\b(?:(?:Auto|Diffusion)\w+\.from_pretrained|pipeline)\(.*?\)"
            found += re.findall(loads, block, re.DOTALL)
    assert len(found) > 5
    assert [call for call in found if "trust_remote_code=True" not in call] == []
