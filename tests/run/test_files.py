"""Files and folders are complete or absent after a kill -9 or a disk error at any moment."""

import errno
import os
import socket
from functools import partial
from itertools import count

import pytest

from inl_core.run.checkpoints import find_damage, write_sums
from inl_core.run.errors import UserError
from inl_core.run.files import (
    atomic_file,
    atomic_folder,
    finish_merge,
    merged_folder,
    read_bytes,
    read_text,
    remove_folder,
    remove_partial_writes,
)
from support.disk import CHANGES, failing, small_files
from support.kills import operations_until
from support.strange_files import KINDS, make_strange


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def both(text):
    return {"a": text, "b/c": text}


def fill(folder, text):
    (folder / "a").write_text(text)
    (folder / "b").mkdir(exist_ok=True)
    (folder / "b" / "c").write_text(text)


def write_file(target):
    with atomic_file(target / "a") as partial:
        partial.write_text("new")


def write_folder(target):
    with atomic_folder(target) as partial:
        fill(partial, "new")


def merge_folder(target):
    with merged_folder(target) as partial:
        fill(partial, "new")


@pytest.mark.parametrize(
    ("write", "old", "new"),
    [
        (write_folder, None, both("new")),
        (write_folder, both("old"), both("new")),
        (remove_folder, both("old"), None),
        (write_file, both("old"), both("old") | {"a": "new"}),
        (merge_folder, both("old"), both("new")),
    ],
    ids=["fresh", "replace", "remove", "file", "merge"],
)
def test_a_kill_anywhere_leaves_the_old_or_the_new(tmp_path, write, old, new):
    for kills in count():
        folder = tmp_path / str(kills)
        target = folder / "thing"
        target.mkdir(parents=True)
        fill(target, "old") if old else target.rmdir()
        killed = operations_until(kills, partial(write, target)) is None
        finish_merge(target) if target.is_dir() else None
        remove_partial_writes(folder)
        remove_partial_writes(target) if target.is_dir() else None
        assert {p.name for p in folder.iterdir()} <= {"thing"}, kills
        result = contents(target) if target.exists() else None
        assert result in (old, new), kills
        if not killed:
            assert result == new
            break
    assert kills >= 2  # at least as many operations as there are


def test_a_merge_keeps_other_files_and_removes_weights_that_it_replaces(tmp_path):
    (tmp_path / "real" / "vae").mkdir(parents=True)
    kept = ("notes.md", "vae/config.json", "model.fp16.safetensors", "other.safetensors")
    gone = (
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    )  # fmt: skip
    for name in (*kept, *gone):
        (tmp_path / "real" / name).write_text("old")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    dead = 2**22 + 1  # above the largest process id
    (tmp_path / "real" / f".{socket.gethostname()}-{dead}-01.complexity-partial").mkdir()
    with merged_folder(tmp_path / "linked") as folder:
        (folder / "model.safetensors").write_text("new")
    assert (tmp_path / "linked").is_symlink()
    assert contents(tmp_path / "real") == dict.fromkeys(kept, "old") | {"model.safetensors": "new"}
    assert not list((tmp_path / "real").glob(".*"))
    with merged_folder(tmp_path / "real") as folder:  # and back to shards
        for name in gone:
            (folder / name).write_text("new")
    assert not (tmp_path / "real" / "model.safetensors").exists()
    failing_merge = merged_folder(tmp_path / "real")
    (failing_merge.__enter__() / "notes.md").write_text("new")
    assert not failing_merge.__exit__(RuntimeError, RuntimeError(), None)
    assert (tmp_path / "real" / "notes.md").read_text() == "old"


@pytest.mark.parametrize("link", ["target", "complete"])
def test_a_folder_of_others_moves_no_files_out_of_it(tmp_path, link):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "downloaded"
    complete = folder / ".x.complexity-complete"
    complete.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "keys").write_text("the user's")
    if link == "target":
        (complete / "vae").mkdir()
        (complete / "vae" / "keys").write_text("theirs")
        (folder / "vae").symlink_to(elsewhere)
    else:
        (complete / "vae").symlink_to(elsewhere)
    with pytest.raises(UserError, match="does not belong there"):
        finish_merge(folder)
    assert (elsewhere / "keys").read_text() == "the user's"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("has_old", [True, False])
