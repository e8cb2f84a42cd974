"""Evaluations are bit-identical for any number of processes and any batch size."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from complexity_dit import distributed as parallel_evaluation
from complexity_dit.config import SampleConfig
from complexity_dit.distributed import gather_rows, own_blocks
from complexity_dit.evaluation import features as features_module
from complexity_dit.evaluation.distances import fid_from_features
from complexity_dit.evaluation.features import FEATURE_CHUNK, set_features
from complexity_dit.evaluation.networks import load_random_features
from complexity_dit.evaluation.samples import generated_images
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from support.processes import torchrun

N = 2 * FEATURE_CHUNK + 5


def test_blocks_are_distributed_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for index in range(3):
        state = SimpleNamespace(process_index=index, num_processes=3)
        monkeypatch.setattr(parallel_evaluation, "process_state", lambda state=state: state)
        shares.append(own_blocks(70, 16))
    assert [[run[0] for run in share] for share in shares] == [[0, 48], [16, 64], [32]]
    assert sorted(number for share in shares for run in share for number in run) == list(range(70))
    assert own_blocks(16, 16) == []  # nothing for the third of three processes


def test_gathered_rows_are_in_order() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(gather_rows(rows, [2, 0, 1], 3), rows[[1, 2, 0]])


def test_features_are_independent_of_batch_size_and_processes(
    pipe: ComplexityDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of 1, 2 and 3 simulated processes, and batches of 1, 7 and 64."""
    labels = torch.tensor([[i % 3, i % 2] for i in range(N)])
    extractor = load_random_features()
    full = np.empty((N, extractor.feature_dim), np.float32)

    def place(rows: np.ndarray, numbers: list[int], count: int) -> np.ndarray:
        full[numbers] = rows
        return full

    found = {}
    with monkeypatch.context() as patch:
        patch.setattr(features_module, "gather_rows", place)
        patch.setattr(features_module, "all_agree", lambda value: value)
        patch.setattr(features_module, "is_main", lambda: True)
        for batch, world in ((64, 1), (1, 3), (7, 2)):
            full[:] = np.nan
            sampling = SampleConfig(num_inference_steps=1, batch_size=batch)
            images = generated_images(pipe, labels, sampling)
            for index in range(world):
                state = SimpleNamespace(process_index=index, num_processes=world)
                patch.setattr(parallel_evaluation, "process_state", lambda state=state: state)
                set_features(images, np.arange(N), extractor, cache=False)
            found[batch, world] = full.copy()
    first = found[64, 1]
    assert np.isfinite(first).all()
    for other in found.values():
        np.testing.assert_array_equal(other, first)


def test_the_chunk_size_changes_the_distance_only_by_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from complexity_dit.evaluation.image_sets import array_images

    rng = np.random.default_rng(0)
    sides = [rng.integers(0, high, (50, 16, 16, 3), dtype=np.uint8) for high in (200, 256)]
    extractor = load_random_features()

    def distance() -> float:
        both = (array_images(side) for side in sides)
        return fid_from_features(*(set_features(s, np.arange(50), extractor, False) for s in both))

    usual = distance()
    monkeypatch.setattr(features_module, "FEATURE_CHUNK", 7)
    assert distance() == pytest.approx(usual, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_and_three_processes_give_the_same_result(
    pipe: ComplexityDiTPipeline, tmp_path: Path
) -> None:
    """Images, statistics and result of the command under torchrun with gloo."""
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "real").mkdir()
    rng = np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            tmp_path / "real" / f"{i:03d}.png"
        )
    results = {}
    for world, batch in ((1, 64), (2, 7), (3, 1)):
        out = tmp_path / f"out-{world}"
        done = torchrun(
            world, "-m", "complexity_dit", "evaluate", tmp_path / "pipeline",
            "--reference", tmp_path / "real", "--out", out, "--num_images", N,
            "--weights", "random", "--device", "cpu", "--cache", "false", "--bootstrap", "2",
            "--save_statistics", "true", "--floors", "true",
            "--sample.num_inference_steps", "1", "--sample.batch_size", batch,
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )  # fmt: skip
        assert done.stdout.count("NOT FID") == 1  # one process prints
        results[world] = out
    first = results[1]
    pixels = [np.asarray(Image.open(first / "generated" / f"{i:06d}.png")) for i in range(N)]
    metrics = json.loads((first / "result.json").read_text())["metrics"]
    for out in results.values():
        for i in range(N):
            other = np.asarray(Image.open(out / "generated" / f"{i:06d}.png"))
            np.testing.assert_array_equal(other, pixels[i])
        assert json.loads((out / "result.json").read_text())["metrics"] == metrics
        with np.load(out / "reference.npz") as a, np.load(first / "reference.npz") as b:
            for key in ("mu", "sigma"):
                np.testing.assert_allclose(a[key], b[key], rtol=1e-12)
