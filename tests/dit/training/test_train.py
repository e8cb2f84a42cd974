"""Training: exact resume, complete checkpoints, and the errors that end a run."""

import dataclasses
import errno
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from complexity_dit.data.dataset import load_data
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training import batches
from complexity_dit.training import state as state_module
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.network import build_model
from complexity_dit.training.state import build_state
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.outcomes import last_checkpoint, losses_of, tensor_files


def test_resume_is_bit_identical(small_run, resumed_as_straight):
    run = dataclasses.replace(small_run, steps=40)
    resumed_as_straight(run)


def test_a_pipeline_knows_which_labels_occur_together_in_its_training_data(small_run):
    data = load_data(small_run.data, "train")
    counts = load_pipeline(str(train(small_run))).config.label_counts
    assert {tuple(map(int, key.split())): n for key, n in counts.items()} == Counter(
        map(tuple, data.labels.tolist())
    )


def test_all_labels_are_dropped_together(small_run):
    config = dataclasses.replace(small_run, batch_size=256, steps=4)
    objective = dataclasses.replace(config.objective, label_dropout=0.0)
    together = dataclasses.replace(objective, label_dropout_all=0.25)
    data = load_data(small_run.data, "train")
    for step in range(2):
        plain, dropped = (
            StepBatches(data, dataclasses.replace(config, objective=one), 0, 1)[step]
            for one in (objective, together)
        )
        missing = (dropped["labels"] == -1).all(1)
        assert 0.15 < missing.float().mean() < 0.35
        assert torch.equal(dropped["labels"][~missing], plain["labels"][~missing])
        assert torch.equal(dropped["x"], plain["x"])  # noise and times are the same


def test_a_run_of_an_older_version_goes_on_with_its_own_random_numbers(
    small_run, tmp_path, monkeypatch
):
    new = train(dataclasses.replace(small_run, out=str(tmp_path / "new")))
    with monkeypatch.context() as older:
        older.setattr("complexity_dit.training.train.SEEDING", 1)
        train(small_run)
    straight = load_file(last_checkpoint(small_run.out) / "model.safetensors")
    half = Path(small_run.out) / "checkpoints" / "step-00000004"
    meta = json.loads((half / "state.json").read_text())
    assert meta.pop("seeding") == 1
    (half / "state.json").write_text(json.dumps(meta))  # as 0.1.0 wrote it
    (half / "SHA256SUMS").unlink()
    shutil.rmtree(half.with_name("step-00000008"))
    train(dataclasses.replace(small_run, resume="auto"))
    last = last_checkpoint(small_run.out)
    assert json.loads((last / "state.json").read_text())["seeding"] == 1
    resumed = load_file(last / "model.safetensors")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    latest = load_file(last_checkpoint(new.parent) / "model.safetensors")
    assert any(not torch.equal(latest[name], straight[name]) for name in straight)


def test_a_checkpoint_has_three_files_of_tensors_and_the_settings(small_run):
    train(small_run)
    checkpoint = last_checkpoint(small_run.out)
    assert set(tensor_files(checkpoint)) == {
        "model.safetensors", "optimizer.safetensors",
        "pipeline/transformer/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    meta = json.loads((checkpoint / "state.json").read_text())
    assert (meta["step"], meta["processes"]) == (8, 1)
    assert meta["config"]["optim"]["lr"] == small_run.optim.lr
    assert (Path(small_run.out) / "config.yaml").exists()


def test_final_pipeline_has_the_ema_weights_and_the_labels(small_run):
    folder = train(small_run)
    pipe = ComplexityDiTPipeline.from_pretrained(folder)
    assert list(pipe.label_names) == ["style", "genre"]
    checkpoint = last_checkpoint(small_run.out)
    ema = load_file(checkpoint / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    raw = load_file(checkpoint / "model.safetensors")
    loaded = pipe.transformer.state_dict()
    assert all(torch.equal(loaded[name], ema[name]) for name in ema)
    assert any(not torch.equal(raw[name], ema[name]) for name in ema)


def test_batches_are_a_function_of_the_step_and_shared_between_processes(small_run):
    data = load_data(small_run.data, "train")
    batch = StepBatches(data, small_run, 0, 1)[5]
    parts = [StepBatches(data, small_run, rank, 2)[5] for rank in (0, 1)]
    for name, value in batch.items():
        assert torch.equal(value[0::2], parts[0][name])
        assert torch.equal(value[1::2], parts[1][name])
    assert not torch.equal(batch["x"], StepBatches(data, small_run, 0, 1)[6]["x"])


def test_batches_that_a_thread_prepares_are_those_of_the_steps(small_run):
    """The loader of an accelerator, here of the CPU; an error of the thread reaches the loop."""
    made, steps = StepBatches(load_data(small_run.data, "train"), small_run, 0, 1), [7, 3, 4, 5]
    ahead = batches._drawn_ahead(made, steps, torch.device("cpu"))
    for step, batch in zip(steps, ahead, strict=True):
        assert batch.keys() == made[step].keys()
        assert all(torch.equal(value, batch[name]) for name, value in made[step].items())
    with pytest.raises(ValueError, match="start -"):
        list(batches._drawn_ahead(made, [0, -1], torch.device("cpu")))


def test_a_resumed_run_keeps_the_density_that_it_recorded(small_run):
    left_open = dataclasses.replace(small_run.objective, prediction_type="epsilon")
    named = dataclasses.replace(left_open, time_sampling="logit_normal", shift=2.0)
    path, names = Path(small_run.out) / "config.yaml", ("time_sampling", "shift")

    def recorded(steps, objective, resume="auto"):
        train(dataclasses.replace(small_run, steps=steps, objective=objective, resume=resume))
        return tuple(yaml.safe_load(path.read_text())["objective"][x] for x in names)

    assert recorded(2, named) == ("logit_normal", 2.0)
    assert recorded(4, left_open) == ("logit_normal", 2.0)
    shutil.rmtree(small_run.out)
    assert recorded(2, left_open) == ("uniform", 1.0)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_the_bits_of_a_batch_do_not_depend_on_its_blocks(kind, small_run, monkeypatch):
    objective = dataclasses.replace(small_run.objective, prediction_type=kind)
    run = dataclasses.replace(small_run, objective=objective)
    data = load_data(run.data, "train")
    batch = StepBatches(data, run, 0, 1)[5]
    for pictures in (1, 3):  # three do not divide the batch
        monkeypatch.setattr(batches, "_BLOCK", pictures * batch["x"][0].numel())
        for name, value in StepBatches(data, run, 0, 1)[5].items():
            assert torch.equal(value, batch[name]), name


def test_accumulation_gives_nearly_the_same_losses(small_run, tmp_path):
    train(dataclasses.replace(small_run, out=str(tmp_path / "a")))
    train(dataclasses.replace(small_run, out=str(tmp_path / "b"), gradient_accumulation_steps=2))
    assert losses_of(tmp_path / "a") == pytest.approx(losses_of(tmp_path / "b"), rel=1e-4)


def test_a_clip_of_zero_does_not_clip(small_run, tmp_path):
    for name, clip in (("a", 0.0), ("b", 1e9)):
        optim = dataclasses.replace(small_run.optim, grad_clip=clip)
        train(dataclasses.replace(small_run, out=str(tmp_path / name), optim=optim))
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


def test_the_loss_falls(small_run):
    data = dataclasses.replace(small_run.data, num_images=16, holdout=0.0, flip=False)
    train(dataclasses.replace(small_run, steps=60, checkpoint_every=60, batch_size=16, data=data))
    curve = losses_of(small_run.out)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])


