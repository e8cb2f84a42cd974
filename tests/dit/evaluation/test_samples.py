"""Samples of a pipeline as an image set: kept, checked and reused, independent of batches."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import complexity_dit.evaluation.samples
from complexity_dit.config import SampleConfig
from complexity_dit.evaluation.features import FEATURE_CHUNK
from complexity_dit.evaluation.samples import generated_images
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from inl_core.run.errors import UserError

SAMPLING = SampleConfig(num_inference_steps=1, batch_size=4, chunk_size=4)
N = 10


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([[i % 3, i % 2] for i in range(N)])


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the generated images, in order."""
    numbers: list[int] = []
    original = complexity_dit.evaluation.samples.iter_samples

    def spy(pipe, labels, config, indices=None, progress=True, prompts=None):
        for batch, images in original(pipe, labels, config, indices, progress):
            numbers.extend(batch)
            yield batch, images

    monkeypatch.setattr(complexity_dit.evaluation.samples, "iter_samples", spy)
    return numbers


def test_kept_images_are_reused_bit_for_bit(
    pipe: ComplexityDiTPipeline, labels: torch.Tensor, tmp_path: Path, sampled: list[int]
) -> None:
    free = generated_images(pipe, labels, SAMPLING).read(range(N))
    sampled.clear()
    kept = generated_images(pipe, labels, SAMPLING, tmp_path / "kept")
    np.testing.assert_array_equal(kept.read([0, 1, 2, 3]), free[:4])
    # Interrupted here and resumed with another batch size, which is not a different setting.
    again = generated_images(pipe, labels, replace(SAMPLING, batch_size=3), tmp_path / "kept")
    np.testing.assert_array_equal(again.read(range(N)), free)
    assert sampled == list(range(N))
    np.testing.assert_array_equal(again.read([7, 2]), free[[7, 2]])
    assert sampled == list(range(N))
    assert again.fingerprint == kept.fingerprint


def test_partial_files_of_a_killed_run_are_removed(
    pipe: ComplexityDiTPipeline, labels: torch.Tensor, tmp_path: Path, caplog
) -> None:
    folder = tmp_path / "kept"
    generated_images(pipe, labels, SAMPLING, folder).read([0, 1])
    (folder / ".000002.png.partial.ab12.png").write_bytes(b"half")
    with caplog.at_level("INFO"):
        generated_images(pipe, labels, SAMPLING, folder)
    assert "has 2 images" in caplog.text
    assert {p.name for p in folder.iterdir()} == {"000000.png", "000001.png", "settings.json"}


def test_a_changed_file_is_generated_again(
    pipe: ComplexityDiTPipeline, labels: torch.Tensor, tmp_path: Path, sampled: list[int], caplog
) -> None:
    images = generated_images(pipe, labels, SAMPLING, tmp_path)
    first = images.read(range(N))
    sampled.clear()
    broken = tmp_path / "000002.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    Image.fromarray(first[0]).save(tmp_path / "000004.png")  # without a checksum
    (tmp_path / "000007.png").write_bytes(
        (tmp_path / "000006.png").read_bytes()
    )  # of another image
    np.testing.assert_array_equal(images.read(range(N)), first)
    assert sampled == [2, 4, 7]
    assert caplog.text.count("generated again") == 3


def test_errors_name_different_settings(
    pipe: ComplexityDiTPipeline, labels: torch.Tensor, tmp_path: Path, sampled: list[int]
) -> None:
    generated_images(pipe, labels, SAMPLING, tmp_path).read([0])
    other = replace(SAMPLING, guidance_scale=3.0, seed=5)
    with pytest.raises(UserError, match=r"sample\.guidance_scale, sample\.seed"):
        generated_images(pipe, labels, other, tmp_path)
    with torch.no_grad():
        next(pipe.transformer.parameters()).view(-1)[0] += 1
    with pytest.raises(UserError, match="pipeline_sha256"):
        generated_images(pipe, labels, SAMPLING, tmp_path)
    sampled.clear()
    generated_images(pipe, labels, SAMPLING, tmp_path, overwrite=True).read([0])
    assert sampled == [0]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "cat.png").touch()
    with pytest.raises(UserError, match="is not empty"):
        generated_images(pipe, labels, SAMPLING, tmp_path / "foreign")


def test_the_weights_of_a_guide_are_part_of_the_settings(
    pipe: ComplexityDiTPipeline, labels: torch.Tensor, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "guide")
    led = replace(SAMPLING, guidance_scale=2.0, autoguidance=str(tmp_path / "guide"))
    kept = generated_images(pipe, labels, led, tmp_path / "kept")
    weights = copy.deepcopy(pipe.transformer.state_dict())
    with torch.no_grad():
        next(pipe.transformer.parameters()).view(-1)[0] += 1
    pipe.save_pretrained(tmp_path / "guide")
    pipe.transformer.load_state_dict(weights)
    assert generated_images(pipe, labels, led).fingerprint != kept.fingerprint
    with pytest.raises(UserError, match=r"\(autoguidance_sha256\)"):
        generated_images(pipe, labels, led, tmp_path / "kept")


@pytest.mark.parametrize(("batch", "chunk"), [(1, 16), (7, 16), (64, 16), (40, 12)])
def test_blocks_are_full_chunks_of_pipeline_and_feature_network(
    pipe: ComplexityDiTPipeline, labels: torch.Tensor, batch: int, chunk: int
) -> None:
    block = generated_images(pipe, labels, SampleConfig(batch_size=batch, chunk_size=chunk)).block
    assert block % chunk == block % FEATURE_CHUNK == 0
    assert batch <= block < batch + 2 * max(block // 2, 96)


def test_non_finite_images_are_rejected(
    pipe: ComplexityDiTPipeline, labels: torch.Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="sample 0 has values that are not finite"):
        generated_images(pipe, labels, SAMPLING, tmp_path).read([0, 1])
    assert not list(tmp_path.glob("*.png"))
