"""Files and folders are whole or absent, wherever a kill -9 falls."""

import subprocess
import sys

import pytest

from inl_core.run import files
from inl_core.run.files import atomic_file, atomic_folder, remove_folder, remove_partial_writes

# One child for each file-system operation of the writer: it is killed right before that one.
KILLED_EVERYWHERE = """
import importlib.util, os, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
place, work = Path(sys.argv[2]), sys.argv[3]
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}

def fill(folder, text):
    for name in ("a", "b/c"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}

def write(target):
    if work == "remove":
        return files.remove_folder(target)
    if work == "file":
        with files.atomic_file(target / "a") as aside:
            aside.write_text("new")
        return
    with files.atomic_folder(target) as aside:
        fill(aside, "new")

def whole(text):
    return {"a": text, "b/c": text}

kills = 0
while True:
    folder = place / f"{work}-{kills}"
    target = folder / "thing"
    target.mkdir(parents=True)
    if work != "fresh":
        fill(target, "old")
    else:
        target.rmdir()
    child = os.fork()
    if child == 0:
        left = kills

        def count(event, arguments):
            global left
            if event in OPERATIONS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write(target)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    files.remove_partial_writes(folder)
    files.remove_partial_writes(target) if target.is_dir() else None
    assert {p.name for p in folder.iterdir()} <= {"thing"}, (kills, list(folder.iterdir()))
    found = contents(target) if target.exists() else None
    fine = {
        "fresh": (None, whole("new")),
        "replace": (whole("old"), whole("new")),
        "remove": (whole("old"), None),
        "file": (whole("old"), whole("old") | {"a": "new"}),
    }[work]
    assert found in fine, (kills, found)
    if status == 0:
        assert found == fine[1]
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    kills += 1
print(kills)
"""


@pytest.mark.parametrize("work", ["fresh", "replace", "remove", "file"])
def test_a_kill_anywhere_leaves_the_old_or_the_new(tmp_path, record_property, work):
    command = [sys.executable, "-c", KILLED_EVERYWHERE, files.__file__, str(tmp_path), work]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2  # kills: at least as many operations as there are
    record_property("injected", int(done.stdout))


def test_an_error_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    with atomic_folder(tmp_path / "thing") as folder:
        (folder / "a").write_text("first")
    for aside in (atomic_folder(tmp_path / "thing"), atomic_file(tmp_path / "thing" / "a")):
        path = aside.__enter__()
        (path / "a" if path.is_dir() else path).write_text("second")
        assert not aside.__exit__(RuntimeError, RuntimeError(), None)
    assert (tmp_path / "thing" / "a").read_text() == "first"
    assert [p.name for p in tmp_path.rglob("*")] == ["thing", "a"]


def test_recover_leaves_what_is_not_scratch(tmp_path):
    (tmp_path / ".lock").write_text("held")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "mine.partial").write_text("no dot in front")
    (tmp_path / ".curve.csv.partial.x1.csv").write_text("scratch")
    (tmp_path / "gone").mkdir()
    remove_folder(tmp_path / "gone")
    remove_partial_writes(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".hidden", "mine.partial"}
