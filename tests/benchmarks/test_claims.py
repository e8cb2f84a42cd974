"""Measures of denoising paths, colours and FID over training follow their definitions."""

import json
import math

import numpy as np
import pytest
import torch
from benchmarks.common import results as result_file
from benchmarks.study import claims_dit as claims
from benchmarks.study import claims_measures as measures
from benchmarks.study import claims_report

from complexity_dit.evaluation.image_sets import array_images
from complexity_dit.seeding import generator_for
from complexity_dit.training.train import train
from support.benchmark_rows import call, row

# Paths ------------------------------------------------------------------------------------------


def test_the_curvature_is_that_of_the_polygon():
    """A straight line, a half circle of 9 points, a way there and back; at any size and place."""
    angle = torch.linspace(0, math.pi, 9, dtype=torch.float64)
    nowhere = torch.zeros(9, dtype=torch.float64)
    straight = torch.stack([torch.linspace(0, 1, 9).double() ** 3, nowhere, nowhere], -1)
    half = torch.stack([angle.cos(), angle.sin(), nowhere], -1)
    back = torch.stack([4 - (torch.arange(9.0).double() - 4).abs(), nowhere, nowhere], -1)
    path = torch.stack([straight, half, back], 1)
    # Eight chords of a half circle turn seven times by π/8; each is 2 sin(π/16) long.
    wanted = torch.tensor([0, 7 * math.pi / 8, math.pi], dtype=torch.float64)
    for moved in (path, 1e-3 * path + 7, path.flip(0)):
        torch.testing.assert_close(measures.total_curvature(moved), wanted, rtol=1e-6, atol=1e-6)
    found = measures.length_over_chord(path)
    assert float(found[0]) == pytest.approx(1)
    assert float(found[1]) == pytest.approx(8 * math.sin(math.pi / 16))
    assert math.isinf(float(found[2]))


def test_repeated_points_of_a_path_do_not_turn_it():
    corner = torch.tensor([[0.0, 0], [1, 0], [1, 0], [1, 0], [1, 1]])[:, None]
    assert float(measures.total_curvature(corner)) == pytest.approx(math.pi / 2)
    still = torch.ones(5, 1, 2)
    assert float(measures.total_curvature(still)) == 0
    assert float(measures.length_over_chord(still)) == 1


def test_the_expected_picture_is_the_prediction_of_the_network(pipe):
    """x − level · velocity at every state of an Euler walk that is made here by hand."""
    labels, steps = torch.tensor([[0, 1], [2, -1], [1, 0]]), 5
    (path,) = claims.expected_pictures(pipe, labels, steps, seed=3)
    shift = pipe.scheduler.config.shift
    levels = [shift * s / (1 + (shift - 1) * s) for s in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)]
    x = torch.stack(
        [torch.randn(3, 8, 8, generator=generator_for(3, "sample", i)) for i in range(3)]
    )
    with torch.no_grad():
        for k in range(steps):
            u = pipe.transformer(x, torch.tensor(1000 * levels[k]), labels).sample
            expected = (x - levels[k] * u).flatten(1).double()
            torch.testing.assert_close(path[k], expected, rtol=1e-3, atol=1e-4)
            x = x + (levels[k + 1] - levels[k]) * u
    torch.testing.assert_close(path[-1], x.flatten(1).double(), rtol=1e-3, atol=1e-4)
    halves = list(claims.expected_pictures(pipe, labels, steps, seed=3, batch_size=2))
    torch.testing.assert_close(torch.cat(halves, 1), path, rtol=1e-3, atol=1e-4)


# Colours ----------------------------------------------------------------------------------------


def test_histograms_count_cells_of_colours():
    picture = np.zeros((1, 2, 2, 3), np.uint8)
    picture[0, 0, 0], picture[0, 0, 1] = (255, 31, 32), (255, 0, 33)
    found = measures.histograms(picture)
    assert found.shape == (1, 512)
    assert found[0, 7 * 64 + 0 * 8 + 1] == 0.5
    assert found[0, 0] == 0.5
    assert measures.hellinger(found[0], found[0]) == 0
    assert measures.hellinger(np.array([1.0, 0]), np.array([0.0, 1])) == 1
    assert measures.hellinger(np.array([1.0, 0]), np.array([0.5, 0.5])) == pytest.approx(
        math.sqrt(1 - math.sqrt(0.5))
    )


