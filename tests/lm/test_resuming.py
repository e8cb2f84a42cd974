"""Stopping and resuming: signals, settings that are taken or refused, and the record of them."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from complexity_lm.config import TrainConfig
from complexity_lm.data import load_split, pack, token_bytes, tokenize
from complexity_lm.loading import load
from complexity_lm.parameters import flops_per_token
from complexity_lm.train import train
from inl_core.run.checkpoints import all_checkpoints, latest_checkpoint, write_sums
from inl_core.run.errors import UserError
from support.outcomes import rows_of
from support.processes import python, torchrun


def with_optim(config: TrainConfig, **settings) -> TrainConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **settings))


def outcome(run: str | Path) -> tuple:
    checkpoint = latest_checkpoint(Path(run) / "checkpoints")
    assert checkpoint is not None
    weights = (checkpoint / "model.safetensors").read_bytes()
    return checkpoint.name, weights, (Path(run) / "train_log.csv").read_text()


def test_a_run_that_was_killed_after_its_last_step_is_finished_by_resume_auto(small_run):
    run = Path(small_run.out)
    folder = train(small_run)
    finished = outcome(run)
    shutil.rmtree(folder)
    assert train(dataclasses.replace(small_run, resume="auto")).is_dir()
    assert outcome(run) == finished
    assert [path.name for path in run.rglob(".*")] == [".complexity-lm-run"]


STOPPED = """
import os, signal
from complexity_lm import __main__ as cli
from support.kills import before_step
if os.environ["RANK"] == "1":
    before_step("lm", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    cli.main()
except SystemExit as stop:
    assert stop.code == 143, stop.code
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(small_run, tmp_path):
    config, script = tmp_path / "run.yaml", tmp_path / "script.py"
    config.write_text(yaml.safe_dump(dataclasses.asdict(small_run)))
    script.write_text(STOPPED)
    torchrun(2, script, "train", "--config", config)
    assert [int(row["step"]) for row in rows_of(small_run.out)] == [1, 2, 3, 4, 5]
    assert outcome(small_run.out)[0] == "step-00000005"


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"lr": 1e-4}, lambda optimizer, rates: max(rates) <= 1e-4),
        ({"beta1": 0.5}, lambda optimizer, rates: optimizer["betas"] == (0.5, 0.95)),
        ({"beta2": 0.5}, lambda optimizer, rates: optimizer["betas"] == (0.9, 0.5)),
        ({"weight_decay": 0.3}, lambda optimizer, rates: optimizer["weight_decay"] == 0.3),
        ({"schedule": "constant_with_warmup"}, lambda optimizer, rates: rates == [1e-2] * 3),
        ({"warmup_steps": 100}, lambda optimizer, rates: max(rates) < 1e-3),
        (
            {"schedule": "cosine_with_min_lr", "schedule_options": {"min_lr_rate": 0.9}},
            lambda optimizer, rates: min(rates) > 9e-3 and max(rates) < 1e-2,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_is_taken_takes_effect(small_run, settings, seen):
    train(dataclasses.replace(small_run, steps=4))
    train(with_optim(dataclasses.replace(small_run, resume="auto", steps=7), **settings))
    checkpoint = latest_checkpoint(Path(small_run.out) / "checkpoints")
    assert checkpoint is not None
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert seen(groups[0], [float(row["lr"]) for row in rows_of(small_run.out)][4:])


def test_what_changed_is_recorded(small_run, caplog):
    run = with_optim(small_run, schedule="constant_with_warmup")
    train(dataclasses.replace(run, steps=4))
    # The intervals of the first run do not stay either.
    again = dataclasses.replace(run, resume="auto", eval_every=2, checkpoint_every=3, keep_last=0)
    train(with_optim(again, lr=1e-4))
    out = Path(small_run.out)
    assert [float(row["lr"]) for row in rows_of(out)][3:] == [1e-2, 1e-4, 1e-4, 1e-4, 1e-4]
    assert [int(row["step"]) for row in rows_of(out / "heldout_log.csv")] == [4, 6, 8]
    steps = [path.name[-1] for path in all_checkpoints(out / "checkpoints")]
    assert steps == ["4", "6", "8"]
    assert "from step 4 on: steps 4 -> 8, optim.lr 0.01 -> 0.0001" in caplog.text
    change = {"after_step": 4, "settings": {"steps": [4, 8], "optim.lr": [1e-2, 1e-4]}}
    result = json.loads((out / "result.json").read_text())
    assert result["changed_settings"] == [change]
    record = json.loads((out / "checkpoints" / "step-00000008" / "run.json").read_text())
    assert (record["changes"], record["settings"]) == ([change], result["settings"])
    config = (out / "config.yaml").read_text()
    assert config.startswith("# changed after step 4: steps 4 -> 8, optim.lr")
    assert yaml.safe_load(config) == result["settings"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1}, "give --seed 0, or"),
        ({"batch_size": 2}, "give --batch_size 4, or"),
        ({"steps": 6}, "give --steps 8 or more"),
    ],
)
@pytest.mark.parametrize("record", [True, False], ids=["record", "0.1.0"])
def test_a_setting_that_is_fixed_is_refused(small_run, settings, words, record):
    train(small_run)
    out = Path(small_run.out)
    if not record:  # of an older version: then config.yaml is compared
        for path in out.rglob("run.json"):
            path.unlink()
            (path.parent / "SHA256SUMS").unlink()
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=words):
        train(dataclasses.replace(small_run, resume="auto", **settings))
    assert (out / "config.yaml").read_bytes() == before


