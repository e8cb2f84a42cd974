"""Runs of seconds, one of each package, to be damaged, starved and killed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import dataclasses
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from inl_core.run import checkpoints
from support.small_runs import dit_run, lm_run, write_texts

datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of sixteen files of 120 words."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(params=["dit", "lm"])
def package(request, texts) -> SimpleNamespace:
    """One of the two packages: `run(out, **fields)` makes a config, `train(config)` trains,
    `use(checkpoint)` loads it for sampling, `load(folder)` its pipeline or model,
    `STATE_FILE` is in every checkpoint, `outcome(out)` has
    the bytes of a finished run by file name."""
    name = f"complexity_{request.param}"
    module: Callable = lambda part: import_module(f"{name}.{part}")  # noqa: E731
    train = module("training.train" if request.param == "dit" else "train").train
    if request.param == "dit":
        state_file, run = module("training.state").STATE_FILE, dit_run

        def use(checkpoint):
            return load(checkpoint / "pipeline")

        def load(folder):
            return module("pipelines.sampling").load_pipeline(str(folder))
    else:
        state_file = module("train").STATE_FILE

        def run(out, **fields):
            return lm_run(out, texts, **fields)

        def use(checkpoint):
            return module("loading").load(str(checkpoint))

        def load(folder):
            return use(folder).model

    def outcome(out: Path) -> dict[str, bytes]:
        last = checkpoints.latest_checkpoint(Path(out) / "checkpoints")
        # Not optimizer.pt: a zip with times in it.
        files = [*last.rglob("*.safetensors"), Path(out) / "train_log.csv"]
        return {path.name: path.read_bytes() for path in files}

    return SimpleNamespace(
        name=request.param, run=run, use=use, load=load, train=train, outcome=outcome,
        STATE_FILE=state_file,
    )  # fmt: skip


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
