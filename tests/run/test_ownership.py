"""Resumed runs: every setting has one owner, and a checkpoint knows its settings and data."""

import copy
import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import complexity_dit.config
import complexity_dit.training.autoencoder
import complexity_dit.training.train
import complexity_lm.config
import complexity_lm.train
from inl_core.run.errors import UserError
from inl_core.run.ownership import (
    check_data,
    history_comment,
    keeping_settings,
    move_schedule,
    table_of_owners,
    take_settings,
)

PACKAGES = {
    "complexity-dit": (complexity_dit.config.TrainConfig, complexity_dit.training.train.OWNERS),
    "complexity-lm": (complexity_lm.config.TrainConfig, complexity_lm.train.OWNERS),
}
AUTOENCODER = (
    complexity_dit.config.AutoencoderConfig,
    complexity_dit.training.autoencoder.OWNERS,
)
DOCS = Path(__file__).parents[2] / "docs" / "how-to"
CHECKPOINT = Path("runs/x/checkpoints/step-00000007")
ROWS = [(package, name) for package, (_, owners) in PACKAGES.items() for name in owners]


def fields_of(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@pytest.mark.parametrize("training", [*PACKAGES.values(), AUTOENCODER])
def test_every_setting_of_a_training_has_one_owner(training):
    make, owners = training
    assert sorted(owners) == sorted(fields_of(make()))


@pytest.mark.parametrize(
    ("page", "column", "owners"),
    [
        *(("resuming.md", i + 2, owners) for i, (_, owners) in enumerate(PACKAGES.values())),
        ("autoencoder.md", 2, AUTOENCODER[1]),
    ],
)
def test_the_page_lists_every_setting_with_its_owner(page, column, owners):
    listed = {}
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[1] in ("taken", "fixed", "free"):
            listed |= dict.fromkeys(re.findall(r"`([\w.]+)`", cells[column]), cells[1])
    assert listed == owners


@pytest.mark.parametrize(("package", "name"), ROWS)
def test_a_changed_setting_is_taken_refused_or_free(package, name, caplog):
    make, owners = PACKAGES[package]
    saved = json.loads(json.dumps(dataclasses.asdict(make())))
    current = copy.deepcopy(saved)
    *groups, key = name.split(".")
    place = current
    for group in groups:
        place = place[group]
    place[key] = 12345
    caplog.set_level(logging.WARNING)
    if owners[name] == "fixed":
        with pytest.raises(UserError, match=rf"{name} is .* there and 12345 here; give --{name} "):
            take_settings(owners, saved, current, CHECKPOINT, 7)
        return
    changes = take_settings(owners, saved, current, CHECKPOINT, 7)
    if owners[name] == "free":
        assert changes == []
        assert not caplog.messages
        return
    (change,) = changes
    before, now = change["settings"][name]
    assert (change["after_step"], now) == (7, 12345)
    assert f"from step 7 on: {name} " in caplog.text
    assert f"# changed after step 7: {name} " in history_comment(changes)
    json.dumps(changes)
    # Back again: the checkpoint after it is what counts.
    assert take_settings(owners, current, saved, CHECKPOINT, 9)[0]["settings"][name] == [
        now,
        before,
    ]


def test_dictionaries_are_compared_by_key():
    owners = table_of_owners(taken="steps options", fixed="model.overrides", free="")
    saved = {"steps": 8, "model": {"overrides": {"width": 32, "name": "a b"}}}
    for overrides, words in (
        ({"width": 64, "name": "a b"}, "give --model.overrides.width 32, or"),
        ({"width": 32, "name": "c"}, "give --model.overrides.name 'a b', or"),
        ({"width": 32, "name": "a b", "depth": 2}, "give no model.overrides.depth, or"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            take_settings(
                owners, saved, {"steps": 8, "model": {"overrides": overrides}}, CHECKPOINT, 8
            )
    # The checkpoint of an older version lacks `options`.
    assert take_settings(owners, saved, saved | {"options": {"x": 1}}, CHECKPOINT, 8) == []
    changes = take_settings(
        owners, saved | {"options": {}}, saved | {"options": {"x": 1}}, CHECKPOINT, 8
    )
    assert changes[0]["settings"] == {"options.x": [None, 1]}


def test_fewer_steps_than_were_trained_are_refused():
    owners = table_of_owners(taken="steps", fixed="", free="")
    with pytest.raises(UserError, match=r"has trained 7 already: give --steps 7 or more"):
        take_settings(owners, {"steps": 8}, {"steps": 6}, CHECKPOINT, 7)
    assert take_settings(owners, {"steps": 8}, {"steps": 7}, CHECKPOINT, 7)


def test_a_name_with_two_owners_is_an_error():
    with pytest.raises(ValueError, match="lr has two owners, taken and free"):
        table_of_owners(taken="lr", fixed="seed", free="out lr")


def test_other_data_are_refused_and_unknown_ones_reported(caplog):
    saved = {"fingerprint": "abc", "number of pictures": 3}
    check_data(saved, saved, CHECKPOINT, "start again")
    with pytest.raises(UserError, match=r"pictures is 3 there and 2 here\): restore .* or start"):
        check_data(saved, saved | {"number of pictures": 2}, CHECKPOINT, "start again")
    check_data(None, saved, CHECKPOINT, "start again")
    assert "does not say which data" in caplog.text


def test_an_optimizer_keeps_its_settings_and_takes_the_moments():
    weight = torch.nn.Parameter(torch.ones(3))

    def build(lr, steps):
        optimizer = torch.optim.AdamW([weight], lr=lr, betas=(0.9, lr), weight_decay=lr)
        return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)

    old, schedule = build(0.5, 10)
    for _ in range(4):
        weight.grad = torch.ones(3)
        old.step()
        schedule.step()
    new, schedule = build(0.25, 8)
    with keeping_settings(new):
        new.load_state_dict(old.state_dict())
    move_schedule(schedule, 4)
    group = new.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.25), 0.25)
    assert group["lr"] == schedule.get_last_lr()[0] == 0.25 * (1 - 4 / 8)
    assert new.state[weight]["exp_avg"].equal(old.state[weight]["exp_avg"])
    new.step()
    schedule.step()
    assert group["lr"] == 0.25 * (1 - 5 / 8)
