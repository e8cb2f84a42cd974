"""The recipe: rows change existing fields, diffusers' DiT trains in our loop, times add up."""

import json
import operator
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.common import diffusers_dit, results
from benchmarks.common.diffusers_dit import DiffusersDiT, build_diffusers_dit
from benchmarks.pages import recipe_page, tables
from benchmarks.recipe import precision_study, recipe, recipe_floor, sampler_table

from complexity_dit.config import DataConfig, TrainConfig
from complexity_dit.models.autoencoder import TinyAutoencoder
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training.train import train
from support.benchmark_rows import call, row

ROWS = [
    "diffusers-dit", "flow-none", "flip", "logit-normal", "time-shift", "writes-sample",
    "label-dropout", "token-dropping", "muon", "labels", "no-labels", "clusters", "dynamics",
    "three-none", "three",
]  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_changes_what_it_names_and_nothing_else(name):
    assert list(recipe.ROWS) == ROWS
    plain = recipe.row_config("flow-none", "out", 3200, 1, {})
    changed = recipe.row_config(name, "out", 3200, 1, {})
    assert (changed.steps, changed.batch_size, changed.resume) == (100, 32, "auto")
    back = {}
    for field in recipe.ROWS[name]:
        back[field] = operator.attrgetter(field)(plain)
    assert recipe.with_fields(changed, back) == plain
    assert (name == "flow-none") == (changed == plain)


def test_a_field_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="OptimConfig has no field 'rate'"):
        recipe.with_fields(TrainConfig(), {"optim.rate": 1.0})


def test_the_dit_starts_at_zero_and_never_drops_a_label():
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


