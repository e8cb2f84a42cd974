"""Training: exact resume, complete checkpoints, and the errors of a run."""

import cmath
import csv
import dataclasses
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from complexity_lm import DeepForCausalLM, decay_parameter_names
from complexity_lm import trainer as trainer_module
from complexity_lm.config import TokenizerConfig, TrainConfig
from complexity_lm.data import load_split, tokenize
from complexity_lm.loading import load
from complexity_lm.tokenizer import train_tokenizer
from complexity_lm.train import build_model, train
from complexity_lm.trainer import LMTrainer
from inl_core import DYNAMICS_STATS
from inl_core.run.checkpoints import all_checkpoints, latest_checkpoint
from inl_core.run.errors import UserError

LARGE_STEPS = {
    # 287 blocks: the second pass over the data begins inside step 5, which a resumed run repeats.
    "steps": 6, "batch_size": 60, "checkpoint_every": 2, "keep_last": 0, "dynamics_every": 2,
    "eval_every": 2,
}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run: str | Path) -> list[float]:
    return [float(row["loss"]) for row in rows_of(Path(run) / "train_log.csv")]


def with_overrides(config: TrainConfig, **overrides) -> TrainConfig:
    model = dataclasses.replace(config.model, overrides=config.model.overrides | overrides)
    return dataclasses.replace(config, model=model)


