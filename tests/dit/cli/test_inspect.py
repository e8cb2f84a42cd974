"""`inspect` of a run, a checkpoint and a pipeline."""

import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from complexity_dit.cli.inspect import inspect
from complexity_dit.config import SampleConfig
from complexity_dit.evaluation.image_sets import open_target, trained_on
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import find_pipeline, sample
from complexity_dit.training.train import train
from inl_core.run.errors import UserError


@pytest.fixture
def run(small_run):
    train(small_run)
    return small_run


def test_a_run_its_checkpoint_and_its_pipeline_give_the_same_model(run, tmp_path):
    out = tmp_path / "run"
    newest = max((out / "checkpoints").iterdir())
    models = [inspect(str(p)) for p in (out, out / "pipeline", newest)]
    assert len({model["weights_sha256"] for model in models}) == 1
    assert models[0]["sizes"]["hidden_size"] == 32
    assert models[0]["trained_on"]["source"] == "art"
    assert models[0]["labels"].keys() == {"style", "genre"}


def test_a_run_means_its_pipeline_and_an_unfinished_one_its_newest_checkpoint(run, tmp_path):
    out = tmp_path / "run"
    newest = max((out / "checkpoints").iterdir())
    assert find_pipeline(out) == find_pipeline(out / "pipeline") == out / "pipeline"
    assert trained_on(out).source == "art"
    for path in (out, newest):  # not the grids of samples/ as images
        opened = open_target(path, torch.device("cpu"), None)
        assert isinstance(opened, ComplexityDiTPipeline)
    shutil.rmtree(out / "pipeline")
    assert find_pipeline(out) == find_pipeline(newest) == newest / "pipeline"
    picture = sample(str(out), str(tmp_path / "grid.png"), 8, sampling=SampleConfig(0, 1))
    assert picture.is_file()
    again = replace(run, out=str(tmp_path / "again"), init_from=str(out), steps=1)
    assert (train(again) / "model_index.json").is_file()
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match="has not saved a checkpoint yet"):
        find_pipeline(out)


def test_the_dynamics_are_described_layer_by_layer(run, tmp_path):
    model = inspect(str(tmp_path / "run"))
    assert len(model["layers"]) == model["sizes"]["num_layers"]
    layer = model["layers"]["blocks.0.dynamics"]
    assert 0 < layer["alpha_mean"] < 1
    assert model["certificate"]["frozen_points_stable"] is True
    assert model["certificate"]["response_of_the_network"] > 0
    yaml.safe_dump(model)  # plain values only


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a pipeline folder"):
        inspect(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="not a pipeline folder"):
        inspect(str(tmp_path / "absent"))
