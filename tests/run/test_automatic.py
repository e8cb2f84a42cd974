"""What `auto` stands for: chosen once by machine and settings, recorded, kept by a resumed run."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch._inductor import config as inductor

from inl_core.run import automatic
from inl_core.run.automatic import choose_compile, choose_precision, kept, kept_settings
from inl_core.run.errors import UserError
from support.small_runs import package_of, write_texts

CPU = torch.device("cpu")
FORMER = {"mixed_precision": "no", "compile": False}


@pytest.fixture
def units(monkeypatch):
    """A CPU with these units."""

    def set_units(*names):
        found = {"amx_bf16": False, "avx512_bf16": False, "avx2": True} | dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    return set_units


@pytest.fixture(params=["dit", "lm"])
def package(request, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    write_texts(texts)
    return package_of(request.param, texts)


def resolved_of(run: Path) -> dict:
    last = max((run / "checkpoints").glob("step-*"))
    file = next(last / name for name in ("state.json", "run.json") if (last / name).exists())
    return json.loads(file.read_text())["resolved"]


def test_the_units_of_a_cpu_decide(units):
    units()
    assert choose_precision(CPU).value == "no"
    for name in ("amx_bf16", "avx512_bf16"):
        units(name)
        assert choose_precision(CPU) == ("bf16", f"the CPU has {name}")


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_emulates_bf16_is_left_in_fp32(native, monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert choose_precision(torch.device("cuda")).value == ("bf16" if native else "no")


def test_the_launcher_decides_where_the_run_does_not(units, monkeypatch):
    units("avx512_bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision(CPU).value == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what it says if nobody asked
    assert choose_precision(CPU).value == "bf16"


def test_long_runs_are_compiled_where_there_is_a_compiler(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with inductor.patch({"cpp.cxx": (None, "true")}):
        assert choose_compile(1e9, CPU).value is False
        choice = choose_compile(1e16, CPU)
        assert choice.value is True
        assert "saves about" in choice.reason
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        choice = choose_compile(1e16, CPU)
        assert choice.value is False
        assert "there is no compiler" in choice.reason


def test_auto_is_the_checkpoints_value_and_before_auto_its_default():
    asked = {"mixed_precision": "auto", "compile": "auto", "steps": 3}
    saved = kept(asked, {"mixed_precision": "bf16", "compile": True}, FORMER)
    assert saved == {"mixed_precision": "bf16", "compile": True, "steps": 3}
    assert kept_settings(asked | {"compile": False}, saved) == saved | {"compile": False}
    assert kept({"steps": 3}, {}, FORMER) == FORMER | {"steps": 3}
    assert kept(asked, {}, FORMER) == FORMER | {"steps": 3}


def test_a_run_records_its_choice_and_keeps_it_on_another_machine(package, units, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    units("avx512_bf16")
    config = package.run(tmp_path / "run", mixed_precision="auto", steps=4)
    package.train(config)
    run = tmp_path / "run"
    assert "mixed_precision auto: bf16 (the CPU has avx512_bf16)" in caplog.text
    assert "compile auto: " in caplog.text
    assert resolved_of(run)["mixed_precision"] == "bf16"
    assert resolved_of(run)["compile"] in ("no", False)
    assert yaml.safe_load((run / "config.yaml").read_text())["mixed_precision"] == "auto"
    units()
    caplog.clear()
    with pytest.raises(UserError, match="bf16 there and no here; give --mixed_precision bf16"):
        package.train(replace(config, steps=8, resume="auto", mixed_precision="no"))
    package.train(replace(config, steps=8, resume="auto"))
    assert resolved_of(run)["mixed_precision"] == "bf16"
    assert "mixed_precision auto" not in caplog.text
    assert "this run is in bf16, and this cpu has no units for it" in caplog.text
    if package.name == "lm":
        assert (
            json.loads((run / "result.json").read_text())["resolved"]["mixed_precision"] == "bf16"
        )


def test_a_resumed_run_in_bf16_ends_with_the_bits_of_an_uninterrupted_one(package, tmp_path):
    straight = package.run(tmp_path / "a", mixed_precision="bf16", keep_last=0)
    package.train(straight)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("checkpoints/step-00000008", "pipeline", "model"):
        shutil.rmtree(tmp_path / "b" / name, ignore_errors=True)
    stopped = replace(straight, out=str(tmp_path / "b"), resume="auto", mixed_precision="auto")
    package.train(stopped)
    assert resolved_of(tmp_path / "b")["mixed_precision"] == "bf16"
    assert package.outcome(tmp_path / "a") == package.outcome(tmp_path / "b")


def test_runs_of_two_precisions_follow_each_other_in_one_process(package, tmp_path):
    """accelerate has one precision for a process; what a caller has set stays for the caller."""
    before = Accelerator(cpu=True).mixed_precision
    for i, precision in enumerate(("bf16", "no", "bf16")):
        package.train(package.run(tmp_path / f"{i}", mixed_precision=precision, steps=1))
    if package.name == "dit":
        assert Accelerator(cpu=True).mixed_precision == before


def test_a_run_without_units_says_that_bf16_is_slow(units, caplog):
    units()
    automatic.warn_without_units("bf16", CPU)
    assert "slower than fp32" in caplog.text
    caplog.clear()
    automatic.warn_without_units("no", CPU)
    units("amx_bf16")
    automatic.warn_without_units("bf16", CPU)
    assert not caplog.messages