def test_colours_are_compared_style_by_style():
    """Two styles of one colour each: right, exchanged; and a mixture that has but the palette."""
    red, blue = (np.zeros((20, 4, 4, 3), np.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255, 255
    real, styles = np.concatenate([red, blue]), np.repeat([0, 1], 20)
    assert measures.colour_distances(real, styles, real, styles) == (0, 0, 2)
    assert measures.colour_distances(real, 1 - styles, real, styles) == (1, 1, 2)
    rare = np.where(np.arange(40) < 2, 1, 0)  # two of a style say nothing about it
    assert measures.colour_distances(real[:22], rare[:22], real, styles)[2] == 1
    with pytest.raises(ValueError, match="no style has 20 pictures on both sides, of 5 and 40"):
        measures.colour_distances(real[:5], styles[:5], real, styles)
    mixed = np.concatenate([red, blue])
    one = np.zeros(40, int)
    palette, picture, _ = measures.colour_distances(mixed, one, mixed, one)
    assert palette == 0
    assert picture == pytest.approx(math.sqrt(1 - math.sqrt(0.5)))


def test_the_floor_has_as_many_of_each_style():
    class Options:
        field, seed = "style", 0

    images = np.zeros((30, 2, 2, 3), np.uint8)
    labels = np.repeat([0, 1, -1], 10)[:, None]
    known = {"labels": labels, "label_names": {"style": ["a", "b"]}}
    train = type(array_images(images))(**(vars(array_images(images)) | known))
    pictures, styles = claims.as_many(train, np.array([0] * 3 + [1] * 12 + [-1] * 4), Options)
    assert len(pictures) == 13
    assert np.bincount(styles).tolist() == [3, 10]


# Steadiness -------------------------------------------------------------------------------------


def test_steadiness_excludes_the_trend():
    steps = [1000, 2000, 3000, 4000, 5000]
    falling = measures.steadiness(steps, [50.0, 40, 30, 20, 10])
    assert falling["mean"] == pytest.approx(30)
    assert falling["variance"] == pytest.approx(250)
    assert falling["variance about its trend"] == pytest.approx(0, abs=1e-20)
    # Around any line of slope 0: residuals 0.4 or 0.6 off the mean of 1, 0, 1, 0, 1.
    shaking = measures.steadiness(steps, [1.0, 0, 1, 0, 1])
    assert shaking["variance about its trend"] == pytest.approx(1.2 / 3)
    with pytest.raises(ValueError, match="needs at least 3"):
        measures.steadiness([1, 2], [1.0, 2.0])


def results(folder, values, **settings):
    folder.mkdir()
    for i, value in enumerate(values):
        result = {
            "metrics": {"fid": value}, "settings": {"target": str(i), **settings},
            "n_generated": 8, "n_reference": 8,
        }  # fmt: skip
        (folder / f"result-step-{1000 * (i + 1):08d}.json").write_text(json.dumps(result))
    return folder


def test_fid_is_read_from_the_last_results_of_a_folder(tmp_path, monkeypatch):
    values = [200.0, 50, 40, 30, 20, 11]
    one, two = results(tmp_path / "a", values), results(tmp_path / "b", values, seed=1)
    rows = tmp_path / "rows.csv"

    def run(*arguments):
        call(monkeypatch, claims, "fid", *arguments, "--source", "art", "--rows", rows)

    run(f"none/4={one}")
    found = {r["metric"]: r for r in result_file.read_rows(rows)}
    assert float(found["fid, variance"]["value"]) == pytest.approx(np.var(values[1:], ddof=1))
    assert float(found["steps between"]["value"]) == 1000
    assert found["fid, mean"]["shape"] == "seed 4, n 8, last 5 checkpoints"
    assert str(tmp_path) not in found["fid, mean"]["command"]
    with pytest.raises(ValueError, match=r"other settings than the first result, seed None and 1"):
        run(f"none/0={one}", f"branch/0={two}")
    with pytest.raises(ValueError, match="has 6 checkpoints, expected 7"):
        run(f"none/0={one}", "--last", 7)
    with pytest.raises(SystemExit):
        run(f"none={one}")


# The commands on trained models -----------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)
def test_all_measures_of_a_trained_run(small_run, tmp_path, monkeypatch, weights_cache):
    small_run.checkpoint_every, small_run.keep_last = 2, 5
    train(small_run)
    monkeypatch.setattr(measures, "FEWEST", 1)
    rows = tmp_path / "rows.csv"
    for arguments in (["paths"], ["colours"], ["fid", "--last", "3", "--weights", "random"]):
        call(
            monkeypatch, claims, *arguments, f"none/0={small_run.out}", "--source", "art",
            "--num_images", 6, "--steps", 4, "--rows", rows, "--out", tmp_path / "out",
        )  # fmt: skip
    found = result_file.read_rows(rows)
    value = {(r["case"], r["metric"]): float(r["value"]) for r in found}
    # Two corners of a path of four points.
    assert 0 < value["none", "total curvature of the expected picture"] < 2 * math.pi
    assert value["none", "length over chord"] >= 1
    assert 0 < value["training paintings", "palette to style"] < value["none", "palette to style"]
    assert value["none", "fd_random, variance"] > 0
    assert value["none", "steps between"] == 2
    assert len(list((tmp_path / "out/none-seed-0").glob("step-*/result.json"))) == 3
    lines = claims_report.claims(found).splitlines()
    assert sum(line.startswith("| network | seeds |") for line in lines) == 3


def test_differences_are_paired_by_seed():
    values = {"none": {0: 1.5, 1: 2.5, 2: 9.0}, "branch": {0: 1.0, 1: 2.0}}
    rows = [
        row("claims_dit", case, "length over chord", value, shape=f"seed {seed}, n 8, 20 steps")
        for case, of_seed in values.items()
        for seed, value in of_seed.items()
    ]
    lines = claims_report.claims(rows).splitlines()
    assert "| branch | 2 | 1.5000 ± 0.7071 | -0.5000 [-0.5000, -0.5000] |" in lines
    assert any(line.startswith("Of each: n 8, 20 steps.") for line in lines)