def test_other_text_is_refused_and_a_moved_folder_is_not(small_run, texts, tmp_path):
    folder = shutil.copytree(texts, tmp_path / "texts")
    data = dataclasses.replace(small_run.data, source=f"text:{folder}")
    train(dataclasses.replace(small_run, data=data, steps=4))
    again = dataclasses.replace(small_run, data=data, resume="auto")
    kept = (folder / "03.txt").read_text()
    (folder / "03.txt").write_text(kept + "more\n")
    with pytest.raises(UserError, match=r"the data are not those .*fingerprint of the .*restore"):
        train(again)
    (folder / "03.txt").unlink()
    with pytest.raises(UserError, match=r"number of documents of the .* text is"):
        train(again)
    (folder / "03.txt").write_text(kept)
    moved = folder.rename(tmp_path / "moved")
    train(dataclasses.replace(again, data=dataclasses.replace(data, source=f"text:{moved}")))


@pytest.mark.parametrize("streamed", [False, True], ids=["files", "stream"])
def test_a_finished_run_trains_no_more(small_run, texts, tmp_path, streamed):
    run = small_run
    if streamed:
        (tmp_path / "rows").mkdir()
        rows = [json.dumps({"text": path.read_text()}) for path in sorted(texts.iterdir())]
        (tmp_path / "rows" / "rows.jsonl").write_text("\n".join(rows))
        data = dataclasses.replace(run.data, source=f"hub:{tmp_path / 'rows'}")
        run = dataclasses.replace(run, data=data)
    train(run)
    before = outcome(run.out)
    result = json.loads((Path(run.out) / "result.json").read_text())
    (Path(run.out) / "result.json").unlink()
    train(dataclasses.replace(run, resume="auto"))
    assert outcome(run.out) == before
    again = json.loads((Path(run.out) / "result.json").read_text())
    assert again["weights_sha256"] == result["weights_sha256"]
    assert len(all_checkpoints(Path(run.out) / "checkpoints")) == 2


def test_bits_per_byte_count_the_bytes_of_the_tokens_that_were_scored(small_run):
    train(small_run)
    loaded = load(small_run.out)
    context, blocks = small_run.data.context, small_run.eval_blocks
    heldout = load_split(small_run.data, "heldout")
    packed = pack(tokenize(heldout, loaded.tokenizer), context)
    # The tokens are bytes: each decodes to itself, a separator to nothing.
    scored = [row["input_ids"][1:] for row in packed.take(blocks)]
    sizes = [
        [0 if i == loaded.tokenizer.eos_token_id else size_of(loaded.tokenizer, i) for i in row]
        for row in scored
    ]
    row = rows_of(Path(small_run.out) / "heldout_log.csv")[-1]
    bits = float(row["loss"]) * blocks * (context - 1) / math.log(2) / sum(map(sum, sizes))
    # A character that a block border cuts is counted on one side of it.
    assert float(row["bits_per_byte"]) == pytest.approx(bits, rel=4 * blocks / sum(map(sum, sizes)))


