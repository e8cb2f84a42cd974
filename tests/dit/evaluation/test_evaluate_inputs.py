"""Evaluations of every kind of input, with floors, labels and memorisation."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import complexity_dit.evaluation.samples
from complexity_dit.__main__ import PROGRAM
from complexity_dit.config import DataConfig, EvalConfig, SampleConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.evaluation.evaluate import evaluate, evaluate_images
from complexity_dit.evaluation.features import draw, set_features
from complexity_dit.evaluation.image_sets import array_images, folder_images
from complexity_dit.evaluation.networks import load_random_features
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from inl_core.run.errors import UserError
from support.pictures import pictures, write_folder

QUICK = EvalConfig(num_images=24, weights="random", device="cpu", quiet=True, bootstrap=2)


pytestmark = pytest.mark.usefixtures("own_cache")


def test_samples_of_an_interrupted_run_are_reused(
    pipe: ComplexityDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_folder(tmp_path / "real", pictures(40, 0, 8))
    config = replace(QUICK, num_images=40)
    sample = SampleConfig(num_inference_steps=1, batch_size=32)
    sampled: list[int] = []
    original = complexity_dit.evaluation.samples.iter_samples

    def stopping(pipe, labels, config, indices=None, progress=True, prompts=None):
        for batch, images in original(pipe, labels, config, indices, progress):
            if 32 in batch and not sampled.count(-1):
                sampled.append(-1)
                raise KeyboardInterrupt
            sampled.extend(batch)
            yield batch, images

    monkeypatch.setattr(complexity_dit.evaluation.samples, "iter_samples", stopping)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, real, out, config, sample)
    assert not (out / "result.json").exists()
    result = evaluate(pipe, real, out, config, sample)
    assert sampled == [*range(32), -1, *range(32, 40)]
    kept = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    assert kept == ["generated", "report.html", "result.json"]
    assert result["metrics"] == evaluate(pipe, real, None, config, sample)["metrics"]
    # The kept PNG files are an ordinary folder of images.
    folder = evaluate(out / "generated", real, config=config)["metrics"]
    assert folder["precision"] == pytest.approx(result["metrics"]["precision"], abs=0.05)


def test_jpeg_against_another_format_gets_a_warning(tmp_path: Path, caplog) -> None:
    images = pictures(24, 0, 16)
    png = write_folder(tmp_path / "png", images)
    jpeg = tmp_path / "jpeg"
    jpeg.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(jpeg / f"{i}.jpg")
    data = DataConfig(holdout=0.5, resolution=16)
    cases = [
        (jpeg, png, "100 % of the images and 0 % of the reference are JPEG"),
        (png, f"imagefolder:{jpeg}", "0 % of the images and 100 % of the reference are JPEG"),
        (jpeg, jpeg, ""),
        (png, "art", ""),
    ]
    for target, reference, words in cases:
        caplog.clear()
        evaluate(target, reference, config=QUICK, data=replace(data, num_images=40))
        assert words in caplog.text
        assert ("JPEG" in caplog.text) == bool(words)


def test_a_run_is_no_folder_of_images(pipe: ComplexityDiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    write_folder(tmp_path / "run" / "samples", pictures(4, 0, 8))
    with pytest.raises(UserError, match="run holds a model; expected a folder of images"):
        evaluate(write_folder(tmp_path / "other", pictures(4, 0, 8)), tmp_path / "run")


def test_every_kind_of_input_gives_the_same_numbers(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    fake, real = (folder_images(folder) for folder in folders)
    arrays = [side.read(range(len(side))) for side in (fake, real)]
    for name, array in zip("ab", arrays, strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    config = replace(QUICK, measures=["fid", "prdc"])
    usual = evaluate(*folders, config=config)["metrics"]
    assert evaluate(tmp_path / "a.npz", tmp_path / "b.npz", config=config)["metrics"] == usual
    # `evaluate` draws as many images as the smaller side has; here all are used.
    found = evaluate_images(arrays[0], arrays[1][draw(15, 12, 0)], config).metrics
    assert found["fd_random"] == pytest.approx(usual["fd_random"], rel=1e-6)
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(UserError, match="statistics can only be a --reference"):
        evaluate(tmp_path / "s.npz", folders[1], config=config)


def test_statistics_are_bound_to_their_extractor(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    saving = replace(QUICK, save_statistics=True, measures=["fid"], num_images=12)
    usual = evaluate(*folders, tmp_path / "out", saving)
    path = tmp_path / "out" / "reference.npz"
    config = replace(QUICK, num_images=12)
    result = evaluate(folders[0], path, config=config)
    assert result["metrics"]["fd_random"] == pytest.approx(usual["metrics"]["fd_random"], rel=1e-9)
    assert result["n_reference"] == 12
    assert result["reference_fingerprint"] == usual["reference_fingerprint"]
    assert "this needs the images" in result["absent"]["kd_random"]
    with pytest.raises(UserError, match=r"another extractor: dtype float32, not bfloat16\. "):
        evaluate(folders[0], path, config=replace(config, dtype="bfloat16"))
    with pytest.raises(UserError, match="save_statistics needs an output folder"):
        evaluate(*folders, None, saving)


def test_a_source_as_target_is_measured_by_its_training_split(tmp_path: Path, caplog) -> None:
    """Held-out against training pictures, each school beside its floor, and the copies found."""
    data = DataConfig(source="art", resolution=8, num_images=200, holdout=0.4)
    config = replace(QUICK, num_images=70, floors=True, label_min=8, memorisation=True)
    with caplog.at_level(logging.INFO):
        result = evaluate("art", "art", tmp_path / "out", config, data=data)
    held, train = load_data(data, "heldout"), load_data(data, "train")
    names = held.label_names["style"]
    rows = draw(len(held), 70, 0)
    labels = result["per_label"]["labels"]
    assert result["per_label"]["field"] == "style"
    assert list(labels) == list(names)
    ids = held.labels[rows, list(held.label_names).index("style")]
    for name, row in labels.items():
        assert row["n_reference"] == int((ids == names.index(name)).sum())
        if "skipped" in row:
            assert min(row["n_generated"], row["n_reference"]) < 8
            assert f"style {name}: {row['skipped']}" in caplog.text
            continue
        # The target is the training split itself: floor and number are the same images.
        assert row["fd_random"] == row["floor"]["fd_random"]
        assert row["n"] == min(row["n_generated"], row["n_reference"])
    assert any("skipped" in row for row in labels.values())
    assert any("n" in row for row in labels.values())
    metrics = result["metrics"]
    assert metrics["fd_random"] == pytest.approx(metrics["fd_random_train"], rel=1e-9)
    assert result["memorisation"]["probability_closer"] > 0.95
    pairs = result["memorisation"]["closest_pairs"]
    assert len(pairs) == 16
    for pair in pairs:
        assert pair["distance"] == 0
        a, b = (train.pixels([pair[side]]) for side in ("sample", "training_image"))
        assert torch.equal(a, b)
    assert "Nearest training images" in (tmp_path / "out" / "report.html").read_text()


def test_the_floor_of_the_vae_is_measured(
    pipe: ComplexityDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderTiny

    real = write_folder(tmp_path / "real", pictures(9, 0, 8))
    config = replace(QUICK, num_images=9, floors=True)
    sample = SampleConfig(num_inference_steps=1)
    without = evaluate(pipe, real, config=config, sample=sample)
    assert without["absent"]["fd_random_vae"] == "there is no VAE"
    assert "no training split" in without["absent"]["fd_random_train"]
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), num_encoder_blocks=(1,),
        num_decoder_blocks=(1,), latent_channels=3,
    ).eval()  # fmt: skip
    result = evaluate(pipe, real, config=config, sample=sample)
    assert result["metrics"]["fd_random_vae"] > 0
    assert result["settings"]["vae"].startswith("vae: AutoencoderTiny")


def test_a_label_without_images_is_skipped_with_a_reason(folders: tuple[Path, Path]) -> None:
    from complexity_dit.evaluation.breakdown import distances_by_label

    x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    ids = np.array([0] * 20 + [2] * 10)
    table = distances_by_label(x, ids, x, np.roll(ids, 5), ["a", "b", "c"], QUICK)
    assert table["b"]["skipped"] == "no reference images, fewer than label_min = 50"
    table = distances_by_label(
        x, ids, x, ids, ["a", "b", "c"], replace(QUICK, label_min=10), ("fd_x", "kd_x")
    )
    assert table["c"]["n"] == 10
    assert abs(table["a"]["fd_x"]) < 1e-6
    assert {"kd_x_mean", "kd_x_std", "kd_x_stderr"} < set(table["a"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bootstrap": 1}, "bootstrap is 1"),
        ({"label_min": 1}, "label_min is 1"),
        ({"measures": ["fid", "ssim"]}, "ssim"),
        ({"measures": []}, "expected some of fid"),
        ({"memorisation": True, "memorisation_images": 1}, "memorisation_images is 1"),
        ({"memorisation": True}, "memorisation needs training images"),
    ],
)
def test_invalid_settings_are_rejected(
    folders: tuple[Path, Path], change: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        evaluate(*folders, config=replace(QUICK, **change))


def test_cached_features_depend_on_the_order_of_the_images(own_cache: Path) -> None:
    """The fingerprint of a source is that of its files and labels; the pixels are what counts."""
    images, rows = pictures(6, 0), np.arange(6)
    extractor = load_random_features()
    found = []
    for order, fingerprint in ((images, "x"), (images[::-1], "x"), (images, "other labels")):
        source = array_images(np.ascontiguousarray(order), fingerprint=fingerprint)
        found.append(set_features(replace(source, lasting=True), rows, extractor, cache=True))
    assert len(list(own_cache.glob("features-*.npz"))) == 2
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(found[0], found[1][::-1], rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_statistics_beside_pictures_are_the_reference(tmp_path: Path, caplog) -> None:
    """ADM's files of references hold the statistics of all images, and some of the images."""
    pictures_of, others = (
        np.random.default_rng(seed).integers(0, 256, (12, 16, 16, 3), np.uint8) for seed in (0, 1)
    )
    np.savez(tmp_path / "target.npz", arr_0=pictures_of)
    identity = load_random_features().identity
    statistics = {"mu": np.zeros(256), "sigma": np.eye(256), "n": 50_000, **identity}
    np.savez(tmp_path / "alone.npz", **statistics)
    np.savez(tmp_path / "both.npz", arr_0=others, **statistics)
    caplog.set_level("INFO")
    alone, both = (
        evaluate(tmp_path / "target.npz", tmp_path / name, config=QUICK)
        for name in ("alone.npz", "both.npz")
    )
    assert both["metrics"] == alone["metrics"]
    assert both["n_reference"] == 50_000
    assert "the statistics are used" in caplog.text


def test_a_label_field_that_no_side_has_is_refused_with_the_nearest_name(pipe) -> None:
    with pytest.raises(
        UserError, match=r"neither.* field 'stile': did you mean style\?.* style, genre"
    ):
        evaluate(pipe, "art", config=replace(QUICK, label_field="stile"))


def test_an_evaluation_is_without_guidance_unless_told_otherwise(pipe) -> None:
    settings = evaluate(pipe, "art", config=replace(QUICK, num_images=2))["settings"]
    assert settings["sample"]["guidance_scale"] == 1.0
    assert settings["network_evaluations"] == settings["sample"]["num_inference_steps"]
    words = ["evaluate", "x", "--reference=art"]
    scales = [
        PROGRAM.parse([*words, *more])[2]["sample"].guidance_scale
        for more in ([], ["--sample.num_inference_steps=3"], ["--sample.guidance_scale=3"])
    ]
    assert scales == [1.0, 1.0, 3.0]
    own = PROGRAM.parse(["sample", "x", "--out=x"])[1][0]
    assert own.guidance_scale is None, "sampling is with the guidance of the pipeline"
