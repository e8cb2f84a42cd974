"""Disks that are full, read-only or broken, at any moment: the last good state stays."""

import errno

import pytest

from inl_core.run import checkpoints, files
from inl_core.run.errors import UserError
from support.disk import CHANGES, below, failing, small_files

STEP_THAT_FAILS = 8


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def whole(text):
    return {"a": text, "b/c": text}


def fill(folder, text):
    (folder / "a").write_text(text)
    (folder / "b").mkdir(exist_ok=True)
    (folder / "b" / "c").write_text(text)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("has_old", [True, False])
def test_an_error_at_any_operation_leaves_the_old_or_the_new(
    package, tmp_path, record_property, number, has_old
):
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
            return OSError(number, "injected") if left < 0 else None  # and all after it

        try:
            with failing(rule), files.atomic_folder(target) as aside:
                fill(aside, "new")
                checkpoints.write_sums(aside)
            done = True
        except OSError:
            done = False
        finished = left >= 0
        files.remove_partial_writes(folder)
        assert {p.name for p in folder.iterdir()} <= {"thing"}, failed
        found = contents(target) if target.exists() else None
        if found and "SHA256SUMS" in found:
            assert checkpoints.damage(target) == []
            del found["SHA256SUMS"]
        assert found in (whole("old") if has_old else None, whole("new")), failed
        assert found == whole("new") or not done
        if finished:
            break
        failed += 1
    assert failed >= 6
    record_property("injected", failed)


def full_at_the_second_checkpoint(package, monkeypatch, context):
    """Enter `context` for good when the second checkpoint begins to be written."""
    if package.name == "dit":
        from complexity_dit.training.state import TrainState as saver

        name = "save"
    else:
        from complexity_lm.trainer import LMTrainer as saver

        name = "_save_checkpoint"
    real = getattr(saver, name)

    def save(self, *arguments):
        step = self.step if package.name == "dit" else self.state.global_step
        if step < STEP_THAT_FAILS:
            return real(self, *arguments)
        with context:
            return real(self, *arguments)

    monkeypatch.setattr(saver, name, save)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    package, tmp_path, resumed, monkeypatch, record_property
):
    straight, starved = tmp_path / "straight", tmp_path / "starved"
    package.train(package.run(straight))
    limits = 10, 4000, 12000
    record_property("injected", len(limits))
    for limit in limits:
        with monkeypatch.context() as patch:
            full_at_the_second_checkpoint(package, patch, small_files(limit))
            with pytest.raises(
                UserError, match=r"could not write .*step-00000008.*step-00000004.*free sp"
            ):
                resumed(starved)
        found = [path.name for path in (starved / "checkpoints").iterdir()]
        assert found == ["step-00000004"], limit
    resumed(starved)
    assert package.outcome(starved) == package.outcome(straight)


def test_a_disk_that_becomes_read_only(package, tmp_path, resumed, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken = failing(below(out / "checkpoints", errno.EROFS))
        full_at_the_second_checkpoint(package, patch, broken)
        with pytest.raises(UserError, match=r"Read-only.*step-00000004"):
            resumed(out)
    resumed(out)
    assert checkpoints.latest_checkpoint(out / "checkpoints").name.endswith("8")


def test_a_read_only_folder_is_refused_before_anything_is_computed(package, tmp_path):
    out = tmp_path / "run"
    with (
        failing(below(tmp_path, errno.EROFS)),
        pytest.raises(UserError, match=r"cannot write in .*Read-only.*another --out"),
    ):
        package.train(package.run(out))
    assert not out.exists()


def test_results_outlive_a_full_disk(package, tmp_path):
    result = tmp_path / "result.json"
    result.write_text("before")
    with (
        small_files(100),
        pytest.raises(OSError, match="too large"),
        files.atomic_file(result) as aside,
    ):
        aside.write_text("x" * 1000)
    assert result.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