def stop_after(config: TrainConfig, step: int) -> None:
    """Run a training, then remove everything after a step, as if it had been killed there."""
    train(config)
    out = Path(config.out)
    for checkpoint in all_checkpoints(out / "checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()


def assert_same_run(current: Path, expected: Path) -> None:
    for name in ("train_log.csv", "heldout_log.csv", "dynamics.csv"):
        assert rows_of(current / name)
        assert (current / name).read_text() == (expected / name).read_text(), name
    a, b = (latest_checkpoint(run / "checkpoints") for run in (current, expected))
    assert a.name == b.name  # pyright: ignore[reportOptionalMemberAccess]
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    moments = [torch.load(c / "optimizer.pt", weights_only=True)["state"] for c in (a, b)]
    assert moments[0]
    for parameter, entries in moments[0].items():
        for name, value in entries.items():
            assert value.equal(moments[1][parameter][name])


@pytest.mark.parametrize("streamed", [False, True], ids=["files", "stream"])
def test_resume_is_bit_identical(small_run, tmp_path, texts, streamed):
    run = dataclasses.replace(small_run, gradient_accumulation_steps=2, **LARGE_STEPS)
    if streamed:
        (tmp_path / "rows").mkdir()
        rows = [json.dumps({"text": path.read_text()}) for path in sorted(texts.iterdir())]
        (tmp_path / "rows" / "rows.jsonl").write_text("\n".join(rows))
        run.data = dataclasses.replace(run.data, source=f"hub:{tmp_path / 'rows'}")
    train(dataclasses.replace(run, out=str(tmp_path / "straight")))
    stopped = dataclasses.replace(run, out=str(tmp_path / "stopped"))
    stop_after(stopped, 4)
    train(dataclasses.replace(stopped, resume="auto"))
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert len(set(losses(tmp_path / "straight"))) == 6


def test_files_and_measurements_of_a_run(small_run):
    folder = train(small_run)
    out = Path(small_run.out)
    assert sorted(p.name for p in out.glob("[!.]*")) == [
        "checkpoints", "config.yaml", "dynamics.csv", "heldout_log.csv", "loss.png", "model",
        "result.json", "tokenizer", "train_log.csv",
    ]  # fmt: skip
    steps = [p.name for p in all_checkpoints(out / "checkpoints")]
    assert steps == ["step-00000004", "step-00000008"]
    # There are no pickles that run code, and no partial files.
    names = {path.name for path in out.rglob("*")}
    assert "training_args.bin" not in names
    assert not any(name.endswith((".bin", ".pkl", "-partial")) for name in names)

    result = json.loads((out / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    bits = metrics["loss"] * result["n_tokens"] / math.log(2) / result["n_bytes"]
    assert metrics["bits_per_byte"] == pytest.approx(bits)
    assert result["settings"]["optim"]["lr"] == small_run.optim.lr
    assert result["tokens_trained"] == 8 * 4 * 24
    heldout = load_split(small_run.data, "heldout")["text"]
    assert result["n_bytes"] == sum(len(text.encode()) for text in heldout)

    loaded = load(str(out))
    assert loaded.data == small_run.data
    assert loaded.context == 24
    weights = load_file(folder / "model.safetensors")
    last = load_file(out / "checkpoints" / "step-00000008" / "model.safetensors")
    assert all(weights[name].equal(last[name]) for name in weights)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), DeepForCausalLM)


@pytest.mark.parametrize(
    ("placement", "adaptive", "alpha", "dt"),
    [("force_mlp", "channel", 0.5, 1.0), ("branch", "token", 0.9, 0.1)],
)
def test_dynamics_are_recorded(small_run, placement, adaptive, alpha, dt):
    model = dataclasses.replace(
        small_run.model, dynamics_placement=placement, dynamics_adaptive=adaptive
    )
    train(dataclasses.replace(small_run, dynamics_every=2, model=model))
    rows = rows_of(Path(small_run.out) / "dynamics.csv")
    first = [(row["step"], row["layer"][-10:]) for row in rows[:2]]
    assert first == [("2", "0.dynamics"), ("2", "1.dynamics")]
    assert len(rows) == 4 * 2
    assert set(rows[0]) == {"step", "layer", *DYNAMICS_STATS, "spectral_radius"}
    for row in rows:
        values = {key: float(row[key]) for key in (*DYNAMICS_STATS, "spectral_radius")}
        assert alpha - 0.4 < values["alpha_mean"] < 1
        assert values["velocity_abs_max"] > 0
        # The eigenvalues of A, from its trace and determinant: complex with the modulus sqrt(alpha)
        # at the paper's start, real at a force's.
        trace = 1 + values["alpha_mean"] - dt * values["gate_mean"] * values["beta_mean"]
        discriminant = trace**2 - 4 * values["alpha_mean"]
        assert (discriminant < 0) == (placement == "branch")
        roots = (trace + sign * cmath.sqrt(discriminant) for sign in (1, -1))
        assert values["spectral_radius"] == pytest.approx(max(abs(x) / 2 for x in roots), rel=1e-6)
    assert rows[0]["alpha_mean"] != rows[-1]["alpha_mean"]


def test_numbers_reach_the_tracker(small_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Recording the dynamics at a logged step must not drop the log of that step.
    train(dataclasses.replace(small_run, report_to="tensorboard", log_every=2, dynamics_every=2))
    events = EventAccumulator(str(Path(small_run.out) / "logs"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "eval/loss", "eval/bits_per_byte"} <= set(tags)
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert any("dynamics/model.layers.1.dynamics/spectral_radius" in tag for tag in tags)


def test_plain_model_records_no_dynamics(small_run):
    model = dataclasses.replace(small_run.model, dynamics_placement="none")
    train(dataclasses.replace(small_run, model=model))
    assert rows_of(Path(small_run.out) / "dynamics.csv") == []


def test_options_that_save_memory_or_time_give_nearly_the_same_losses(small_run, tmp_path):
    options = {
        "plain": ({}, 0.0),
        "accumulation": ({"gradient_accumulation_steps": 2}, 1e-4),
        "checkpointing": ({"gradient_checkpointing": True}, 1e-5),
        "bf16": ({"mixed_precision": "bf16"}, 0.03),
    }
    for name, (changes, tolerance) in options.items():
        train(dataclasses.replace(small_run, out=str(tmp_path / name), **changes))
        assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / name), rel=tolerance)
    assert losses(tmp_path / "plain") != losses(tmp_path / "bf16")


def test_loss_decreases(small_run):
    train(dataclasses.replace(small_run, steps=60, batch_size=8, checkpoint_every=60))
    curve = losses(small_run.out)
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10])
    heldout = [float(row["loss"]) for row in rows_of(Path(small_run.out) / "heldout_log.csv")]
    assert heldout[-1] < 0.8 * heldout[0]


