"""Every file of a run of each package as a pipe, a device, a link or an endless file."""

import multiprocessing
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from inl_core.run.checkpoints import all_checkpoints
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_ends_and_names_the_file(package, finished, resumed, tmp_path, kind):
    mine, others = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=read_all, args=(package, resumed, finished, kind, tmp_path / "place", others)
    )
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
    wrong = [(name, result) for name, result in seen if result not in (None, *ENDS)]
    assert not wrong
    named = {name for name, result in seen if result == "named"}
    assert "train_log.csv" in named
    checkpoint = {name for name, _ in seen if name.startswith("checkpoints/")}
    assert checkpoint
    assert checkpoint <= named  # its checksums cover all of it
