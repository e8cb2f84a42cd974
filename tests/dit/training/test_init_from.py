"""Weights that a run may start or resume from: fine-tuning, new labels, other models."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from complexity_dit.config import ModelConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training.network import build_model, start_from
from complexity_dit.training.state import check_labels
from complexity_dit.training.train import train
from inl_core import dynamics_modules
from inl_core.run.checkpoints import write_sums
from inl_core.run.errors import UserError
from support.outcomes import last_checkpoint, losses_of


def another(pipe, **changes):
    return ComplexityDiTTransformer2DModel.from_config(pipe.transformer.config, **changes).eval()


def test_labels_are_matched_by_name(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    # Styles in another order, one added and one removed; no genres; artists are new.
    names = {"style": ["Ukiyo_e", "Cubism", "Orphism"], "artist": ["Delaunay"]}
    model = another(pipe, label_fields=list(names), num_classes=[3, 1])
    start_from(model, load_pipeline(str(tmp_path)), names, "it")
    x = torch.randn(5, 3, 8, 8)
    t = torch.tensor([5.0, 100.0, 400.0, 700.0, 999.0])
    # Ukiyo_e, Cubism, the new style, no style, an artist.
    new = torch.tensor([[0, -1], [1, -1], [2, -1], [-1, -1], [0, 0]])
    old = torch.tensor([[2, -1], [0, -1], [-1, -1], [-1, -1], [2, -1]])
    with torch.no_grad():
        result, expected = model(x, t, new).sample, pipe.transformer(x, t, old).sample
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)  # labels matter here


def test_another_network_is_refused(pipe):
    for changes, words in (
        ({"hidden_size": 64}, r"another model \(\d+ tensors differ\): .*32.*there.*64.*here"),
        ({"num_layers": 1}, "blocks.1.*is unknown"),
        ({"num_layers": 3}, "blocks.2.*is missing"),
        # The same tensors with another meaning.
        ({"dynamics_placement": "stream"}, "dynamics_placement is 'branch' there and 'stream'"),
        ({"num_attention_heads": 2}, "num_attention_heads is 4 there and 2 here|tensors differ"),
    ):
        with pytest.raises(UserError, match=words):
            start_from(another(pipe, **changes), pipe, pipe.label_names, "it")


def test_labels_added_after_training(small_run, tmp_path, caplog):
    styles = dataclasses.replace(small_run.data, label_fields=["style"])
    both = dataclasses.replace(small_run.data, label_fields=["style", "genre"])
    run = dataclasses.replace(small_run, data=styles)
    train(run)
    with pytest.raises(UserError, match=r"field genre was added.*--init_from .*p") as refusal:
        train(dataclasses.replace(run, data=both, resume="auto"))
    # The command in the message works, and a resumed run ignores init_from.
    start = str(refusal.value).partition("--init_from ")[2].split()[0]
    new = dataclasses.replace(run, data=both, init_from=start, out=str(tmp_path / "new"))
    with caplog.at_level(logging.INFO):
        train(new)
    assert "label field genre is new" in caplog.text
    resumed = dataclasses.replace(new, init_from=str(tmp_path / "gone"), steps=9, resume="auto")
    assert train(resumed).is_dir()
    assert losses_of(new.out)[0] != losses_of(run.out)[0]


def test_changed_labels_are_named():
    saved = {"style": ["Cubism", "Fauvism"], "genre": ["portrait"]}
    checkpoint = Path("run/checkpoints/step-00000008")
    check_labels(saved, {k: list(v) for k, v in saved.items()}, checkpoint)
    for current, words in (
        ({**saved, "style": ["Cubism", "Fauvism", "Op_Art"]}, "style has new names: Op_Art"),
        ({**saved, "style": ["Cubism"]}, "style lacks Fauvism"),
        ({**saved, "style": ["Fauvism", "Cubism"]}, "in another order"),
        ({"style": saved["style"]}, "label field genre was removed"),
        ({**saved, "style": [*saved["style"], *"abcdefg"]}, "a, b, c, d, e and 2 more"),
    ):
        with pytest.raises(UserError, match=words):
            check_labels(saved, current, checkpoint)


def test_checkpoint_of_a_network_of_equal_shapes_is_refused(small_run):
    train(small_run)
    stream = dataclasses.replace(small_run.model, dynamics_placement="stream")
    with pytest.raises(UserError, match=r"give --model.dynamics_placement branch, or"):
        train(dataclasses.replace(small_run, model=stream, resume="auto"))


def recorded_model(out):
    return json.loads((last_checkpoint(out) / "state.json").read_text())["config"]["model"]


def test_dynamics_that_are_not_named_are_those_of_before(small_run, tmp_path):
    """Of the run that is resumed and of the pipeline that is started from; a preset names them."""
    lite = dataclasses.replace(small_run.model, dynamics_adaptive="lite")
    unnamed = dataclasses.replace(small_run.model, dynamics_placement=None, dynamics_adaptive=None)
    train(dataclasses.replace(small_run, model=lite, steps=4))
    whole = train(dataclasses.replace(small_run, model=unnamed, resume="auto"))
    assert recorded_model(small_run.out)["dynamics_placement"] == "branch"
    tuned = dataclasses.replace(
        small_run, model=unnamed, init_from=str(whole), out=str(tmp_path / "tuned")
    )
    train(tuned)
    assert recorded_model(tuned.out)["dynamics_adaptive"] == "lite"
    paper = dataclasses.replace(unnamed, preset="paper")
    with pytest.raises(UserError, match="dynamics_placement is 'branch' there and 'stream' here"):
        train(dataclasses.replace(tuned, model=paper, out=str(tmp_path / "paper")))
    with pytest.raises(UserError, match="not a pipeline folder"):
        train(
            dataclasses.replace(
                tuned, init_from=str(tmp_path / "nowhere"), out=str(tmp_path / "no")
            )
        )


def test_the_preset_and_the_default(small_run):
    unnamed = dataclasses.replace(small_run.model, dynamics_placement=None, dynamics_adaptive=None)
    found = {}
    for preset in (None, "paper"):
        model = dataclasses.replace(unnamed, preset=preset)
        network = build_model(
            dataclasses.replace(small_run, model=model), load_data(small_run.data, "train")
        )
        found[preset] = network
    assert not dynamics_modules(found[None])
    first, _ = dynamics_modules(found["paper"]).values()
    assert found["paper"].config.dynamics_placement == "stream"
    assert (first.adaptive, first.init_alpha, first.init_beta, first.init_gate, first.dt) == (
        "token", 0.9, 0.1, 0.5, 0.1,
    )  # fmt: skip
    named = ModelConfig(preset="paper", dynamics_adaptive="channel").resolved({"a": 1})
    assert (named.dynamics_placement, named.dynamics_adaptive) == ("stream", "channel")


def test_another_number_of_processes_is_logged(small_run, caplog):
    train(dataclasses.replace(small_run, steps=4))
    state = last_checkpoint(small_run.out) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"processes": 2}))
    write_sums(state.parent)
    with caplog.at_level(logging.INFO):
        train(dataclasses.replace(small_run, resume="auto"))
    assert "written by 2 process(es) and is resumed by 1" in caplog.text