def test_weight_decay_follows_the_rule_of_the_model(small_run, monkeypatch):
    seen = {}

    def note(self):
        groups = self.optimizer.param_groups
        names = {id(p): n for n, p in self.model.named_parameters()}
        seen["decayed"] = {names[id(p)] for p in groups[0]["params"]}
        seen["plain"] = {names[id(p)] for p in groups[1]["params"]}
        seen["decay"] = [group["weight_decay"] for group in groups]
        seen["rule"] = set(decay_parameter_names(self.model))
        return finish(self)

    finish = LMTrainer.stop_if_not_finite
    monkeypatch.setattr(LMTrainer, "stop_if_not_finite", note)
    train(small_run)
    assert seen["decay"] == [0.1, 0.0]
    assert seen["decayed"] == seen["rule"]
    assert "model.layers.0.mlp.up_proj.weight" in seen["decayed"]
    assert any("dynamics" in name for name in seen["plain"])


def test_experts_are_balanced_on_the_training_text(small_run):
    experts = with_overrides(small_run, intermediate_size=48)
    experts.model.num_experts = 4
    folder = train(experts)
    loaded = load(str(folder))
    tokens = tokenize(load_split(small_run.data, "train"), loaded.tokenizer)
    table = loaded.model.model.routing_table
    loads = torch.zeros(4, dtype=torch.float64)
    for ids in tokens["input_ids"]:
        loads += torch.bincount(table[torch.tensor(ids)], minlength=4)
    assert (loads / loads.sum() - 0.25).abs().max() < 0.01 * 0.25


def test_nan_loss_stops_the_run_and_names_the_step(small_run, monkeypatch):
    real = LMTrainer.compute_loss

    def poisoned(self, model, inputs, **kwargs):
        loss = real(self, model, inputs, **kwargs)
        return loss * math.nan if self.state.global_step == 5 else loss

    monkeypatch.setattr(LMTrainer, "compute_loss", poisoned)
    with pytest.raises(UserError, match=r"step 6: loss nan.*step-00000004.*--optim.lr"):
        train(small_run)
    out = Path(small_run.out)
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint == out / "checkpoints" / "step-00000004"
    assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())
    assert all(math.isfinite(loss) for loss in losses(out))
    monkeypatch.undo()
    train(dataclasses.replace(small_run, resume="auto"))
    assert len(losses(out)) == 8


