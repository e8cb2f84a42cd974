"""The recipe table: rows change fields that exist, the DiT trains in our loop, times add up."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from complexity_dit.config import TrainConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

ROWS = [
    "diffusers-dit", "flow-none", "flip", "logit-normal", "time-shift", "writes-sample",
    "label-dropout", "direction-loss", "token-dropping", "value-residual", "balanced-labels",
    "timestep-routing", "muon", "dynamics", "full-none", "full", "five-none", "five",
    "five-muon", "three-none", "three",
]  # fmt: skip


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when they are run."""


@pytest.mark.parametrize("row", ROWS)
def test_a_row_changes_what_it_names_and_nothing_else(row: str) -> None:
    from benchmarks.recipe import recipe

    assert list(recipe.ROWS) == ROWS
    plain = recipe.row_config("flow-none", "out", 3200, 1, {})
    changed = recipe.row_config(row, "out", 3200, 1, {})
    assert (changed.steps, changed.batch_size, changed.resume) == (100, 32, "auto")
    back = {}
    for field in recipe.ROWS[row]:
        value = plain
        for name in field.split("."):
            value = getattr(value, name)
        back[field] = value
    assert recipe.with_fields(changed, back) == plain
    assert (row == "flow-none") == (changed == plain)


def test_a_field_that_does_not_exist_is_named() -> None:
    from benchmarks.recipe import recipe

    with pytest.raises(ValueError, match="OptimConfig has no field 'rate'"):
        recipe.with_fields(TrainConfig(), {"optim.rate": 1.0})


def test_the_dit_starts_at_zero_and_never_drops_a_label() -> None:
    from benchmarks.common import diffusers_dit

    torch.manual_seed(0)
    model = diffusers_dit.DiffusersDiT(8, 2, 3, 32, 2, 2, ["style"], [3]).train()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(500)
    labels = torch.tensor([[1], [-1]])
    assert not model(x, t, labels).sample.any()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first = model(x, t, labels).sample
    assert first.shape == x.shape
    assert all(torch.equal(model(x, t, labels).sample, first) for _ in range(20))
    null = model(x, t, None).sample
    torch.testing.assert_close(null[1], first[1])
    assert not torch.allclose(null[0], first[0])