def test_the_dit_trains_resumes_and_samples_in_our_loop(small_run):
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
    shutil.rmtree(last)
    resumed = load_pipeline(str(train(half, build_diffusers_dit)))
    for a, b in zip(whole.transformer.parameters(), resumed.transformer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_killed_session_counts_up_to_its_last_checkpoint(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(recipe.time, "time", lambda: now[0])

    def session():
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


def test_runs_of_a_series_share_one_table():
    runs = (("a", "9", "1"), ("b", "8", "1"), ("a", "7", "2"))
    rows = [
        row("recipe", case, "fid", value, commit=commit, date="") for case, value, commit in runs
    ]
    done = tables.rewritten("<!-- table: recipe -->\n<!-- end -->\n", rows)
    assert done.count("| case |") == 1
    assert "| a | 2 | 7 |" in done
    assert "| b | 1 | 8 |" in done
    assert "| 9 |" not in done


def test_ratios_to_the_plain_row_and_missing_runs_are_listed():
    def run(case, seed, images, fid):
        about = {"shape": f"seed {seed}", "command": f"recipe ROW --images {images}"}
        values = {"images": images, "fid": fid}
        return [row("recipe", case, name, value, **about) for name, value in values.items()]

    rows = run("flow-none", 0, 100_000, 100.0) + run("full", 0, 100_000, 70.0)
    marks = "<!-- table: recipe {} -->\n<!-- end -->\n"
    ratios = tables.rewritten(marks.format("ratios"), rows)
    assert "| 100,000 | full | 0 | 70.0 | 100.0 | -30.0 | 0.70 |  |" in ratios
    steps = [
        row("step", "full", "ratio", value, unit=f"x {base}")
        for value, base in ((0.716, "flow-none"), (9, "five-muon"))
    ]
    timed = tables.rewritten(marks.format("ratios"), rows + steps)
    assert "| -30.0 | 0.70 | 0.72 |" in timed
    missing = tables.rewritten(marks.format("missing"), rows)
    short, _, long = missing.partition("--images 300000")
    left = [name for name in recipe.ROWS if name not in ("flow-none", "full")]
    assert f"for row in {' '.join(left)}; do" in short
    assert "  recipe $row --images 100000 \\\n" in short
    assert long.count("for row in flow-none three; do") == 1  # the second seed
    everything = [
        number
        for images, (_, seeds, wanted) in recipe_page.PLAN.items()
        for seed in seeds
        for case in wanted or recipe.ROWS
        for number in run(case, seed, images, 1.0)
    ]
    assert recipe_page.missing(everything) == "None."


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)
def test_a_row_and_the_sampler_table_run_once(tmp_path, monkeypatch):
    """Both scripts end to end on a tiny run; finished work is not repeated."""

    def rows(bench):
        found = [r for r in results.read_rows(tmp_path / "rows.csv") if r["bench"] == bench]
        assert all(str(tmp_path) not in r["command"] for r in found)
        return {(r["case"], r["metric"]): r["value"] for r in found}

    common = ("--weights", "random", "--num_images", 8, "--rows", tmp_path / "rows.csv")
    arguments = (
        "flow-none", "--source", "art", "--images", 16, "--out", tmp_path / "row",
        "--evaluations", 2, *common, "--override", "data.resolution=16", "data.num_images=64",
        "batch_size=8", "model.size=nano", "optim.warmup_steps=1",
        'model.overrides={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}',
    )  # fmt: skip
    call(monkeypatch, recipe, *arguments)
    first = rows("recipe")
    assert first["flow-none", "images"] == "16"
    assert float(first["flow-none", "speed"]) > 0
    assert float(first["flow-none", "fd_random"]) > 0
    monkeypatch.setattr(recipe, "train", None)
    monkeypatch.setattr(recipe, "evaluate", None)
    call(monkeypatch, recipe, *arguments)
    assert rows("recipe") == first

    pipeline = tmp_path / "row/run/pipeline"
    table = (
        pipeline, "--reference", "art", "--out", tmp_path / "samplers", *common,
        "--evaluations", 4, "--scales", 2, "--intervals", "0.2-0.6", "--guided_steps", 4,
    )  # fmt: skip
    call(monkeypatch, sampler_table, *table)
    guided = "Euler 4 steps, guidance 2 in 0.2-0.6"  # levels 1, 0.75, 0.5, 0.25
    found = rows("sampler")
    counts = {case: value for (case, metric), value in found.items() if metric == "evaluations"}
    assert counts == {"Euler 4": "4", "Heun 4": "3", "DPM-Solver++ 2M 4": "4", guided: "6"}
    monkeypatch.setattr(sampler_table, "evaluate", None)
    call(monkeypatch, sampler_table, *table)
    assert len(results.read_rows(tmp_path / "rows.csv")) == len(first) + len(found)
    for other, name in (("--shift", "sample"), ("--num_images", "eval")):
        with pytest.raises(SystemExit, match=f"has another {name}: choose another --out"):
            call(monkeypatch, sampler_table, *table, other, 4)


def test_the_sampler_table_measures_every_guidance_and_saves_the_best(
    small_run, tmp_path, monkeypatch, capsys
):
    train(
        replace(
            small_run, checkpoint_every=4, keep_last=0,
            model=replace(small_run.model, auxiliary_layer=1),
        )
    )  # fmt: skip
    run = tmp_path / "run"
    early = run / "checkpoints" / "step-00000004"
    table = (
        run, "--reference", "art", "--out", tmp_path / "guidance", "--weights",
        "random", "--num_images", 8, "--evaluations", "--guided_steps", 3, "--scales", 2, 3,
        "--intervals", "0-1", "0.8-1",  # of the levels 1, 0.91 and 0.71 all, and two
        "--guide", early, "--bisections", 1, "--recommend", "--rows", tmp_path / "rows.csv",
        "--name", "three",
    )  # fmt: skip
    call(monkeypatch, sampler_table, *table)
    found = results.read_rows(tmp_path / "rows.csv")
    values = {r["case"]: float(r["value"]) for r in found if r["metric"] == "fd_random"}
    assert all(r["shape"].startswith("three, n 8, shift ") for r in found)
    for kind in ("guidance", "autoguidance", "internal guidance"):
        cases = [case for case in values if case.startswith(f"Euler 3 steps, {kind} ")]
        first = {f"Euler 3 steps, {kind} {s} in {i}" for s in (2, 3) for i in ("0-1", "0.8-1")}
        assert first < set(cases)
        later = sorted(set(cases) - first)
        best = min(first, key=values.get).rpartition(" in ")
        edges = [0.4] if best[2] == "0-1" else [0.4, 0.85]
        assert later == [f"{best[0]} in {edge}-1" for edge in edges]
    assert len(values) == 1 + len([case for case in values if " in " in case])
    assert f"the best: {min(values, key=values.get)}" in capsys.readouterr().out

    alone = min((case for case in values if "autoguidance" not in case), key=values.get)
    saved = load_pipeline(str(run / "pipeline")).guidance
    scales = [saved["guidance_scale"], saved["internal_guidance_scale"]]
    kind = alone.partition(", ")[2].partition(" in ")[0]
    expected = {"": [1, 1], "guidance 2": [2, 1], "guidance 3": [3, 1],
                "internal guidance 2": [1, 2], "internal guidance 3": [1, 3]}  # fmt: skip
    assert scales == expected[kind]
    monkeypatch.setattr(sampler_table, "evaluate", None)
    call(monkeypatch, sampler_table, *table)
    assert results.read_rows(tmp_path / "rows.csv") == found


def test_better_edges_lie_halfway_to_the_neighbours_of_the_best():
    assert sampler_table.better_edges({0.0: 1.0, 0.3: 2.0}) == [0.15]
    assert sampler_table.better_edges({0.0: 2.0, 0.3: 1.0}) == [0.15, 0.6]
    assert sampler_table.better_edges({0.0: 2.0, 0.15: 0.5, 0.3: 1.0}) == [0.075, 0.225]
    assert sampler_table.better_edges({0.0: 2.0, 0.9: 1.0}) == [0.45]


def test_the_floor_is_measured_with_and_without_the_autoencoder(tmp_path, monkeypatch):

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
    rows = tmp_path / "rows.csv"
    call(
        monkeypatch, recipe_floor, "PIPELINE", "--reference", "art", "--num_images", 8,
        "--weights", "random", "--rows", rows,
    )  # fmt: skip
    found = {(r["case"], r["metric"]): float(r["value"]) for r in results.read_rows(rows)}
    plain, coded = "training paintings", "training paintings through the autoencoder"
    assert found[plain, "n"] == found[coded, "n"] == 8
    assert 0 < found[plain, "fd_random"] < found[coded, "fd_random"]


def test_the_arms_of_the_precision_study_differ_in_precision_only(tmp_path, monkeypatch):
    """A finished arm is not trained again, and one of another length is refused."""
    plain, mixed = (
        precision_study.arm_config(arm, 3, tmp_path, 96) for arm in precision_study.ARMS
    )
    assert (plain.mixed_precision, mixed.mixed_precision) == ("no", "bf16")
    assert (plain.seed, plain.steps, plain.resume) == (3, 3, "auto")
    assert replace(plain, mixed_precision="bf16", out="") == replace(mixed, out="")

    folder = tmp_path / "bf16-3"
    folder.mkdir()
    (folder / "result.json").write_text('{"images": 96, "loss": 1.5}')
    monkeypatch.setattr(precision_study, "LABS", {"dit": None})
    assert precision_study.held_out_loss("bf16", 3, tmp_path, 96) == 1.5
    with pytest.raises(SystemExit, match="was trained on 96 images: choose another --out"):
        precision_study.held_out_loss("bf16", 3, tmp_path, 128)
