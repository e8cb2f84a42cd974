"""A launcher and the settings of a run agree, and what cannot be compiled is refused at once."""

from dataclasses import replace
from functools import partial

import pytest
from torch._inductor import config as inductor

from complexity_dit.training.train import train
from complexity_lm.train import train as train_lm
from inl_core.run.errors import UserError
from inl_core.run.launcher import check_compiler, check_launcher, check_whole_checkpoints
from support.small_runs import dit_run, lm_run

ASKED = {
    "ACCELERATE_MIXED_PRECISION": ("bf16", "--mixed_precision bf16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("3", "--gradient_accumulation_steps 3"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "use --compile"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_the_launcher_asks_for_against_the_settings_is_refused(name, monkeypatch):
    value, advice = ASKED[name]
    check_launcher("no", 1)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=advice):
        check_launcher("no", 1)


def test_what_the_launcher_says_by_itself_is_no_request(monkeypatch):
    for name, value in (("MIXED_PRECISION", "no"), ("DYNAMO_BACKEND", "NO")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_launcher("bf16", 4)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    check_launcher("bf16", 4)


@pytest.mark.parametrize("name", ASKED)
def test_a_training_refuses_before_it_writes(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, ASKED[name][0])
    lm = lm_run(tmp_path / "lm", tmp_path)
    for start in (partial(train, dit_run(tmp_path / "dit")), partial(train_lm, lm)):
        with pytest.raises(UserError, match="accelerate's launcher asks for"):
            start()
    assert not list(tmp_path.iterdir())


def test_a_text_run_whose_checkpoints_would_be_pickles_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    check_whole_checkpoints()  # without FSDP, nothing reads it
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="set it to FULL_STATE_DICT"):
        train_lm(lm_run(tmp_path / "lm", tmp_path))
    assert not list(tmp_path.iterdir())


def test_gradients_are_divided_once_when_the_launcher_says_the_same(tmp_path, monkeypatch):
    run = dit_run(tmp_path / "plain", gradient_accumulation_steps=2, steps=2)
    train(run)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    train(replace(run, out=str(tmp_path / "launched")))
    logs = [(tmp_path / name / "train_log.csv").read_text() for name in ("plain", "launched")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_missing_compiler_is_named_before_the_first_step(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: on_gpu)
    monkeypatch.setenv("CC", "no-such-compiler")
    runs = (
        partial(train, dit_run(tmp_path / "dit", compile="regional")),
        partial(train_lm, lm_run(tmp_path / "lm", tmp_path, compile=True)),
    )
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match=r"needs a C(\+\+)? compiler.*no-such-compiler"):
            check_compiler()
        for start in runs:
            with pytest.raises(UserError, match="train without --compile"):
                start()
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_is_there_passes(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with inductor.patch({"cpp.cxx": (None, "true")}):  # as any program that knows --version
        check_compiler()
