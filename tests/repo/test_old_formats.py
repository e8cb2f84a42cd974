"""Files that released versions wrote load in this one and give the numbers they gave then."""

import importlib.util
import json
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(path.parent.name for path in FIXTURES.glob("*/numbers.json"))
TOLERANCE = 1e-4
"""Relative: float32 sums in another order, as another CPU or torch makes them."""


def fixture_maker():
    spec = importlib.util.spec_from_file_location("make", FIXTURES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(found, wanted, where):
    """Equal names, texts and whole numbers; floats within the tolerance of the largest beside."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_close(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        scale = max(abs(number) for number in wanted)
        assert found == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE * scale), where
    else:
        assert found == wanted, where


def test_there_are_fixtures_and_they_are_small():
    assert "0.1.0" in VERSIONS
    for version in VERSIONS:
        size = sum(
            path.stat().st_size for path in (FIXTURES / version).rglob("*") if path.is_file()
        )
        assert size < 500_000, version


@pytest.mark.parametrize("version", VERSIONS)
def test_old_files_give_the_numbers_they_gave(version):
    wanted = json.loads((FIXTURES / version / "numbers.json").read_text())
    found = json.loads(json.dumps(fixture_maker().measured(FIXTURES / version)))
    assert_close(found, wanted, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_old_runs_go_on(version, tmp_path):
    before = fixture_maker().gone_on(FIXTURES / version, tmp_path)
    for name, losses in before.items():
        kept = (FIXTURES / version / name / "train_log.csv").read_text().splitlines()[1:]
        assert len(losses) == len(kept) + 2, name
        assert losses[: len(kept)] == [float(line.split(",")[1]) for line in kept]
        assert all(0 < loss < 10 for loss in losses)
