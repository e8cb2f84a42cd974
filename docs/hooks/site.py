"""Hooks of mkdocs: formulas as MathML, and pages from outside docs/.

The pages are written for readers of the repository and of the site. `$…$` becomes MathML when the
site is built, so that no script and no font is loaded. A link to a file of the repository that is
not part of the site becomes its text.
"""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

FROM_ELSEWHERE = {"benchmarks/README.md": "results/benchmarks.md"}
"""Files outside docs/ that are pages of the site: {path in the repository: path in the site}."""

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `FROM_ELSEWHERE`."""
    for source, page in FROM_ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links and images to paths of the site; a link to any other file becomes its text."""
    here = {site: source for source, site in FROM_ELSEWHERE.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(here or f"docs/{page.file.src_uri}")

    def point(link: re.Match[str]) -> str:
        picture, text, path, anchor = link[1], link[2], link[3], link[4] or ""
        target = posixpath.normpath(f"{folder}/{path}")
        site = FROM_ELSEWHERE.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(site) is not None:
            start = posixpath.dirname(page.file.src_uri) or "."
            return f"{picture}[{text}]({posixpath.relpath(site, start)}{anchor})"
        # A dead link, or an image that the site lacks, stays: the strict build refuses it.
        return text if (ROOT / target).exists() and not picture else link[0]

    return _LINK.sub(point, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render formulas as MathML."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        # The converter supports this layout under its numbered name only.
        tex = html.unescape(found[3]).replace("{aligned}", "{align}")
        return convert(tex, display=display)

    return _FORMULA.sub(formula, content)