def test_interrupted_saving_leaves_no_checkpoint(small_run, monkeypatch):
    def interrupt(written, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "_move", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(small_run)
    assert all_checkpoints(Path(small_run.out) / "checkpoints") == []
    monkeypatch.undo()
    train(dataclasses.replace(small_run, resume="auto"))
    assert len(losses(small_run.out)) == 8


def test_existing_folder_is_refused(small_run):
    Path(small_run.out).mkdir()
    (Path(small_run.out) / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is not one that this command has written"):
        train(small_run)
    assert (Path(small_run.out) / "precious.txt").read_text() == "mine"


def test_resume_rejects_other_models_tokenizers_and_damage(small_run, tmp_path):
    with pytest.raises(UserError, match="checkpoint folder"):
        train(dataclasses.replace(small_run, resume=str(tmp_path / "nowhere")))
    train(small_run)
    again = dataclasses.replace(small_run, resume="auto", steps=9)
    with pytest.raises(UserError, match=r"size is 48 .*--model.overrides.intermediate_size 48"):
        train(with_overrides(again, intermediate_size=64))
    with pytest.raises(UserError, match=r"give --model.overrides.num_hidden_layers 2, or"):
        train(with_overrides(again, num_hidden_layers=1))
    # Same tensors, but another network.
    elsewhere = dataclasses.replace(again.model, dynamics_placement="branch")
    with pytest.raises(UserError, match=r"give --model.dynamics_placement force_mlp, or"):
        train(dataclasses.replace(again, model=elsewhere))
    other = tmp_path / "other"
    train_tokenizer(["something else"], 280).save_pretrained(other)
    with pytest.raises(UserError, match="not the tokenizer that this run started with"):
        train(dataclasses.replace(again, tokenizer=TokenizerConfig(str(other), 300)))
    checkpoint = latest_checkpoint(Path(small_run.out) / "checkpoints")
    assert checkpoint is not None
    (checkpoint / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"step-00000008 is damaged: model.safetensors"):
        train(again)
    (checkpoint / "SHA256SUMS").unlink()  # as in old checkpoints
    with pytest.raises(UserError, match="cannot read checkpoint"):
        train(again)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_accumulation_steps": 3}, "batch_size 4 must be divisible"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"keep_last": -1}, "keep_last is -1; expected at least 0"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ],
)
def test_settings_out_of_range(small_run, changes, words):
    with pytest.raises(UserError, match=words):
        train(dataclasses.replace(small_run, **changes))
    assert not Path(small_run.out).exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size 32 must be divisible by num_attention_heads 5"),
        ({"dynamics_alhpa": 0.5}, "no field .dynamics_alhpa.: did you mean dynamics_alpha"),
        ({"vocab_size": 200}, "the tokenizer has ids up to 299, the model 200"),
        ({"max_position_embeddings": 16}, "data.context is 24.*16 tokens"),
        ({"hidden_size": "wide"}, "cannot build this model"),
        ({"preset": "2m"}, r"unknown preset '2m', choose from: 15m"),
    ],
)
def test_invalid_model_settings(small_run, overrides, words):
    preset = overrides.pop("preset", "15m")
    config = with_overrides(small_run, **overrides)
    config.model.preset = preset
    texts = load_split(config.data, "train")
    tokenizer = train_tokenizer(texts["text"], 300)
    with pytest.raises(UserError, match=words):
        build_model(config, tokenizer, tokenize(texts, tokenizer))


def test_a_lossy_tokenizer_is_refused_before_training(small_run, texts, tmp_path):
    (tmp_path / "text").mkdir()
    for path in texts.iterdir():
        (tmp_path / "text" / path.name).write_text(path.read_text().upper())
    tokenizer = train_tokenizer([path.read_text() for path in texts.iterdir()], 300)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "lossy")
    config = dataclasses.replace(
        small_run,
        data=dataclasses.replace(small_run.data, source=f"text:{tmp_path / 'text'}"),
        tokenizer=TokenizerConfig(path=str(tmp_path / "lossy")),
    )
    with pytest.raises(UserError, match=r"loses some of the text that begins with .*byte-level"):
        train(config)
    assert not (Path(config.out) / "checkpoints").exists()


def test_a_saved_tokenizer_knows_the_context(trained):
    checkpoint = latest_checkpoint(trained / "checkpoints")
    for folder in (trained / "model", checkpoint):
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 24


def test_separate_documents_train_as_alone(small_run, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} ka lo {i * i}.\n" for i in range(400)))
    data = dataclasses.replace(
        small_run.data, source=f"text:{text}", piece_bytes=16, context=48,
        separate_documents=True,
    )  # fmt: skip
    config = dataclasses.replace(small_run, data=data)
    real, checked = LMTrainer.training_step, []

    def training_step(self, model, inputs, *arguments):
        ids = inputs["input_ids"]
        separator = self.tokenizer.eos_token_id
        alone, across = [], []
        with torch.no_grad():
            for row in ids:
                begins = sorted({0, *(row == separator).nonzero()[:, 0].tolist(), len(row)})
                parts = [row[a:b] for a, b in pairwise(begins)]
                assert len(parts) > 2
                logits = torch.cat([model(part[None]).logits[0] for part in parts])
                alone.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))
                across.append(model(row[None], labels=row[None]).loss)
        loss = real(self, model, inputs, *arguments)
        assert loss.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-5)
        checked.append(abs(loss - torch.stack(across).mean()).item())
        return loss

    monkeypatch.setattr(LMTrainer, "training_step", training_step)
    train(config)
    assert len(checked) == config.steps
    assert max(checked) > 1e-4  # attention across documents is another loss
