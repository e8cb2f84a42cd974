"""Sampling of seeded sets: equal bits in any batch; grids, folders and archives."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from complexity_dit.config import SHIPPED, SampleConfig
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.grids import save_grid
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import (
    drawn_labels,
    find_pipeline,
    grid_labels,
    iter_samples,
    load_pipeline,
    sample,
)
from inl_core.run.errors import UserError
from support.disk import failing
from support.locks import locked_elsewhere
from support.networks import small_network
from support.processes import python, torchrun

QUICK = SampleConfig(num_inference_steps=2, batch_size=8, chunk_size=4)


def labels_for(pipe, count):
    return torch.stack([torch.arange(count) % 3, torch.arange(count) % 2], dim=1)


def images_by_index(pipe, count, config, indices=None):
    found = {}
    for batch, images in iter_samples(
        pipe, labels_for(pipe, count), config, indices, progress=False
    ):
        found |= dict(zip(batch, images, strict=True))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 64])
def test_bits_do_not_depend_on_the_batch(pipe, batch_size):
    full = images_by_index(pipe, 11, QUICK)
    assert sorted(full) == list(range(11))
    other = images_by_index(pipe, 11, replace(QUICK, batch_size=batch_size))
    assert all(np.array_equal(full[i], other[i]) for i in range(11))


def test_bits_do_not_depend_on_the_requested_indices(pipe):
    full = images_by_index(pipe, 11, QUICK)
    some = images_by_index(pipe, 11, QUICK, [1, 2, 6, 10])
    assert sorted(some) == [1, 2, 6, 10]
    assert all(np.array_equal(full[i], some[i]) for i in some)
    # A prefix of a larger set is the smaller set.
    assert all(np.array_equal(full[i], images_by_index(pipe, 5, QUICK)[i]) for i in range(5))


def test_every_network_call_has_the_chunk_size(pipe, monkeypatch):
    sizes = set()
    real = type(pipe.transformer).forward

    def watch(self, hidden_states, *args, **kwargs):
        sizes.add(len(hidden_states))
        return real(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", watch)
    images_by_index(pipe, 11, replace(QUICK, batch_size=3))
    assert sizes == {8}  # chunk_size images, with and without labels


def test_seeds_and_images_differ(pipe):
    images = images_by_index(pipe, 6, QUICK)
    assert not np.array_equal(images[0], images[3])  # equal labels, different noise
    assert not np.array_equal(images[0], images_by_index(pipe, 6, replace(QUICK, seed=1))[0])


def test_a_grid_has_a_row_per_label(pipe, tmp_path):
    labels = grid_labels(pipe, columns=2)
    assert labels.tolist() == [[0, -1], [0, -1], [1, -1], [1, -1], [2, -1], [2, -1]]
    assert grid_labels(pipe, 1, "genre").tolist() == [[-1, 0], [-1, 1]]

    red = np.zeros((3, 8, 8, 3), np.uint8)
    red[1, ..., 0] = 255
    save_grid(red, 2, ["a", "b"], tmp_path / "grid.png", scale=1)
    with Image.open(tmp_path / "grid.png") as grid:
        picture = np.asarray(grid)
    assert (picture == [255, 0, 0]).all(-1).sum() == 64
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_a_grid_of_many_classes_shows_some_in_equal_steps(pipe):
    network = small_network(label_fields=["kind"], num_classes=[1000])
    rows = grid_labels(ComplexityDiTPipeline(network, pipe.scheduler), 8)
    assert rows.shape == (64 * 8, 1)
    shown = rows[::8, 0]
    assert (shown[0], shown[-1]) == (0, 984)
    assert set(shown.diff().tolist()) == {15, 16}


def test_the_command_writes_a_grid_a_folder_or_an_archive(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    source = str(tmp_path / "pipe")
    sample(source, str(tmp_path / "grid.png"), sampling=QUICK)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height > 3 * 96
    labels = {"style": ["Cubism", "Fauvism"], "genre": ["portrait"]}
    sample(source, str(tmp_path / "folder"), 5, labels, QUICK)
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
        ".complexity-dit-samples", *(f"{i:06d}.png" for i in range(5)), "settings.json"
    ]  # fmt: skip
    sample(source, str(tmp_path / "set.npz"), 5, labels, QUICK)
    array = np.load(tmp_path / "set.npz")["arr_0"]
    assert array.dtype == np.uint8
    assert array.shape == (5, 8, 8, 3)
    for i in range(5):
        with Image.open(tmp_path / f"folder/{i:06d}.png") as picture:
            assert np.array_equal(array[i], np.asarray(picture))


def test_labels_that_are_not_named_are_drawn_together(counted_pipe, tmp_path):
    counted_pipe.save_pretrained(tmp_path / "pipe")
    again = load_pipeline(str(tmp_path / "pipe"))
    nothing = torch.full((400, 2), -1)
    rows = drawn_labels(again, nothing, seed=3)
    assert {tuple(row) for row in rows.tolist()} == {(0, 0), (0, 1), (1, 1), (2, -1)}
    assert (rows[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    # Image i of a seed has its labels in a set of any size; another seed gives others.
    assert torch.equal(drawn_labels(again, nothing[:7], seed=3), rows[:7])
    assert not torch.equal(drawn_labels(again, nothing, seed=4), rows)
    sample(str(tmp_path / "pipe"), str(tmp_path / "drawn.npz"), 6, sampling=QUICK)
    _, images = next(iter_samples(again, drawn_labels(again, nothing[:6], QUICK.seed), QUICK))
    assert np.array_equal(np.load(tmp_path / "drawn.npz")["arr_0"], images)
    # In a grid with a row per style, the genre is drawn from the pictures of that style.
    grid = drawn_labels(again, grid_labels(again, 8), seed=0)
    assert grid[:, 0].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert set(grid[:8, 1].tolist()) == {0, 1}
    assert grid[8:, 1].tolist() == [1] * 8 + [-1] * 8


def test_wrong_input_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    source = str(tmp_path / "pipe")
    with pytest.raises(UserError, match="Cubism"):
        sample(source, str(tmp_path / "x.png"), labels={"style": ["Cubsm"]}, sampling=QUICK)
    (tmp_path / "there.png").write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        sample(source, str(tmp_path / "there.png"), sampling=QUICK)
    assert (tmp_path / "there.png").read_bytes() == b"precious"
    for name in ("x.jpg", "x.PNG", "x.webp", "x.zip"):
        with pytest.raises(UserError, match=r"would be a folder; expected FILE\.png"):
            sample(source, str(tmp_path / name), sampling=QUICK)
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match="num_images 0"):
        sample(source, str(tmp_path / "x"), 0, sampling=QUICK)
    with pytest.raises(UserError, match="chunk_size is 0"):
        next(iter_samples(pipe, labels_for(pipe, 1), replace(QUICK, chunk_size=0)))
    with pytest.raises(UserError, match="not a pipeline folder"):
        load_pipeline(str(tmp_path / "nothing" / "here"))
    (tmp_path / "pipe/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot load the pipeline"):
        load_pipeline(source)


def test_a_folder_of_samples_is_completed_and_never_mixed(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "pipe")
    source, folder = str(tmp_path / "pipe"), tmp_path / "folder"
    sample(source, str(folder), 5, sampling=QUICK)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "000003.png").unlink()  # as after a kill
    (folder / "000002.png").write_bytes(first["000002.png"][:-30])
    (folder / ".000003.png.0123abcd.complexity-partial").write_bytes(b"half")
    sample(source, str(folder), 5, sampling=replace(QUICK, batch_size=1))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert "wrote 2 images" in capsys.readouterr().out
    for count, settings, named in ((3, QUICK, "num_images"), (5, replace(QUICK, seed=1), "seed")):
        with pytest.raises(UserError, match=rf"other settings \(.*{named}.*overwrite"):
            sample(source, str(folder), count, sampling=settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    sample(source, str(folder), 3, sampling=QUICK, overwrite=True)
    assert len(list(folder.glob("*.png"))) == 3


def test_processes_share_the_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    words = ("--num_images", 9, "--chunk_size", 4, "--num_inference_steps", 1)
    command = ("-m", "complexity_dit", "sample", tmp_path / "pipe", *words, "--out")
    done = torchrun(2, *command, tmp_path / "two")
    assert done.stdout.count("wrote 9 images") == 1
    python(*command, tmp_path / "one")
    one, two = ((tmp_path / name).glob("*.png") for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one} == {p.name: p.read_bytes() for p in two}


def test_pictures_of_the_user_are_not_replaced(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000001.png").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"exists and is not one.*--out"):
            sample(str(tmp_path / "pipe"), str(tmp_path / "mine"), overwrite=overwrite)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["000001.png"]


def test_one_command_at_a_time_writes_to_a_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    with locked_elsewhere(tmp_path / "out") as holder:
        for write in (
            lambda: sample(str(tmp_path / "pipe"), str(tmp_path / "out")),
            lambda: evaluate(pipe, "art", tmp_path / "out"),
        ):
            with pytest.raises(UserError, match=f"another run, process {holder.pid}"):
                write()


def test_a_folder_that_cannot_be_written_is_found_out_at_the_start(pipe, tmp_path):
    (tmp_path / "file").touch()
    for name in ("folder", "grid.png", "set.npz"):
        with pytest.raises(UserError, match=r"cannot write.*--out"):
            sample("no pipeline yet", str(tmp_path / "file" / name))


@pytest.mark.parametrize("name", ["folder/000003.png", "grid.png", "set.npz"])
def test_a_full_disk_is_one_line(pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path / "pipe")
    begun = False

    def rule(event, path, writes):  # the empty file is made, and then nothing fits into it
        nonlocal begun
        if event != "open" or not writes or Path(name).name not in path:
            return None
        begun, before = True, begun
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) if before else None

    out = str(tmp_path / name.partition("/")[0])
    message = r"cannot write .*No space left.*free space.*--out"
    with failing(rule), pytest.raises(UserError, match=message):
        sample(str(tmp_path / "pipe"), out, 5, sampling=QUICK)
    assert not list(tmp_path.rglob("*-partial"))


def test_an_unreachable_hub_is_one_line_at_once(monkeypatch):
    with pytest.raises(UserError) as refused:
        load_pipeline("nobody/nothing")
    assert str(refused.value).startswith("cannot load the pipeline nobody/nothing: OfflineModeIs")
    assert "\n" not in str(refused.value)
    monkeypatch.setattr("complexity_dit.hub.is_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"nobody/nothing: cannot reach http://127\..*give the path"
    ):
        load_pipeline("nobody/nothing")


@pytest.mark.parametrize(("name", "hub_id"), SHIPPED.items())
def test_a_shipped_pipeline_is_known_by_its_name(name, hub_id, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("inl_core.run.shipped.__file__", str(tmp_path / "a/b/c/d/e/f.py"))
    with pytest.raises(UserError, match=f"cannot load the pipeline {hub_id}"):
        load_pipeline(name)  # no clone: from the Hub, which tests have switched off
    pipe.save_pretrained(tmp_path / "checkpoints" / name)
    assert find_pipeline(Path(name)) == tmp_path / "checkpoints" / name
    assert load_pipeline(name).id2label == pipe.id2label
    (tmp_path / name).mkdir()  # a folder of the user's wins
    with pytest.raises(UserError, match=f"{name} is not a pipeline folder"):
        load_pipeline(name)
