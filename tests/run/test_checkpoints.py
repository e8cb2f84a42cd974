"""Checkpoint folders: damaged files are named, locks name their holder."""

import errno
import os
import random
import re
import socket
import subprocess
from pathlib import Path

import pytest

from inl_core.run.checkpoints import (
    all_checkpoints,
    checkpoint_to_resume,
    drop_old_checkpoints,
    find_damage,
    write_sums,
)
from inl_core.run.errors import UserError
from inl_core.run.files import remove_partial_writes
from inl_core.run.folders import lock_folder
from support.disk import below, failing
from support.locks import locked_elsewhere
from support.strange_files import KINDS, make_strange

STATE = "state.json"


def change(path: Path, how: str) -> None:
    """Damage a file: "flip" a bit, "truncate" or "empty" it, "remove" it."""
    if how == "remove":
        path.unlink()
        return
    content, chance = bytearray(path.read_bytes()), random.Random(how)
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content[: {"truncate": len(content) - 2, "empty": 0}.get(how)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with checkpoints 4 and 8 of a dozen files in three folders."""
    for step in (4, 8):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        for i, folder in enumerate((".", "model", "model/parts")):
            (checkpoint / folder).mkdir(parents=True, exist_ok=True)
            for name in range(4):
                (checkpoint / folder / f"{name}.bin").write_bytes(bytes(range(8 * (i + 1), 200)))
        (checkpoint / STATE).write_text(f"{step}")
        write_sums(checkpoint)
    return tmp_path / "run"


def resume(run: Path, choice: str | Path = "auto") -> Path | None:
    return checkpoint_to_resume(run, str(choice), STATE)


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove"])
def test_every_damaged_file_is_named(run, how):
    checkpoint = all_checkpoints(run / "checkpoints")[-1]
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(files) == 14
    for path in files:
        if path.name == "SHA256SUMS" and how == "remove":
            continue  # as in checkpoints of early versions
        content = path.read_bytes()
        change(path, how)
        damage = find_damage(checkpoint)
        name = path.relative_to(checkpoint).as_posix()
        if path.name == "SHA256SUMS":
            assert damage, how  # the digest or the name of some file has changed
        else:
            assert len(damage) == 1, name
            assert damage[0].startswith(f"{name} is ")
        path.write_bytes(content)
    assert find_damage(checkpoint) == []


def test_a_truncated_list_is_detected(run):
    checkpoint = all_checkpoints(run / "checkpoints")[-1]
    sums = checkpoint / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        sums.write_text("".join(lines[:kept]))
        assert find_damage(checkpoint), kept


@pytest.mark.parametrize(
    "line", ["0" * 64 + "  /dev/zero", "0" * 64 + "  ../../elsewhere", "rubbish", "0" * 63 + "  a"]
)
def test_a_list_with_foreign_lines_is_not_followed(tmp_path, line):
    (tmp_path / "SHA256SUMS").write_text(f"# SHA-256 of 1 files\n{line}\n")
    (damage,) = find_damage(tmp_path)
    assert "SHA256SUMS cannot be read" in damage


def test_coreutils_reads_the_list(run):
    checkpoint = all_checkpoints(run / "checkpoints")[-1]
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=checkpoint, check=False).returncode == 0
    change(checkpoint / "model" / "2.bin", "flip")
    done = subprocess.run(command, cwd=checkpoint, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model/2.bin: FAILED" in done.stdout


def test_the_message_names_the_intact_checkpoint_before_a_damaged_one(run):
    first, second = all_checkpoints(run / "checkpoints")
    change(second / "0.bin", "flip")
    with pytest.raises(UserError, match=r"step-00000008 is damaged.*--resume \S*step-00000004"):
        resume(run)
    assert resume(run, first) == first
    assert all_checkpoints(run / "checkpoints") == [first]
    assert second.with_name("step-00000008.damaged").is_dir()


def test_the_message_says_that_no_checkpoint_is_intact(run):
    for checkpoint in all_checkpoints(run / "checkpoints"):
        change(checkpoint / STATE, "empty")
    with pytest.raises(UserError, match=r"damaged.*there is no intact one before it.*--out"):
        resume(run)


def test_going_back_behind_an_intact_checkpoint_is_refused(run):
    first = all_checkpoints(run / "checkpoints")[0]
    with pytest.raises(UserError, match=r"later checkpoints.*step-00000008"):
        resume(run, first)


def test_a_file_that_cannot_be_read_is_named(run):
    broken = below(run / "checkpoints" / "step-00000008" / "0.bin", errno.EIO, reads=True)
    message = rf"0.bin cannot be read \({os.strerror(errno.EIO)}\).*step-00000004"
    with failing(broken), pytest.raises(UserError, match=message):
        resume(run)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_is_no_regular_one_is_named(run, kind):
    checkpoint = all_checkpoints(run / "checkpoints")[-1]
    for name in ("SHA256SUMS", STATE, "model/2.bin"):
        content = (checkpoint / name).read_bytes()
        make_strange(checkpoint / name, kind)
        with pytest.raises(UserError, match=rf"damaged: {name}"):
            resume(run)
        (checkpoint / name).unlink()
        (checkpoint / name).write_bytes(content)
    assert resume(run) == checkpoint


def test_a_checkpoint_that_is_a_link_is_resumed_rotated_and_never_emptied(run, tmp_path):
    first, second = all_checkpoints(run / "checkpoints")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for checkpoint in (first, second):
        checkpoint.rename(elsewhere / checkpoint.name)
        checkpoint.symlink_to(elsewhere / checkpoint.name)
    drop_old_checkpoints(run / "checkpoints", keep_last=1)
    assert all_checkpoints(run / "checkpoints") == [second]
    assert find_damage(elsewhere / first.name) == []
    remove_partial_writes(run / "checkpoints")
    assert resume(run) == second
    (elsewhere / second.name).rename(elsewhere / "moved")
    with pytest.raises(UserError, match="step-00000008 is damaged: it is a link to a folder"):
        resume(run)


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    folder = tmp_path / "run"
    with locked_elsewhere(folder) as holder:
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        message = rf"process {holder.pid} on {re.escape(socket.gethostname())} since {since}.*--out"
        with pytest.raises(UserError, match=message), lock_folder(folder):
            pass
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert (folder / ".lock").exists()
    with lock_folder(folder):
        pass
    assert not folder.joinpath(".lock").exists()
