"""Files that both model packages have: the packages do not import each other, the copies agree."""

from pathlib import Path

import pytest

PACKAGES = {
    "complexity_dit": Path("packages/complexity-dit/src/complexity_dit"),
    "complexity_lm": Path("packages/complexity-lm/src/complexity_lm"),
}
TWINS = [
    "bounded.py",
    "checkpoint_folders.py",
    "checksums.py",
    "csv_log.py",
    "files.py",
    "lost_process.py",
    "run_lock.py",
]


def neutral(package: str, name: str) -> str:
    """A file's text without the name of its package."""
    return (PACKAGES[package] / name).read_text().replace(package, "PACKAGE")


@pytest.mark.parametrize("name", TWINS)
def test_twins_agree(name):
    ours, theirs = (neutral(package, name) for package in PACKAGES)
    assert ours == theirs


def test_every_file_that_agrees_is_listed():
    shared = set.intersection(
        *({p.name for p in folder.glob("*.py")} for folder in PACKAGES.values())
    )
    agree = {
        name for name in shared if neutral("complexity_dit", name) == neutral("complexity_lm", name)
    }
    assert agree == set(TWINS)
