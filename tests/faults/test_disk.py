"""Full and read-only disks: both trainings stop and keep the last good checkpoint."""

import errno

import pytest

from inl_core.run import checkpoints
from inl_core.run.errors import UserError
from support.disk import below, failing, small_files

STEP_THAT_FAILS = 8


def enter_at_the_second_checkpoint(package, monkeypatch, context):
    """Let the second checkpoint be saved inside `context`."""
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


def test_a_full_disk_keeps_the_last_good_checkpoint(package, tmp_path, resumed, monkeypatch):
    undisturbed, starved = tmp_path / "undisturbed", tmp_path / "starved"
    package.train(package.run(undisturbed))
    for limit in (10, 4000, 12000):
        with monkeypatch.context() as patch:
            enter_at_the_second_checkpoint(package, patch, small_files(limit))
            with pytest.raises(
                UserError, match=r"could not write .*step-00000008.*step-00000004.*free sp"
            ):
                resumed(starved)
        kept = [path.name for path in (starved / "checkpoints").iterdir()]
        assert kept == ["step-00000004"], limit
    resumed(starved)
    assert package.outcome(starved) == package.outcome(undisturbed)


def test_a_disk_that_becomes_read_only_keeps_the_last_checkpoint(
    package, tmp_path, resumed, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        broken = failing(below(out / "checkpoints", errno.EROFS))
        enter_at_the_second_checkpoint(package, patch, broken)
        with pytest.raises(UserError, match=r"Read-only.*step-00000004"):
            resumed(out)
    resumed(out)
    assert checkpoints.latest_checkpoint(out / "checkpoints").name.endswith("8")


def test_a_read_only_folder_is_refused_before_training(package, tmp_path):
    out = tmp_path / "run"
    with (
        failing(below(tmp_path, errno.EROFS)),
        pytest.raises(UserError, match=r"cannot write in .*Read-only.*another --out"),
    ):
        package.train(package.run(out))
    assert not out.exists()