def test_a_disk_error_at_any_operation_leaves_the_old_or_the_new(tmp_path, number, has_old):
    before = both("old") if has_old else None
    failed = 0
    while True:
        folder = tmp_path / str(failed)
        target = folder / "thing"
        target.mkdir(parents=True)
        fill(target, "old") if has_old else target.rmdir()
        left = failed

        def rule(event, path, writes, folder=folder):
            nonlocal left
            if not str(path).startswith(str(folder)) or not (writes or event in CHANGES):
                return None
            left -= 1
            return OSError(number, "injected") if left < 0 else None  # and for all later ones

        try:
            with failing(rule), atomic_folder(target) as partial:
                fill(partial, "new")
                write_sums(partial)
            succeeded = True
        except OSError:
            succeeded = False
        remove_partial_writes(folder)
        assert {p.name for p in folder.iterdir()} <= {"thing"}, failed
        result = contents(target) if target.exists() else None
        if result and "SHA256SUMS" in result:
            assert find_damage(target) == []
            del result["SHA256SUMS"]
        assert result in (before, both("new")), failed
        assert result == both("new") or not succeeded
        if left >= 0:
            break
        failed += 1
    assert failed >= 6


def test_a_full_disk_keeps_the_previous_file(tmp_path):
    result = tmp_path / "result.json"
    result.write_text("before")
    with small_files(100), pytest.raises(OSError, match="too large"), atomic_file(result) as file:
        file.write_text("x" * 1000)
    assert contents(tmp_path) == {"result.json": "before"}


def test_an_exception_leaves_the_old_version_and_no_temporary_files(tmp_path):
    with atomic_folder(tmp_path / "thing") as folder:
        (folder / "a").write_text("first")
    for write in (atomic_folder(tmp_path / "thing"), atomic_file(tmp_path / "thing" / "a")):
        path = write.__enter__()
        (path / "a" if path.is_dir() else path).write_text("second")
        assert not write.__exit__(RuntimeError, RuntimeError(), None)
    assert contents(tmp_path) == {"thing/a": "first"}


def test_only_temporary_files_are_removed(tmp_path):
    (tmp_path / ".lock").write_text("held")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "mine.partial").write_text("no dot in front")
    theirs = (".env.old", ".notes.partial", ".bashrc.old", ".curve.csv.partial.x1.csv")
    for name in theirs:
        (tmp_path / name).write_text("theirs")
    for name in (".result.json.partial.x1.json", ".step-00000004.partial", ".model.removed"):
        (tmp_path / name).write_text("of version 0.1.0")
    (tmp_path / ".curve.csv.0123abcd.complexity-partial").write_text("temporary")
    (tmp_path / "folder").mkdir()
    remove_folder(tmp_path / "folder")
    remove_partial_writes(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".hidden", "mine.partial", *theirs}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read_and_up_to_a_bound(tmp_path, kind):
    path = tmp_path / "state.json"
    path.write_text("{}")
    make_strange(path, kind)
    for read in (read_bytes, read_text):
        with pytest.raises(UserError, match=r"state\.json (has|is a) "):
            read(path, 1000)
    if kind == "link":  # as in the cache of the Hub
        assert read_text(path, 1000, follow_links=True) == "{}"
    else:
        with pytest.raises(UserError):
            read_text(path, 1000, follow_links=True)


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as partial:
            partial.unlink()
            partial.write_text("a library's own file")
            partial.chmod(0o600)
        with atomic_folder(tmp_path / "folder") as partial:
            (partial / "weights").write_text("as safetensors")
            (partial / "weights").chmod(0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "folder": 0o750, "weights": 0o640}
