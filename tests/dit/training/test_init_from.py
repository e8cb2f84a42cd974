"""Weights that a run may start or resume from: fine-tuning, new labels, other models."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.training.network import start_from
from complexity_dit.training.state import check_labels
from complexity_dit.training.train import train
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
    start_from(model, str(tmp_path), names)
    x = torch.randn(5, 3, 8, 8)
    t = torch.tensor([5.0, 100.0, 400.0, 700.0, 999.0])
    # Ukiyo_e, Cubism, the new style, no style, an artist.
    new = torch.tensor([[0, -1], [1, -1], [2, -1], [-1, -1], [0, 0]])
    old = torch.tensor([[2, -1], [0, -1], [-1, -1], [-1, -1], [2, -1]])
    with torch.no_grad():
        result, expected = model(x, t, new).sample, pipe.transformer(x, t, old).sample
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)  # labels matter here


def test_another_network_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for changes, words in (
        ({"hidden_size": 64}, r"another model \(\d+ tensors differ\): .*32.*there.*64.*here"),
        ({"num_layers": 1}, "blocks.1.*is unknown"),
        ({"num_layers": 3}, "blocks.2.*is missing"),
        # The same tensors with another meaning.
        ({"dynamics_placement": "stream"}, "dynamics_placement is 'branch' there and 'stream'"),
        ({"num_attention_heads": 2}, "num_attention_heads is 4 there and 2 here|tensors differ"),
    ):
        with pytest.raises(UserError, match=words):
            start_from(another(pipe, **changes), str(tmp_path), pipe.label_names)
    with pytest.raises(UserError, match="not a pipeline folder"):
        start_from(pipe.transformer, str(tmp_path / "nowhere"), pipe.label_names)


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


def test_another_number_of_processes_is_logged(small_run, caplog):
    train(dataclasses.replace(small_run, steps=4))
    state = last_checkpoint(small_run.out) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"processes": 2}))
    write_sums(state.parent)
    with caplog.at_level(logging.INFO):
        train(dataclasses.replace(small_run, resume="auto"))
    assert "written by 2 process(es) and is resumed by 1" in caplog.text