def test_the_dit_trains_resumes_and_paints_in_our_loop(small_run: TrainConfig) -> None:
    from benchmarks.common.diffusers_dit import DiffusersDiT, build_diffusers_dit

    from complexity_dit.pipelines.sampling import load_pipeline
    from complexity_dit.training.train import train

    config = replace(
        small_run,
        data=replace(small_run.data, label_fields=["style"]),
        objective=replace(small_run.objective, prediction_type="epsilon"),
    )
    whole = load_pipeline(str(train(config, build_diffusers_dit)))
    assert isinstance(whole.transformer, DiffusersDiT)
    whole.set_progress_bar_config(disable=True)
    image = whole(style=0, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 16, 16, 3)

    half = replace(config, out=config.out + "-2", resume="auto")
    train(half, build_diffusers_dit)
    last = Path(half.out) / "checkpoints" / "step-00000008"
    for path in sorted(last.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last.rmdir()
    resumed = load_pipeline(str(train(half, build_diffusers_dit)))
    for a, b in zip(whole.transformer.parameters(), resumed.transformer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_killed_session_counts_up_to_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.recipe import recipe

    now = [100.0]
    monkeypatch.setattr(recipe.time, "time", lambda: now[0])

    def session() -> recipe.Sessions:
        return recipe.Sessions(tmp_path / "sessions.json", tmp_path / "run")

    session().begin()  # killed before any checkpoint
    now[0] = 200.0
    session().begin()  # killed after a checkpoint at 260
    state = tmp_path / "run/checkpoints/step-00000005/state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    os.utime(state, (260.0, 260.0))
    now[0] = 400.0
    last = session()
    last.begin()
    now[0] = 430.0
    last.end()
    assert last.seconds() == 60 + 30
    assert [s["seconds"] for s in json.loads((tmp_path / "sessions.json").read_text())] == [60, 30]


def test_runs_of_a_series_stand_in_one_table() -> None:
    from benchmarks.common import results
    from benchmarks.pages import tables

    blank = dict.fromkeys(results.FIELDS, "")
    rows = [
        blank | {"bench": "recipe", "case": case, "metric": "fid", "value": value, "commit": commit,
                 "command": "c", "hardware": "A"}
        for case, value, commit in (("a", "9", "1"), ("b", "8", "1"), ("a", "7", "2"))
    ]  # fmt: skip
    done = tables.rewritten("<!-- table: recipe -->\n<!-- end -->\n", rows)
    assert done.count("| case |") == 1
    assert "| a | 2 | 7 |" in done
    assert "| b | 1 | 8 |" in done
    assert "9" not in done


def test_the_page_says_how_far_the_goal_is_and_what_is_missing() -> None:
    from benchmarks.pages import recipe_page, tables
    from benchmarks.recipe import recipe

    def row(case: str, seed: int, images: int, **metrics: float) -> list[dict[str, str]]:
        about = {"bench": "recipe", "case": case, "shape": f"seed {seed}", "hardware": "A",
                 "command": f"recipe ROW --images {images}", "unit": ""}  # fmt: skip
        values = {"images": images, **metrics}
        return [about | {"metric": name, "value": str(value)} for name, value in values.items()]

    rows = row("flow-none", 0, 100_000, fid=100.0) + row("full", 0, 100_000, fid=70.0)
    marks = "<!-- table: recipe {} -->\n<!-- end -->\n"
    ratios = tables.rewritten(marks.format("ratios"), rows)
    assert "| 100,000 | full | 0 | 70.0 | 100.0 | -30.0 | 0.70 |  |" in ratios
    step = {"bench": "step", "case": "full", "metric": "ratio", "value": "0.716"}
    steps = [step | {"unit": "x flow-none"}, step | {"value": "9", "unit": "x five-muon"}]
    timed = tables.rewritten(marks.format("ratios"), rows + steps)
    assert "| -30.0 | 0.70 | 0.72 |" in timed
    missing = tables.rewritten(marks.format("missing"), rows)
    short, _, long = missing.partition("--images 300000")
    left = [name for name in recipe.ROWS if name not in ("flow-none", "full")]
    assert f"for row in {' '.join(left)}; do" in short
    assert "  recipe $row --images 100000 \\\n" in short
    assert long.count("for row in flow-none full five three; do") == 1  # the second seed
    everything = [
        number
        for images, (_, seeds, wanted) in recipe_page.PLAN.items()
        for seed in seeds
        for case in wanted or recipe.ROWS
        for number in row(case, seed, images, fid=1.0)
    ]
    assert recipe_page.missing(everything) == "None."


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)
def test_a_row_and_the_sampler_table_run_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both programs end to end on a tiny run; what is there already is not made again."""
    from benchmarks.common import results
    from benchmarks.recipe import recipe, sampler_table

    def rows(bench: str) -> dict[tuple[str, str], str]:
        found = [r for r in results.read_rows(tmp_path / "rows.csv") if r["bench"] == bench]
        assert all(str(tmp_path) not in r["command"] for r in found)
        return {(r["case"], r["metric"]): r["value"] for r in found}

    def call(program, *arguments) -> None:
        monkeypatch.setattr("sys.argv", [program.__name__, *map(str, arguments)])
        program.main()

    common = ("--weights", "random", "--num_images", 8, "--rows", tmp_path / "rows.csv")
    row = (
        "flow-none", "--source", "art", "--images", 16, "--out", tmp_path / "row",
        "--evaluations", 2, *common, "--override", "data.resolution=16", "data.num_images=64",
        "batch_size=8", "model.size=nano", "optim.warmup_steps=1",
        'model.overrides={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}',
    )  # fmt: skip
    call(recipe, *row)
    first = rows("recipe")
    assert first["flow-none", "images"] == "16"
    assert float(first["flow-none", "speed"]) > 0
    assert float(first["flow-none", "fd_random"]) > 0
    monkeypatch.setattr(recipe, "train", None)
    monkeypatch.setattr(recipe, "evaluate", None)
    call(recipe, *row)
    assert rows("recipe") == first

    pipeline = tmp_path / "row/run/pipeline"
    table = (
        pipeline, "--reference", "art", "--out", tmp_path / "samplers", *common,
        "--evaluations", 4, "--scales", 2, "--intervals", "0.2-0.6", "--guided_steps", 4,
    )  # fmt: skip
    call(sampler_table, *table)
    guided = "Euler 4 steps, guidance 2 in 0.2-0.6"  # levels 1, 0.75, 0.5, 0.25
    found = rows("sampler")
    counts = {case: value for (case, metric), value in found.items() if metric == "evaluations"}
    assert counts == {"Euler 4": "4", "Heun 4": "3", "DPM-Solver++ 2M 4": "4", guided: "6"}
    monkeypatch.setattr(sampler_table, "evaluate", None)
    call(sampler_table, *table)
    assert len(results.read_rows(tmp_path / "rows.csv")) == len(first) + len(found)


def test_the_floor_is_the_training_paintings_with_and_without_the_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.common import results
    from benchmarks.recipe import recipe_floor

    from complexity_dit.config import DataConfig
    from complexity_dit.models.autoencoder import TinyAutoencoder

    torch.manual_seed(0)
    vae = TinyAutoencoder(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), pool_channels=0,
    )  # fmt: skip
    pipe = SimpleNamespace(sample_size=16, vae=vae.eval())
    monkeypatch.setattr(recipe_floor, "load_pipeline", lambda folder: pipe)
    monkeypatch.setattr(
        recipe_floor, "trained_on", lambda folder: DataConfig(num_images=64, holdout=0.2)
    )
    arguments = ("PIPELINE", "--reference", "art", "--num_images", 8, "--weights", "random")
    monkeypatch.setattr(
        "sys.argv", ["recipe_floor", *map(str, arguments), "--rows", str(tmp_path / "rows.csv")]
    )
    recipe_floor.main()
    found = {
        (row["case"], row["metric"]): float(row["value"])
        for row in results.read_rows(tmp_path / "rows.csv")
    }
    plain, coded = "training paintings", "training paintings through the autoencoder"
    assert found[plain, "n"] == found[coded, "n"] == 8
    assert 0 < found[plain, "fd_random"] < found[coded, "fd_random"]
