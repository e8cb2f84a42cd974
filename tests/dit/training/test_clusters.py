"""Training on clusters: exact resume, several processes, fine-tuning, and sampling without one."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from complexity_dit.config import DataConfig, SampleConfig, TrainConfig
from complexity_dit.data.clusters import CLUSTERS_FILE
from complexity_dit.data.dataset import load_data
from complexity_dit.pipelines.sampling import drawn_labels, load_pipeline, sample
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.outcomes import last_checkpoint, losses_of
from support.pictures import pictures, write_folder
from support.processes import torchrun


@pytest.fixture
def unlabelled_run(small_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    folder = write_folder(tmp_path / "folder", pictures(40, 2))
    data = DataConfig(f"imagefolder:{folder}", resolution=16, holdout=0.2, clusters=5)
    return dataclasses.replace(small_run, data=data, heldout_every=4)


def test_resume_is_exact_and_keeps_the_centres(unlabelled_run, resumed_as_straight, monkeypatch):
    resumed_as_straight(unlabelled_run)
    first = dataclasses.replace(unlabelled_run, steps=4)
    train(first)
    # The centres are those of the checkpoint; another machine might find others.
    monkeypatch.setattr("complexity_dit.training.train.fit_clusters", None)
    train(dataclasses.replace(unlabelled_run, resume="auto"))
    other = dataclasses.replace(unlabelled_run.data, clusters=6)
    with pytest.raises(UserError, match=r"data\.clusters is 5 there and 6 here"):
        train(dataclasses.replace(unlabelled_run, data=other, resume="auto"))


def test_a_folder_without_labels_is_trained_and_sampled_with_guidance(unlabelled_run, tmp_path):
    folder = train(unlabelled_run)
    pipe = load_pipeline(str(folder))
    assert pipe.label_names == {"cluster": ["0", "1", "2", "3", "4"]}
    counts = pipe.config.label_counts
    total = len(load_data(unlabelled_run.data, "train"))
    assert sum(counts.values()) == total
    # A cluster that is not asked for is drawn as often as it has pictures.
    rows = drawn_labels(pipe, torch.full((4000, 1), -1), seed=0)
    for name, count in counts.items():
        share = (rows == int(name)).float().mean().item()
        assert share == pytest.approx(count / total, abs=0.03)
    quick = SampleConfig(num_inference_steps=2, guidance_scale=3.0)
    sample(str(folder), str(tmp_path / "drawn"), 6, sampling=quick)
    labels = {"cluster": [str(i) for i in rows[:6, 0].tolist()]}
    sample(str(folder), str(tmp_path / "named"), 6, labels, sampling=quick)
    for i in range(6):
        one, two = (tmp_path / name / f"{i:06d}.png" for name in ("drawn", "named"))
        assert one.read_bytes() == two.read_bytes()


def test_a_fine_tuning_has_the_clusters_of_its_base(unlabelled_run, tmp_path):
    base = train(unlabelled_run)
    centres = load_file(base / CLUSTERS_FILE)["centres"]
    other = write_folder(tmp_path / "other", pictures(30, 4))
    data = dataclasses.replace(unlabelled_run.data, source=f"imagefolder:{other}")
    run = dataclasses.replace(
        unlabelled_run, data=data, out=str(tmp_path / "tuned"), init_from=str(base)
    )
    assert torch.equal(load_file(train(run) / CLUSTERS_FILE)["centres"], centres)
    few = dataclasses.replace(
        run, data=dataclasses.replace(data, clusters=3), out=str(tmp_path / "x")
    )
    with pytest.raises(UserError, match=r"set --data\.clusters 5"):
        train(few)


def test_more_clusters_than_pictures_end_a_run_at_its_start(unlabelled_run):
    data = dataclasses.replace(unlabelled_run.data, clusters=64)
    count = len(load_data(data, "train"))
    with pytest.raises(UserError, match=f"clusters 64: the training data have only {count} diff"):
        train(dataclasses.replace(unlabelled_run, data=data))


def test_two_processes_train_on_the_clusters_of_one(unlabelled_run, tmp_path):
    train(unlabelled_run)
    options = (
        "--data.source", unlabelled_run.data.source, "--data.resolution", 16, "--data.holdout", 0.2,
        "--data.clusters", 5, "--steps", 8, "--batch_size", 4, "--log_every", 3,
        "--checkpoint_every", 4, "--heldout_every", 4, "--mixed_precision", "no",
        "--optim.warmup_steps", 2, "--model.overrides",
        "{hidden_size: 32, num_layers: 2, num_attention_heads: 2}",
    )  # fmt: skip
    torchrun(2, "-m", "complexity_dit", "train", "--out", tmp_path / "two", *options)
    one, two = (
        load_file(last_checkpoint(out) / "pipeline" / CLUSTERS_FILE)["centres"]
        for out in (unlabelled_run.out, tmp_path / "two")
    )
    assert torch.equal(one, two)
    losses = [losses_of(out) for out in (unlabelled_run.out, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
