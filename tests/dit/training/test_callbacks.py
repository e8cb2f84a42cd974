"""Logs and callbacks of a training: their files, and that they change no bit of it."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from complexity_dit.config import EvalConfig
from complexity_dit.data.latents import load_training_data
from complexity_dit.evaluation.distances import Statistics
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.evaluation.image_sets import KeptStatistics, write_statistics
from complexity_dit.training import callbacks
from complexity_dit.training.callbacks import HeldoutLoss, NoiseLevels
from complexity_dit.training.network import build_model
from complexity_dit.training.train import is_checkpoint_step, train
from inl_core.run import automatic
from inl_core.run.errors import UserError
from support.outcomes import outcome, rows_of
from support.pictures import pictures, write_folder


@pytest.fixture
def watched(small_run, monkeypatch):
    """A run with every callback at steps 4 and 8; features come from a random network."""
    monkeypatch.setattr(EvalConfig, "brief", partial(EvalConfig.brief, weights="random"))
    monkeypatch.setattr(callbacks, "GRID_ROWS", 2)
    return dataclasses.replace(
        small_run, sample_every=4, evaluate_every=4, evaluate_num_images=4, dynamics_every=4,
        checkpoint_every=8,
    )  # fmt: skip


def test_callbacks_write_their_files_and_change_no_bit(watched, small_run, tmp_path):
    plain = dataclasses.replace(small_run, out=str(tmp_path / "plain"), noise_bins=0)
    train(plain)
    train(watched)
    run = Path(watched.out)
    assert outcome(run) == outcome(tmp_path / "plain")
    assert not (tmp_path / "plain" / "noise_levels.csv").exists()

    names = [f"step-0000000{step}-{weights}.png" for step in (4, 8) for weights in ("ema", "raw")]
    assert sorted(p.name for p in (run / "samples").iterdir()) == names
    pictures = [Image.open(run / "samples" / name) for name in names]
    assert pictures[0].size == pictures[1].size
    assert len({picture.tobytes() for picture in pictures}) == 4

    metrics = rows_of(run / "metrics.csv")
    assert {row["step"] for row in metrics} == {"4", "8"}
    assert {"fd_random", "kd_random_mean"} < {row["metric"] for row in metrics}
    result = json.loads((run / "evaluations" / "step-00000008" / "result.json").read_text())
    assert {r["metric"]: float(r["value"]) for r in metrics if r["step"] == "8"} == (
        result["metrics"]
    )
    assert result["settings"]["data"]["holdout"] == watched.data.holdout
    assert result["settings"]["sample"]["guidance_scale"] == 1.0

    dynamics = rows_of(run / "dynamics.csv")
    assert [(r["step"], r["layer"]) for r in dynamics] == [
        (step, f"blocks.{layer}.dynamics") for step in ("4", "8") for layer in (0, 1)
    ]
    assert all(0 < float(r["spectral_radius"]) < 1 for r in dynamics)
    assert all(float(r["velocity_abs_max"]) > 0 for r in dynamics)

    # A kill between the checkpoint and its callbacks: a resume makes up for them, bit by bit.
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text("".join(x for x in text.splitlines(True) if x[0] != "8"))
    (run / "samples" / names[2]).unlink()
    train(dataclasses.replace(watched, resume="auto"))
    assert rows_of(run / "metrics.csv") == metrics
    assert (run / "samples" / names[2]).exists()


def test_the_feature_network_of_a_training_runs_in_bf16_where_there_are_units(
    watched, tmp_path, monkeypatch
):
    def recorded(name, **changes):
        run = dataclasses.replace(watched, out=str(tmp_path / name), steps=4, **changes)
        train(run)
        result = tmp_path / name / "evaluations" / "step-00000004" / "result.json"
        return json.loads(result.read_text())["settings"]["extractor"]["dtype"]

    monkeypatch.setattr(automatic, "bf16_units", lambda device: "the CPU has some")
    assert recorded("auto") == "bfloat16"
    assert recorded("named", evaluate_dtype="float32") == "float32"
    real, other = (write_folder(tmp_path / name, pictures(6, 1)) for name in ("real", "other"))
    saving = EvalConfig.brief(num_images=6, measures=["fid"], save_statistics=True)
    evaluate(real, other, tmp_path / "kept", saving)
    statistics = str(tmp_path / "kept" / "reference.npz")
    assert recorded("statistics", evaluate_reference=statistics) == "float32"
    monkeypatch.setattr(automatic, "bf16_units", lambda device: None)
    assert recorded("plain") == "float32"


def test_an_evaluated_step_is_a_checkpoint(small_run):
    settings = dataclasses.replace(small_run, evaluate_every=3, checkpoint_every=100)
    assert [step for step in range(1, 9) if is_checkpoint_step(step, settings)] == [3, 6, 8]


def foreign_statistics(folder):
    identity = {
        "name": "inception",
        "weights_sha256": "0" * 64,
        "resize": "tf1",
        "dtype": "float32",
    }
    statistics = Statistics(np.zeros(8), np.eye(8), 10)
    write_statistics(folder / "x.npz", KeptStatistics(statistics, identity))
    return str(folder / "x.npz")


def mixed_sizes(folder):
    write_folder(folder / "mixed", pictures(3, 1))
    write_folder(folder / "large", pictures(1, 1, 24))
    (folder / "large" / "0000.png").rename(folder / "mixed" / "9.png")
    return str(folder / "mixed")


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (lambda folder: str(folder / "nowhere"), {}, r"nowhere is not a folder"),
        (lambda folder: str(folder / "nowhere.npz"), {}, r"nowhere.npz"),
        (lambda folder: str(write_folder(folder / "x", pictures(1, 1))), {}, "holds 1 images"),
        (mixed_sizes, {}, r"9.png is 24x24 and 0000.png is 20x20"),
        (foreign_statistics, {}, "was made with another extractor"),
        (lambda folder: None, {"holdout": 0.0}, "'heldout' of art is empty"),
    ],
    ids=["missing", "missing npz", "one picture", "sizes", "extractor", "no held-out part"],
)
def test_a_reference_that_cannot_be_used_ends_a_run_before_its_first_step(
    watched, tmp_path, make, changes, words
):
    data = dataclasses.replace(watched.data, holdout=changes.pop("holdout", 0.1))
    run = dataclasses.replace(watched, evaluate_reference=make(tmp_path), data=data, **changes)
    with pytest.raises(UserError, match=rf"^evaluate_reference .*{words}"):
        train(run)
    assert rows_of(run.out) == []


def test_noise_levels_are_means_by_bin(tmp_path):
    levels = NoiseLevels(4, tmp_path, 0, Accelerator(cpu=True))
    draw = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 40, 3, 4, 4, generator=draw)
    timestep = 1000 * torch.rand(40, generator=draw) * 0.7  # the last bin stays empty
    timestep[0] = 1000  # t = 1 belongs to the last bin, not to one after it
    for part in (slice(0, 10), slice(10, 40)):
        levels.add(timestep[part], prediction[part], target[part])
    levels.flush(7)
    errors = (prediction - target).square().mean((1, 2, 3))
    (row,) = rows_of(tmp_path / "noise_levels.csv")
    assert list(row) == ["step", "t_0.00_0.25", "t_0.25_0.50", "t_0.50_0.75", "t_0.75_1.00"]
    for i, value in enumerate(list(row.values())[1:]):
        mine = (timestep >= 250 * i) & (timestep < 250 * (i + 1) + (i == 3))
        assert float(value) == pytest.approx(float(errors[mine].mean()), rel=1e-5)
    levels.add(timestep[1:2], prediction[1:2], target[1:2])
    levels.flush(8)
    assert list(rows_of(tmp_path / "noise_levels.csv")[1].values()).count("") == 3


def test_a_tracker_that_is_not_installed_is_named(small_run):
    with pytest.raises(UserError, match=r"report_to wandb needs the package wandb.*pip install"):
        train(dataclasses.replace(small_run, report_to="wandb"))
    assert not Path(small_run.out).exists()


def test_no_tracker(small_run):
    train(dataclasses.replace(small_run, report_to="none"))
    assert not (Path(small_run.out) / "logs").exists()
    assert len(rows_of(Path(small_run.out) / "train_log.csv")) == small_run.steps


def test_the_heldout_loss_has_the_same_pictures_and_noise_every_time(small_run, tmp_path):
    run = dataclasses.replace(
        small_run, steps=60, batch_size=8, checkpoint_every=30, heldout_every=10,
        heldout_num_images=5, ema=dataclasses.replace(small_run.ema, decay=0.5),
    )  # fmt: skip
    plain = dataclasses.replace(run, heldout_every=0, out=str(tmp_path / "plain"))
    train(plain)
    train(run)
    assert outcome(run.out) == outcome(plain.out)
    rows = rows_of(Path(run.out) / "heldout_log.csv")
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    curve = [float(row["loss"]) for row in rows]
    assert curve[-1] < curve[0]
    # Any batch gives the same numbers: the five pictures, each with its own noise.
    parts = dataclasses.replace(run, gradient_accumulation_steps=8, out=str(tmp_path / "parts"))
    data, heldout = (load_training_data(run.data, split) for split in ("train", "heldout"))
    assert len(heldout) > 5
    found = []
    for config in (run, parts):
        callback = HeldoutLoss(config, heldout, Accelerator(cpu=True), 0)
        torch.manual_seed(0)
        network = build_model(config, data)
        torch.nn.init.normal_(network.proj_out.weight)
        callback._measure(network.eval(), 99)
        found.append(float(rows_of(Path(config.out) / "heldout_log.csv")[-1]["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_run_without_held_out_pictures_has_no_heldout_loss(small_run):
    data = dataclasses.replace(small_run.data, holdout=0.0)
    with pytest.raises(UserError, match="'heldout' of art is empty"):
        train(dataclasses.replace(small_run, heldout_every=4, data=data))
