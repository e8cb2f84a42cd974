"""Every file of a run of each package as a pipe, a device, a link or an endless file."""

import multiprocessing
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from complexity_dit.cli.convert import convert
from complexity_dit.data.latents import read_cache
from complexity_dit.evaluation.image_sets import open_reference, open_target
from complexity_dit.evaluation.networks import load_extractor
from complexity_dit.evaluation.report import compare
from complexity_dit.models.autoencoder import TinyAutoencoder
from inl_core.run.checkpoints import all_checkpoints
from inl_core.run.csv_log import read_columns
from inl_core.run.errors import UserError
from support.strange_files import KINDS, make_strange

ENDS = ("named", "refused", "not needed")

LIMIT_S = 120
"""For all files of one kind; a reader that waits for a pipe never ends."""


def readers(package, resumed, run: Path, path: Path) -> list[Callable[[], object]]:
    """What reads a file of a run: resume, inspect, sample, generate and evaluate."""
    *_, newest = all_checkpoints(run / "checkpoints")
    module = "cli.inspect" if package.name == "dit" else "inspect_model"
    inspect = import_module(f"complexity_{package.name}.{module}").inspect
    if newest in path.parents:
        return [lambda: resumed(run), lambda: package.use(newest)]
    if path.parent == run or path.parent.name == "tokenizer":
        return [lambda: resumed(run)]
    return [lambda: package.use(run), lambda: inspect(str(run))]


def read_all(package, resumed, run: Path, kind: str, place: Path, results) -> None:
    """Send the name of each file before it is read, then what its readers did."""
    *earlier, _ = all_checkpoints(run / "checkpoints")
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        if any(checkpoint in path.parents for checkpoint in earlier):
            continue
        name = path.relative_to(run)
        results.send((str(name), None))
        copy = place / "copy"
        shutil.copytree(run, copy)
        make_strange(copy / name, kind)
        for read in readers(package, resumed, copy, copy / name):
            try:
                read()
            except UserError as error:
                named = path.name in str(error)
                results.send((str(name), "named" if named else "refused"))
            except Exception as error:
                results.send((str(name), repr(error)))
            else:
                results.send((str(name), "not needed"))
        shutil.rmtree(copy)
    results.close()


def results_of(work: Callable[..., None], *arguments: object) -> list[tuple[str, str | None]]:
    """What `work(*arguments, pipe)` sends in a child process, which must not wait for ever."""
    mine, others = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=work, args=(*arguments, others))
    child.start()
    others.close()
    seen: list[tuple[str, str | None]] = []
    try:
        while mine.poll(LIMIT_S):
            seen.append(mine.recv())
    except EOFError:
        child.join()
    else:
        child.kill()
        pytest.fail(f"{seen[-1][0]}: its reader does not end")
    assert child.exitcode == 0
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_ends_and_names_the_file(package, finished, resumed, tmp_path, kind):
    seen = results_of(read_all, package, resumed, finished, kind, tmp_path / "place")
    wrong = [(name, result) for name, result in seen if result not in (None, *ENDS)]
    assert not wrong
    named = {name for name, result in seen if result == "named"}
    assert "train_log.csv" in named
    checkpoint = {name for name, _ in seen if name.startswith("checkpoints/")}
    assert checkpoint
    assert checkpoint <= named  # its checksums cover all of it


OTHER_READERS: dict[str, Callable[[Path], object]] = {
    "research.safetensors": lambda path: convert(path, path.parent / "out"),
    "images.npz": lambda path: open_target(path, torch.device("cpu"), None),
    "statistics.npz": lambda path: open_reference(str(path), (8, 8), None),
    "taef2_encoder.safetensors": lambda path: TinyAutoencoder.from_taesd(path.parent),
    "taef2_encoder.pth": lambda path: TinyAutoencoder.from_taesd(path.parent),
    "cache.json": lambda path: read_cache(path.parent),
    "result.json": lambda path: compare(str(path), str(path)),
    "inception.safetensors": lambda path: load_extractor(
        str(path), "clean", "float32", torch.device("cpu")
    ),
    "train_log.csv": lambda path: read_columns(path, "step", "loss"),
}


def read_others(place: Path, kind: str, results) -> None:
    for name, read in OTHER_READERS.items():
        results.send((name, None))
        path = place / f"of-{name}" / name
        path.parent.mkdir(parents=True)
        make_strange(path, kind)
        try:
            read(path)
        except UserError:
            results.send((name, "refused"))
        except Exception as error:
            results.send((name, repr(error)))
    results.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "link"])
def test_other_files_end_their_reader_too(tmp_path, kind):
    seen = results_of(read_others, tmp_path, kind)
    assert {name: result for name, result in seen if result} == dict.fromkeys(
        OTHER_READERS, "refused"
    )
