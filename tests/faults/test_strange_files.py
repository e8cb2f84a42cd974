"""Every file of a run of each package as a pipe, a device, a link or an endless file."""

import multiprocessing
from collections.abc import Callable

import pytest

from support.strange_files import KINDS, OTHER_READERS, read_all, read_others

ENDS = ("named", "refused", "not needed")

LIMIT_S = 120
"""For all files of one kind; a reader that waits for a pipe never ends."""


def results_of(work: Callable[..., None], *arguments: object) -> list[tuple[str, str | None]]:
    """What `work(*arguments, pipe)` sends in a child process, which must not wait for ever."""
    mine, others = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=work, args=(*arguments, others))
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
def test_every_reader_ends_and_names_the_file(package, texts, finished, tmp_path, kind):
    seen = results_of(read_all, package.name, texts, finished, kind, tmp_path / "place")
    wrong = [(name, result) for name, result in seen if result not in (None, *ENDS)]
    assert not wrong
    named = {name for name, result in seen if result == "named"}
    assert "train_log.csv" in named
    checkpoint = {name for name, _ in seen if name.startswith("checkpoints/")}
    assert checkpoint
    assert checkpoint <= named  # its checksums cover all of it


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "link"])
def test_other_files_end_their_reader_too(tmp_path, kind):
    seen = results_of(read_others, tmp_path, kind)
    assert {name: result for name, result in seen if result} == dict.fromkeys(
        OTHER_READERS, "refused"
    )
