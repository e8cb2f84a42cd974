"""What a resumed run takes over from its settings, what it refuses, and what it records."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

from complexity_dit.config import DataConfig, TrainConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.training import train as train_module
from complexity_dit.training.callbacks import TrainLog
from complexity_dit.training.network import build_model
from complexity_dit.training.objective import build_scheduler
from complexity_dit.training.state import SavedPipeline, build_state
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.outcomes import last_checkpoint, rows_of
from support.pictures import pictures, write_folder
from support.processes import python


def changed(config, **settings):
    """A config with other values of dotted settings (dots written as two underscores)."""
    for name, value in settings.items():
        group, _, field = name.rpartition("__")
        if group:
            value = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group or field: value})
    return config


def record_of(run):
    return json.loads((last_checkpoint(run) / "state.json").read_text())


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"optim__lr": 1e-4}, lambda s: s.lr_scheduler.base_lrs == [1e-4, 1e-4]),
        ({"optim__beta1": 0.5}, lambda s: s.optimizer.param_groups[0]["betas"] == (0.5, 0.95)),
        ({"optim__beta2": 0.5}, lambda s: s.optimizer.param_groups[1]["betas"] == (0.9, 0.5)),
        (
            {"optim__weight_decay": 0.3},
            lambda s: [g["weight_decay"] for g in s.optimizer.param_groups] == [0.3, 0.0],
        ),
        (
            {"optim__schedule": "constant_with_warmup"},
            lambda s: s.lr_scheduler.get_last_lr() == [5e-3, 5e-3],
        ),
        (
            {"optim__warmup_steps": 16, "steps": 99},
            lambda s: s.optimizer.param_groups[0]["lr"] == 5e-3 * 8 / 16,
        ),
        ({"ema__decay": 0.5}, lambda s: s.ema.decay == 0.5),
        ({"ema__power": 0.5}, lambda s: s.ema.power == 0.5),
        ({"optim__spike_factor": 7.0}, lambda s: s.guard.factor == 7.0),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_is_taken_takes_effect(small_run, settings, seen):
    train(small_run)
    config = changed(small_run, **settings)
    data = load_data(config.data, "train")
    names = {field: dict(enumerate(labels)) for field, labels in data.label_names.items()}
    saved = SavedPipeline(build_scheduler(config.objective), names, {})
    state = build_state(build_model(config, data), config)
    state.load(last_checkpoint(small_run.out), saved, data.label_names)
    assert seen(state)
    assert (state.step, state.ema.optimization_step) == (8, 8)
    assert state.lr_scheduler.state_dict()["last_epoch"] == 8
    assert state.optimizer.state[state.optimizer.param_groups[0]["params"][0]]["exp_avg"].any()


def test_a_lower_rate_is_used_and_recorded(small_run, caplog):
    run = changed(small_run, optim__schedule="constant_with_warmup")
    train(dataclasses.replace(run, steps=4))
    train(changed(run, resume="auto", optim__lr=1e-4, ema__decay=0.5))
    assert [float(row["lr"]) for row in rows_of(run.out)][3:] == [5e-3, 1e-4, 1e-4, 1e-4, 1e-4]
    assert "from step 4 on: steps 4 -> 8, optim.lr 0.005 -> 0.0001" in caplog.text
    record = record_of(run.out)
    change = {"steps": [4, 8], "optim.lr": [5e-3, 1e-4], "ema.decay": [0.998, 0.5]}
    assert record["changes"] == [{"after_step": 4, "settings": change}]
    assert record["config"]["optim"]["lr"] == record["optimizer_groups"][0]["lr"] == 1e-4
    assert record["ema"]["decay"] == 0.5
    config = (Path(run.out) / "config.yaml").read_text()
    assert config.startswith("# changed after step 4: steps 4 -> 8, optim.lr 0.005 -> 0.0001")
    assert yaml.safe_load(config) == record["config"]
    train(changed(run, resume="auto", optim__lr=1e-4, ema__decay=0.5, steps=9))
    assert [change["after_step"] for change in record_of(run.out)["changes"]] == [4, 8]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1}, "give --seed 0, or"),
        ({"batch_size": 8}, "give --batch_size 4, or"),
        ({"data__holdout": 0.2, "seed": 1}, "give --seed 0 --data.holdout 0.1, or"),
        ({"steps": 6}, "give --steps 8 or more"),
    ],
)
def test_a_setting_that_is_fixed_is_refused_and_nothing_written(small_run, settings, words):
    train(small_run)
    before = (Path(small_run.out) / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=words):
        train(changed(small_run, resume="auto", **settings))
    assert (Path(small_run.out) / "config.yaml").read_bytes() == before


def test_other_pictures_are_refused_and_a_moved_folder_is_not(small_run, tmp_path):
    folder = write_folder(tmp_path / "pictures", pictures(12, 1))
    data = DataConfig(source=f"imagefolder:{folder}", resolution=8, holdout=0.0)
    train(dataclasses.replace(small_run, data=data))
    again = dataclasses.replace(small_run, data=data, resume="auto", steps=9)
    first, second = sorted(folder.glob("*.png"))[:2]
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match=r"pictures is 12 there and 11 here.*--init_from"):
        train(again)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"the data are not those .*restore the files"):
        train(again)
    first.write_bytes(kept)
    moved = folder.rename(tmp_path / "moved")
    data = dataclasses.replace(data, source=f"imagefolder:{moved}")
    train(dataclasses.replace(again, data=data))


@pytest.fixture
def scaled(monkeypatch):
    """A gradient scaler on the CPU, as fp16 has one on a GPU; starts at this scale."""

    def patch(scale):
        make = train_module.make_accelerator

        def with_scaler(config, **options):
            accelerator = make(config, **options)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
            accelerator.unscale_gradients = lambda: [
                accelerator.scaler.unscale_(optimizer.optimizer)
                for optimizer in accelerator._optimizers
            ]
            return accelerator

        monkeypatch.setattr(train_module, "make_accelerator", with_scaler)

    return patch


def test_a_step_that_the_scaler_skips_is_one_for_average_schedule_and_log(
    small_run, scaled, on_batch
):
    scaled(2.0**100)
    # The loss of the first two steps is finite, their scaled gradients overflow.
    on_batch(lambda step, batch: step < 2 and batch["target"].mul_(1e12))
    train(dataclasses.replace(small_run, checkpoint_every=1, keep_last=0))
    rows = rows_of(small_run.out)
    skipped = [int(row["skipped"]) for row in rows]
    assert skipped == [1, 1, 0, 0, 0, 0, 0, 0]
    steps = sorted((Path(small_run.out) / "checkpoints").iterdir())
    states = [json.loads((step / "state.json").read_text()) for step in steps]
    assert [state["skipped"] for state in states] == [sum(skipped[: i + 1]) for i in range(8)]
    averaged = [state["ema"]["optimization_step"] for state in states]
    assert averaged == [i + 1 - sum(skipped[: i + 1]) for i in range(8)]
    assert [state["lr_scheduler"]["last_epoch"] for state in states] == list(range(1, 9))
    scales = [state["scaler"]["scale"] / 2.0**100 for state in states]
    assert scales == pytest.approx([1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 2, 1])


def test_the_scale_of_fp16_is_resumed(small_run, scaled, resumed_as_straight):
    scaled(2.0**20)  # grows every third step
    resumed_as_straight(small_run)
    assert record_of(Path(small_run.out).parent / "stopped")["scaler"]["scale"] == 2.0**22


def test_progress_in_a_file_is_a_line_per_interval(small_run, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(dataclasses.asdict(small_run)))
    done = python("-m", "complexity_dit", "train", "--config", config)
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) < 400
    shown = [line.split("INFO ")[1] for line in lines if "loss" in line]
    steps = [re.match(r"step (\d+) of 8: loss \d\.\d+, images/s \d+", line)[1] for line in shown]
    assert steps == ["3", "4", "6", "8"]


def test_the_speed_is_that_of_the_last_interval(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("complexity_dit.training.callbacks.time.perf_counter", lambda: now[0])
    log = TrainLog(tmp_path, 10, Accelerator(cpu=True))
    speeds = []
    for step, seconds in ((20, 1.0), (30, 10.0)):
        log.add(step, torch.ones(()), torch.ones(()), 1e-3)
        now[0] += seconds
        speeds.append(log.flush(TrainConfig(batch_size=4))["images/s"])
    assert speeds == ["40", "4"]