def test_existing_folder_is_refused(small_run):
    Path(small_run.out).mkdir()
    (Path(small_run.out) / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is not one .*--out"):
        train(small_run)
    assert (Path(small_run.out) / "precious.txt").read_text() == "mine"


def test_checkpoint_of_another_shape_is_refused(small_run):
    train(small_run)
    wider = dataclasses.replace(
        small_run.model, overrides={"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2}
    )
    with pytest.raises(UserError, match=r"size is 32 .*--model.overrides.hidden_size 32"):
        train(dataclasses.replace(small_run, model=wider, resume="auto"))


def test_resume_from_a_missing_or_damaged_checkpoint_is_refused(small_run, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint folder"):
        train(dataclasses.replace(small_run, resume=str(tmp_path / "nowhere")))
    train(small_run)
    checkpoint = last_checkpoint(small_run.out)
    (checkpoint / "model.safetensors").write_bytes(b"rubbish")
    again = dataclasses.replace(small_run, resume="auto", steps=9)
    with pytest.raises(UserError, match=r"step-00000008 is damaged: model.safetensors is not what"):
        train(again)
    (checkpoint / "SHA256SUMS").unlink()  # as written before there were checksums
    with pytest.raises(UserError, match="cannot read checkpoint"):
        train(again)


def test_full_disk_keeps_the_last_good_checkpoint(small_run, monkeypatch):
    real = state_module.save_file

    def full_at_step_8(tensors, path):
        if "step-00000008" in str(path) and "optimizer" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(state_module, "save_file", full_at_step_8)
    with pytest.raises(UserError, match=r"No space left.*step-00000004"):
        train(small_run)
    checkpoints = Path(small_run.out) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    train(dataclasses.replace(small_run, resume="auto"))
    assert last_checkpoint(small_run.out).name == "step-00000008"


def test_nan_stops_the_run_and_names_the_step(small_run, on_batch):
    on_batch(lambda step, batch: batch["target"].fill_(math.nan) if step == 5 else None)
    with pytest.raises(UserError, match=r"step 6: loss nan.*step-00000004"):
        train(small_run)
    checkpoint = last_checkpoint(small_run.out)
    assert checkpoint.name == "step-00000004"
    assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())


def test_a_batch_that_cannot_be_split_is_refused(small_run):
    with pytest.raises(UserError, match="batch_size 4 must be divisible"):
        train(dataclasses.replace(small_run, gradient_accumulation_steps=3))


def test_weight_decay_spares_norms_biases_labels_and_dynamics(small_run):
    model = build_model(small_run, load_data(small_run.data, "train"))
    state = build_state(model, small_run)
    decayed = {id(p) for p in state.optimizer.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "blocks.0.attn.to_q.weight" in names
    assert not any(w in n for n in names for w in ("norm", "bias", "label_embed", "dynamics"))
    assert state.optimizer.param_groups[1]["weight_decay"] == 0
