"""Runs of seconds, one of each package, to be damaged, starved and killed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from support.small_runs import package_of, write_texts

datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of sixteen files of 120 words."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(params=["dit", "lm"])
def package(request, texts) -> SimpleNamespace:
    """One of the two packages, see `package_of`."""
    return package_of(request.param, texts)


@pytest.fixture(scope="session")
def finished_runs() -> dict:
    """Finished runs by package, filled by `finished`."""
    return {}


@pytest.fixture
def finished(package, finished_runs, tmp_path_factory, tmp_path) -> Path:
    """A copy of a finished run, trained once per package and session."""
    if package.name not in finished_runs:
        out = tmp_path_factory.mktemp(f"finished-{package.name}") / "run"
        package.train(package.run(out))
        finished_runs[package.name] = out
    shutil.copytree(finished_runs[package.name], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def resumed(package) -> Callable[..., Path]:
    """Function that continues a run in its folder."""

    def resume_run(out: Path, resume: str | Path = "auto", **fields) -> Path:
        return package.train(dataclasses.replace(package.run(out), resume=str(resume), **fields))

    return resume_run
