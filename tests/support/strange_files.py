"""Files that are not what they should be: pipes, devices, links, and files without an end."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

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
from support.small_runs import package_of

KINDS = ("pipe", "device", "link", "sparse")


def make_strange(path: Path, kind: str) -> None:
    """Replace a file: by a "pipe" nobody writes to, a link to an endless "device", a "link" to the
    file itself under another name, or a "sparse" file of 60 GB."""
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "link":
            elsewhere = path.with_name(f"elsewhere-{path.name}")
            elsewhere.write_bytes(content)
            path.symlink_to(elsewhere)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(60 * 2**30)


def readers(package, run: Path, path: Path) -> list[Callable[[], object]]:
    """What reads a file of a run: resume, inspect, sample, generate and evaluate."""
    *_, newest = all_checkpoints(run / "checkpoints")
    module = "cli.inspect" if package.name == "dit" else "inspect_model"
    inspect = import_module(f"complexity_{package.name}.{module}").inspect

    def resume() -> object:
        return package.train(dataclasses.replace(package.run(run), resume="auto"))

    if newest in path.parents:
        return [resume, lambda: package.use(newest)]
    if path.parent == run or path.parent.name == "tokenizer":
        return [resume]
    return [lambda: package.use(run), lambda: inspect(str(run))]


def read_all(name: str, texts: Path, run: Path, kind: str, place: Path, results) -> None:
    """Send the name of each file before it is read, then what its readers did."""
    package = package_of(name, texts)
    *earlier, _ = all_checkpoints(run / "checkpoints")
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        if any(checkpoint in path.parents for checkpoint in earlier):
            continue
        place_in_run = path.relative_to(run)
        results.send((str(place_in_run), None))
        copy = place / "copy"
        shutil.copytree(run, copy)
        make_strange(copy / place_in_run, kind)
        for read in readers(package, copy, copy / place_in_run):
            try:
                read()
            except UserError as error:
                named = path.name in str(error)
                results.send((str(place_in_run), "named" if named else "refused"))
            except Exception as error:
                results.send((str(place_in_run), repr(error)))
            else:
                results.send((str(place_in_run), "not needed"))
        shutil.rmtree(copy)
    results.close()


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
