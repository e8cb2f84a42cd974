"""Names of trained models in `checkpoints/`."""

from pathlib import Path

from inl_core.run import shipped as module
from inl_core.run.shipped import shipped

NAMES = {"painter": "somebody/painter"}


def test_a_name_means_a_folder_of_the_clone_or_a_hub_id(tmp_path, monkeypatch):
    work, clone = tmp_path / "work", tmp_path / "clone"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(module, "__file__", str(clone / "packages/inl-core/src/inl_core/run/s.py"))
    assert shipped("painter", NAMES) == "somebody/painter"
    assert shipped("other", NAMES) == "other"
    in_clone, here = (root / "checkpoints/painter" for root in (clone, work))
    in_clone.mkdir(parents=True)
    assert shipped("painter", NAMES) == str(in_clone)
    here.mkdir(parents=True)
    assert shipped("painter", NAMES) == str(here)
    Path("painter").mkdir()  # the user's own folder of that name
    assert shipped("painter", NAMES) == "painter"


def test_an_installation_near_the_root_has_no_clone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "__file__", "/site/inl_core/run/shipped.py")
    assert shipped("painter", NAMES) == "somebody/painter"


def test_the_clone_is_the_root_of_this_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "FOLDER", "configs")  # one that is there
    assert (Path(shipped("dit", {"dit": ""})) / "demo.yaml").is_file()