def size_of(tokenizer, token: int) -> int:
    """Bytes of a token of a byte-level BPE, whose vocabulary has one character for each."""
    return len(tokenizer.convert_ids_to_tokens(token))


def test_bytes_of_tokens_add_up_to_those_of_the_text(trained, texts, small_run):
    tokenizer = load(trained).tokenizer
    documents = load_split(small_run.data, "all")
    ids = [i for row in tokenize(documents, tokenizer)["input_ids"] for i in row]
    sizes = token_bytes(documents, tokenizer, len(ids))
    assert len(sizes) == len(ids)
    assert sizes.sum() == sum(path.stat().st_size for path in texts.iterdir())
    assert set(sizes[[i for i, one in enumerate(ids) if one == tokenizer.eos_token_id]]) == {0}
    # Characters of two bytes apart, each token has the bytes of its name in the vocabulary.
    names = [0 if one == tokenizer.eos_token_id else size_of(tokenizer, one) for one in ids]
    assert (sizes == names).mean() > 0.99


def test_progress_in_a_file_is_a_line_per_interval(small_run, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(dataclasses.asdict(small_run)))
    done = python("-m", "complexity_lm", "train", "--config", config)
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) < 400
    assert not [line for line in lines if "%|" in line]
    shown = [line.split("INFO ")[1] for line in lines if "tokens/s" in line]
    assert all(re.search(r"\d tokens/s, \d+\.\d\d GB$", line) for line in shown), shown
    assert [line.split(":")[0] for line in shown] == [f"step {i} of 8" for i in (3, 4, 6, 8)]


def test_speed_memory_and_share_of_the_peak_are_tracked(small_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(dataclasses.replace(small_run, report_to="tensorboard", peak_tflops=1e-3))
    logs = EventAccumulator(str(Path(small_run.out) / "logs"))
    logs.Reload()
    curves = {
        name: [event.value for event in logs.Scalars(f"train/{name}")]
        for name in ("tokens_per_second", "memory_gb", "mfu")
    }
    assert [event.step for event in logs.Scalars("train/mfu")] == [3, 4, 6, 8]
    flops = flops_per_token(load(small_run.out).model, small_run.data.context)
    for speed, memory, share in zip(*curves.values(), strict=True):
        assert share == pytest.approx(speed * flops / 1e9, rel=1e-4)
        assert 0.05 < memory < 100


def edit_record(checkpoint: Path, packing: int | None) -> None:
    record = json.loads((checkpoint / "run.json").read_text())
    record.pop("packing", None)
    if packing is not None:
        record["packing"] = packing
    (checkpoint / "run.json").write_text(json.dumps(record))
    write_sums(checkpoint)


@pytest.mark.parametrize("content", ["ka <|endoftext|> lo ni.\n", "ka lo ni. "])
def test_an_old_run_keeps_its_packing(small_run, tmp_path, monkeypatch, content):
    """Special tokens written in documents, and a long line, are other blocks since version 2."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} {content}" for i in range(400)))
    data = dataclasses.replace(
        small_run.data, source=f"text:{text}", piece_bytes=64, holdout=0, context=16
    )
    now, old, resumed = (
        dataclasses.replace(small_run, out=str(tmp_path / name), data=data)
        for name in ("now", "old", "resumed")
    )
    train(now)
    monkeypatch.setattr("complexity_lm.train.PACKING", 1)
    train(old)
    monkeypatch.undo()
    assert outcome(now.out) != outcome(old.out)

    shutil.copytree(old.out, resumed.out)
    first, last = all_checkpoints(Path(resumed.out) / "checkpoints")
    shutil.rmtree(last)
    edit_record(first, 9)
    with pytest.raises(UserError, match="has packing 9: resume it with a newer version"):
        train(dataclasses.replace(resumed, resume="auto"))
    edit_record(first, None)
    train(dataclasses.replace(resumed, resume="auto"))
    assert outcome(resumed.out) == outcome(old.out)
