"""Comparison of two results, which is rejected if their settings differ."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from complexity_dit.evaluation.report import compare, different_settings
from inl_core.run.errors import UserError

RESULT: dict[str, Any] = {
    "metrics": {"fid": 20.0, "kid_mean": 0.01},
    "n_generated": 100,
    "n_reference": 100,
    "settings": {
        "target": "a",
        "eval": {"seed": 0, "kid_subsets": 100, "resize": "tf1", "cache": True},
        "extractor": {"name": "inception", "dtype": "float32"},
        "sample": {"guidance_scale": 2.0, "batch_size": 64},
    },
    "weights_sha256": "w",
    "reference_fingerprint": "r",
}


def write(path: Path, **changes: Any) -> Path:
    result = copy.deepcopy(RESULT)
    for name, value in changes.items():
        place, *keys = [result, *name.split("__")]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    path.write_text(json.dumps(result))
    return path


def test_results_with_equal_settings_are_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "result.json")
    b = write(
        tmp_path / "b.json",
        metrics={"fid": 18.5, "fid_train": 4.0},
        settings__target="b",
        settings__eval__cache=False,
        settings__sample__batch_size=1,
    )
    lines = compare(tmp_path, b).splitlines()  # a folder stands for its result.json
    assert lines[0] == f"A = {tmp_path} (a)"
    assert [line.split() for line in lines[2:]] == [
        ["A", "B", "B", "-", "A"],
        ["fid", "20", "18.5", "-1.5"],
        ["kid_mean", "0.01"],
        ["fid_train", "4"],
    ]
    assert different_settings(json.loads(a.read_text()), json.loads(b.read_text())) == {}


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("n_generated", "n_generated: 100 and 7"),
        ("weights_sha256", "weights_sha256: w and 7"),
        ("reference_fingerprint", "reference_fingerprint: r and 7"),
        ("settings__eval__resize", "eval.resize: tf1 and 7"),
        ("settings__extractor__dtype", "extractor.dtype: float32 and 7"),
        ("settings__sample__guidance_scale", "sample.guidance_scale: 2.0 and 7"),
        ("settings__kid", "kid: nothing and 7"),
    ],
)
def test_errors_name_every_differing_setting(tmp_path: Path, field: str, shown: str) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", **{field: 7})
    with pytest.raises(UserError, match="different settings") as caught:
        compare(a, b)
    assert f"  {shown}\n" in str(caught.value)


def test_allowed_differences_are_listed(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json")
    b = write(tmp_path / "b.json", settings__sample__guidance_scale=1.0, settings__eval__seed=3)
    text = compare(a, b, ["sample", "eval.seed"])
    assert "different by --allow: sample.guidance_scale: 2.0 and 1.0" in text
    with pytest.raises(UserError) as caught:
        compare(a, b, ["sample.guidance", "eval.seed"])  # a prefix ends at a dot
    assert "eval.seed" not in str(caught.value)


def test_a_setting_that_older_results_lack_has_the_value_it_had(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json")
    compare(old, write(tmp_path / "off.json", settings__sample__internal_guidance_scale=1.0))
    on = write(tmp_path / "on.json", settings__sample__internal_guidance_scale=2.0)
    with pytest.raises(UserError, match=r"sample\.internal_guidance_scale: 1\.0 and 2\.0"):
        compare(old, on)


def test_files_that_are_not_a_result_are_rejected(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"metrics": {}}')
    with pytest.raises(UserError, match=r"b\.json is not a result\.json"):
        compare(a, tmp_path / "b.json")
    with pytest.raises(UserError, match="cannot be read as a result"):
        compare(a, tmp_path / "none.json")
