"""Two trainings in one folder, and what a killed one leaves behind; for both packages."""

import pytest

from inl_core.run.errors import UserError
from support.locks import locked_elsewhere


def test_a_second_training_in_the_folder_is_refused(package, tmp_path, resumed):
    run = tmp_path / "run"
    with locked_elsewhere(run) as holder:
        for resume in ("none", "auto"):
            with pytest.raises(UserError, match=rf"another run, process {holder.pid} on .*--out"):
                resumed(run, resume)
        assert [path.name for path in run.iterdir()] == [".lock"]


def test_the_remains_of_a_killed_training_are_cleared(package, tmp_path, resumed):
    run = tmp_path / "run"
    with locked_elsewhere(run):
        pass
    assert (run / ".lock").exists()
    (run / f".complexity-{package.name}-run").touch()
    for name in (
        ".step-00000004.0123abcd.complexity-partial", ".step-00000002.0123abcd.complexity-removed",
        ".step-00000004.partial", ".trainer.partial", ".step-00000002.removed",
    ):  # fmt: skip
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "half").write_text("of it")
    resumed(run)
    assert [path.name for path in run.rglob(".*")] == [f".complexity-{package.name}-run"]
