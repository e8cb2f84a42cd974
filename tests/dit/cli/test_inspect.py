"""`inspect` of a run, a checkpoint and a pipeline."""

import pytest
import yaml

from complexity_dit.cli.inspect import inspect
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


def test_the_dynamics_are_described_layer_by_layer(run, tmp_path):
    model = inspect(str(tmp_path / "run"))
    assert len(model["layers"]) == model["sizes"]["num_layers"]
    layer = model["layers"]["blocks.0.dynamics"]
    assert 0 < layer["alpha_mean"] < 1
    assert model["certificate"]["frozen_points_stable"] is True
    assert model["certificate"]["gain_along_the_path"] > 0
    yaml.safe_dump(model)  # plain values only


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="does not hold a pipeline"):
        inspect(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="not a pipeline folder"):
        inspect(str(tmp_path / "absent"))
