"""A command writes only to its own folders, and one process at a time."""

import os
import threading

import pytest

from inl_core.run.checkpoints import open_run_folder
from inl_core.run.errors import UserError
from inl_core.run.folders import LOCK_FILE, claim_folder, lock_folder, new_folder, writing

KIND = "complexity-dit-run"


def everything(folder):
    """Names, kinds and contents below a folder."""
    return {
        path.relative_to(folder): path.is_dir() or path.read_bytes() for path in folder.rglob("*")
    }


@pytest.mark.parametrize("resume", ["auto", "none"])
@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_nothing_in_a_folder_of_the_user_is_touched(tmp_path, resume, has_checkpoints):
    for name in (".env.old", ".notes.partial", ".bashrc.old", "config.yaml", "result.json"):
        (tmp_path / name).write_text("the user's")
    for name in (".cache.removed", "pipeline", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("the user's")
    if has_checkpoints:  # of another program
        (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    before = everything(tmp_path)
    run = open_run_folder(tmp_path, resume, "state.json", KIND, lambda work: work())
    with pytest.raises(UserError, match=r"is not one that this command has written.*--out"), run:
        pass
    assert everything(tmp_path) == before


def test_a_folder_is_claimed_by_one_kind_of_command(tmp_path):
    folder = tmp_path / "new" / "folder"
    with claim_folder(folder, KIND):
        pass
    assert not folder.exists()  # nothing was written
    with claim_folder(folder, KIND):
        (folder / "file").write_text("x")
    with claim_folder(folder, KIND), claim_folder(folder, "samples", also=(KIND,)):
        assert {path.name for path in folder.iterdir()} == {f".{KIND}", LOCK_FILE, "file"}
    with pytest.raises(UserError, match="not one that this command"), claim_folder(folder, "x"):
        pass
    with claim_folder(folder, "x", is_earlier=lambda folder: (folder / "file").exists()):
        pass


@pytest.mark.parametrize("kind", ["link", "content", "pipe"])
def test_a_lock_file_of_others_is_neither_followed_nor_changed(tmp_path, kind):
    notes, lock = tmp_path / "notes", tmp_path / "run" / LOCK_FILE
    notes.write_text("the user's")
    lock.parent.mkdir()
    if kind == "link":
        lock.symlink_to(notes)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        os.link(notes, lock)
    with pytest.raises(UserError, match=r"\.lock is "), lock_folder(lock.parent):
        pass
    assert notes.read_text() == "the user's"
    assert os.path.lexists(lock)


def test_another_thread_is_refused_and_the_same_thread_is_not(tmp_path):
    refused = []

    def other():
        try:
            with lock_folder(tmp_path):
                pass
        except UserError as error:
            refused.append(str(error))

    with lock_folder(tmp_path), lock_folder(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in refused[0]
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_new_folder_is_found_out_to_be_impossible_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/folder"):
        with pytest.raises(UserError, match="--out"), new_folder(tmp_path / name):
            pytest.fail("the work has begun")
    with new_folder(tmp_path / "folder") as partial:
        (partial / "a").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    work = new_folder(tmp_path / "folder")
    (work.__enter__() / "a").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").touch()
    with pytest.raises(UserError, match="cannot write"):
        work.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_errors_of_writing_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*Not a dir.*--out"), writing(tmp_path):
        (tmp_path / "file" / "file").write_text("x")
    with pytest.raises(UserError, match="free space"), writing(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), writing(tmp_path):  # an input, more likely
        (tmp_path / "nowhere" / "file").read_text()
