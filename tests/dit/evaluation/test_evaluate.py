"""Evaluations from images to result.json, with the random network."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import complexity_dit.evaluation.samples
from complexity_dit.config import DataConfig, EvalConfig, SampleConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.evaluation import evaluate as module
from complexity_dit.evaluation import features as features_module
from complexity_dit.evaluation.distances import (
    feature_statistics,
    fid_from_features,
    kid_from_features,
)
from complexity_dit.evaluation.evaluate import evaluate, measure
from complexity_dit.evaluation.features import FEATURE_CHUNK, draw, extract_features
from complexity_dit.evaluation.image_sets import dataset_images, folder_images
from complexity_dit.evaluation.networks import (
    FeatureExtractor,
    load_extractor,
    load_random_features,
)
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from inl_core.run.errors import UserError
from support.data import needs_data, needs_weights, shared_data
from support.pictures import pictures, write_folder

QUICK = EvalConfig(num_images=24, weights="random", device="cpu", quiet=True, bootstrap=2)
RESULT_KEYS = {
    "metrics", "absent", "fid_over_n", "per_label", "memorisation", "prompts", "n_generated",
    "n_reference", "settings", "versions", "weights_sha256", "reference_fingerprint",
    "target_fingerprint",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_cache")


def as_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the random network under Inception's name, to test the names of the metrics."""

    def load(*args: object, **kwargs: object) -> FeatureExtractor:
        return replace(load_random_features(), name="inception-v3-2015-12-05")

    monkeypatch.setattr(module, "load_extractor", load)


def test_features_are_independent_of_the_batches() -> None:
    extractor = load_random_features()
    images = pictures(FEATURE_CHUNK + 9, 0)
    full = extract_features([images], extractor)
    ones = extract_features((images[i : i + 1] for i in range(len(images))), extractor, len(images))
    sevens = extract_features(np.array_split(images, 7), extractor)
    assert full.shape == (len(images), extractor.feature_dim)
    assert full.dtype == np.float32
    np.testing.assert_array_equal(full, ones)
    np.testing.assert_array_equal(full, sevens)
    # The features of a prefix equal those in the full set.
    np.testing.assert_array_equal(extract_features([images[:3]], extractor), full[:3])


def test_errors_name_bad_batches() -> None:
    extractor = load_random_features()
    with pytest.raises(UserError, match="float64"):
        extract_features([np.zeros((1, 8, 8, 3))], extractor)
    with pytest.raises(UserError, match="make them one size"):
        extract_features([pictures(1, 0, 8), pictures(1, 0, 9)], extractor)
    with pytest.raises(UserError, match="no images"):
        extract_features([], extractor)


def test_two_folders_give_a_result_and_a_report(
    folders: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    config = replace(QUICK, quiet=False, floors=True, seed=4)
    result = evaluate(folders[0], folders[1], out, config)
    assert json.loads((out / "result.json").read_text()) == result
    assert sorted(p.name for p in out.glob("[!.]*")) == ["report.html", "result.json"]
    assert set(result) == RESULT_KEYS
    assert (result["n_generated"], result["n_reference"]) == (12, 12)
    extractor = load_random_features()
    fake, real = folder_images(folders[0]), folder_images(folders[1])
    a = extract_features([fake.read(range(12))], extractor)
    b = extract_features([real.read(draw(15, 12, seed=4).tolist())], extractor)
    metrics = result["metrics"]
    assert metrics["fd_random"] == pytest.approx(fid_from_features(a, b), rel=1e-9)
    kid = kid_from_features(a, b, 100, 1000, 4)
    assert metrics["kd_random_mean"] == pytest.approx(kid.mean, rel=1e-9)
    assert result["settings"]["kid"] == {"subsets": 100, "subset_size": 12}
    assert metrics["fd_random_shrunk"] > 0
    assert not any(name.startswith(("fid", "kid")) for name in metrics)
    table = capsys.readouterr().out
    assert "NOT FID" in table
    assert f"{metrics['fd_random']:.6g}" in table


def test_only_inception_gives_metrics_named_fid_and_kid(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    as_inception(monkeypatch)
    result = evaluate(*folders, config=replace(QUICK, quiet=False))
    names = {"fid", "kid_mean", "kid_std", "kid_stderr"}
    assert set(result["metrics"]) == names | {"precision", "recall", "density", "coverage"}
    assert set(result["absent"]) == {"fid_stderr", "fid_infinity", "inception_score"}
    assert "no classifier" in result["absent"]["inception_score"]
    assert "NOT FID" not in capsys.readouterr().out


def test_the_error_and_limit_of_fid_are_shown_only_with_enough_images_per_feature() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 64, 16)).astype(np.float32)
    extractor = load_extractor("random")
    config = EvalConfig(measures=["fid"], bootstrap=2)
    enough = measure(x, y, extractor, config)
    assert {"fd_random_stderr", "fd_random_infinity"} < set(enough.metrics)
    few = measure(x[:63], y, extractor, config)
    assert set(few.metrics) == {"fd_random"}
    assert not few.curve
    for name in ("fd_random_stderr", "fd_random_infinity"):
        assert few.absent[name] == (
            "63 images are too few for 16 features; it is right from 64 images"
        )
    no_rounds = measure(x, y, extractor, replace(config, bootstrap=0, curve=False))
    assert no_rounds.absent == {"fd_random_stderr": "bootstrap is 0"}


def test_the_same_folder_has_distance_zero(folders: tuple[Path, Path]) -> None:
    assert abs(evaluate(folders[0], folders[0], config=QUICK)["metrics"]["fd_random"]) < 1e-6


def test_statistics_can_be_the_reference(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folder_images(folders[1])
    b = extract_features([real.read(range(15))], load_random_features())
    path = tmp_path / "stats.npz"
    np.savez(path, **feature_statistics(b)._asdict())
    with pytest.raises(UserError, match="cannot be compared with features of random-conv"):
        evaluate(folders[0], path, config=QUICK)
    as_inception(monkeypatch)
    result = evaluate(folders[0], path, config=QUICK)
    a = extract_features([folder_images(folders[0]).read(range(12))], load_random_features())
    assert result["metrics"] == {"fid": pytest.approx(fid_from_features(a, b), rel=1e-9)}
    assert result["n_reference"] == 15
    with pytest.raises(UserError, match="floors need images"):
        evaluate(folders[0], path, config=replace(QUICK, floors=True))
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match="lacks sigma"):
        evaluate(folders[0], path, config=QUICK)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        evaluate(folders[0], path, config=QUICK)


@needs_data
@needs_weights
def test_fid_in_bf16_is_near_that_in_fp32(tmp_path: Path) -> None:
    """What an evaluation inside a training may differ by: measured 0.5 % on these paintings."""
    paths = sorted((shared_data() / "wikiart").glob("**/*.jpg"))[:48]
    images = np.stack([np.asarray(Image.open(p).convert("RGB").resize((64, 64))) for p in paths])
    real, other = (
        write_folder(tmp_path / "a", images[:24]),
        write_folder(tmp_path / "b", images[24:]),
    )
    config = EvalConfig.brief(num_images=24, measures=["fid"], quiet=True, device="cpu")
    fids = [
        evaluate(other, real, config=replace(config, dtype=dtype))["metrics"]["fid"]
        for dtype in ("float32", "bfloat16")
    ]
    assert fids[0] != fids[1]
    assert fids[1] == pytest.approx(fids[0], rel=0.02)


def test_real_features_are_cached_by_content(
    folders: tuple[Path, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    calls: list[str] = []
    original = features_module.extract_features

    def counting(batches, extractor, total=None, desc="features"):
        calls.append(desc)
        return original(batches, extractor, total, desc)

    monkeypatch.setattr(features_module, "extract_features", counting)
    first = evaluate(*folders, config=QUICK)["metrics"]
    assert calls == ["features of fake", "features of real"]
    assert evaluate(*folders, config=QUICK)["metrics"] == first
    assert calls[2:] == ["features of fake"]
    evaluate(*folders, config=replace(QUICK, num_images=11))
    evaluate(*folders, config=replace(QUICK, dtype="bfloat16"))
    evaluate(*folders, config=replace(QUICK, cache=False))
    assert calls.count("features of real") == 4
    # A changed image makes another data set.
    Image.fromarray(pictures(1, 8)[0]).save(folders[1] / "0000.png")
    assert evaluate(*folders, config=QUICK)["metrics"] != first
    assert calls.count("features of real") == 5

    kept = sorted(own_cache.glob("features-*.npz"))
    assert len(kept) == 4
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    evaluate(*folders, config=QUICK)
    assert calls.count("features of real") == 6
    assert "computed again" in caplog.text


def test_a_result_is_replaced_only_with_overwrite(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = evaluate(*folders, out, QUICK)
    (out / ".complexity-dit-evaluation").unlink()  # as in version 0.1.0
    with pytest.raises(UserError, match="exists"):
        evaluate(*folders, out, replace(QUICK, seed=1))
    assert json.loads((out / "result.json").read_text()) == first
    evaluate(*folders, out, replace(QUICK, seed=1, overwrite=True))
    assert json.loads((out / "result.json").read_text()) != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "result.json").write_text("mine")
    with pytest.raises(UserError, match="is not one that this command has written"):
        evaluate(*folders, tmp_path / "mine", replace(QUICK, overwrite=True))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["result.json"]


def test_errors_name_bad_folders_and_files(
    folders: tuple[Path, Path], tmp_path: Path, caplog
) -> None:
    fake, real = folders
    with pytest.raises(UserError, match="num_images is 1"):
        evaluate(fake, real, config=replace(QUICK, num_images=1))
    with pytest.raises(UserError, match="is not a folder"):
        evaluate(fake, tmp_path / "none", config=QUICK)
    with pytest.raises(UserError, match="holds 0 images"):
        evaluate(tmp_path, (tmp_path / "empty").mkdir() or tmp_path / "empty", config=QUICK)
    with pytest.raises(UserError, match="device is 'toaster'"):
        evaluate(fake, real, config=replace(QUICK, device="toaster"))
    evaluate(fake, write_folder(tmp_path / "large", pictures(9, 0, 24)), config=QUICK)
    assert "the images are 20x20 and the reference 24x24" in caplog.text
    Image.fromarray(pictures(1, 0, 9)[0]).save(fake / "zz.png")
    with pytest.raises(UserError, match=r"zz\.png is 9x9 and 0000\.png is 20x20"):
        evaluate(fake, real, config=QUICK)
    (fake / "zz.png").unlink()
    Image.new("F", (20, 20)).save(fake / "zz.tif")
    with pytest.raises(UserError, match=r"zz\.tif has floating-point pixels"):
        evaluate(fake, real, config=QUICK)
    full = io.BytesIO()
    Image.fromarray(pictures(1, 0)[0]).save(full, "png")
    (fake / "zz.tif").unlink()
    (fake / "zz.png").write_bytes(full.getvalue()[:-40])
    with pytest.raises(UserError, match=r"zz\.png cannot be decoded"):
        evaluate(fake, real, config=QUICK)


@pytest.fixture
def art_pipe(pipe: ComplexityDiTPipeline) -> tuple[ComplexityDiTPipeline, DataConfig]:
    """The shared pipeline with some styles and genres of the art set."""
    data = DataConfig(source="art", resolution=8, num_images=120, holdout=0.3)
    names = load_data(data, "train").label_names
    pipe.register_to_config(
        id2label={
            "style": dict(enumerate([names["style"][4], "Cubism", names["style"][1]])),
            "genre": dict(enumerate(names["genre"][:2])),
        }
    )
    return pipe, data


def test_samples_are_requested_with_the_held_out_labels(
    art_pipe: tuple[ComplexityDiTPipeline, DataConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog,
) -> None:
    pipe, data = art_pipe
    held = load_data(data, "heldout")
    n = 16
    rows = draw(len(held), n, seed=2)
    asked: list[torch.Tensor] = []
    original = complexity_dit.evaluation.samples.iter_samples

    def spy(pipe, labels, config, indices=None, progress=True, prompts=None):
        asked.append(labels)
        # Reversed on purpose: images are assigned by index, not by order of arrival.
        batches = list(original(pipe, labels, config, indices, progress))
        yield from reversed(batches)

    monkeypatch.setattr(complexity_dit.evaluation.samples, "iter_samples", spy)
    config = replace(QUICK, num_images=n, seed=2, floors=True)
    sample = SampleConfig(num_inference_steps=2, batch_size=5, chunk_size=5)
    result = evaluate(pipe, "art", config=config, sample=sample, data=data)

    styles = list(held.label_names["style"])
    fields = list(held.label_names)
    expected = [
        {styles[4]: 0, styles[1]: 2}.get(styles[i], -1)
        for i in held.labels[rows, fields.index("style")].tolist()
    ]
    assert asked[0][:, 0].tolist() == expected
    assert "style labels are unknown to the pipeline" in caplog.text
    metrics = result["metrics"]
    assert {"label_accuracy", "label_accuracy_real"} < set(metrics)
    assert 0 <= metrics["label_accuracy"] <= 1
    assert {"fd_random_train", "kd_random_train", "fd_random_shrunk"} < set(metrics)
    assert result["reference_fingerprint"] == held.fingerprint
    assert result["settings"]["sample"]["num_inference_steps"] == 2
    assert result["settings"]["data"]["holdout"] == 0.3
    assert result["settings"]["n_train"] == 16
    json.dumps(result)

    # Other batches give the same numbers.
    again = evaluate(pipe, "art", config=config, sample=replace(sample, batch_size=10), data=data)
    assert again["metrics"] == metrics


def test_perfect_samples_have_the_accuracy_of_real_images(
    art_pipe: tuple[ComplexityDiTPipeline, DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that returns the images whose labels are requested."""
    pipe, data = art_pipe
    held = load_data(data, "heldout")
    real = dataset_images(held, "real")
    names = {f: dict(enumerate(names)) for f, names in held.label_names.items()}
    pipe.register_to_config(id2label=names)
    n = len(held)
    order = draw(n, n, seed=0)

    def perfect(pipe, labels, config, indices=None, progress=True, prompts=None):
        yield list(range(n)), real.read(order.tolist())

    monkeypatch.setattr(complexity_dit.evaluation.samples, "iter_samples", perfect)
    config = replace(QUICK, num_images=n)
    metrics = evaluate(pipe, "art", config=config, data=data)["metrics"]
    assert metrics["label_accuracy"] == metrics["label_accuracy_real"]
    assert metrics["label_accuracy_real"] > 1.5 / len(held.label_names["style"])
    assert abs(metrics["fd_random"]) < 1e-6
    without = evaluate(pipe, "art", config=replace(config, label_field=None), data=data)
    assert "label_accuracy" not in without["metrics"]


def test_samples_for_an_unlabelled_reference_are_unconditional(
    pipe: ComplexityDiTPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.save_pretrained(tmp_path / "pipeline")
    real = write_folder(tmp_path / "real", pictures(9, 0, 8))
    config = replace(QUICK, num_images=6)
    sample = SampleConfig(num_inference_steps=2, chunk_size=6)
    with caplog.at_level(logging.WARNING):
        result = evaluate(tmp_path / "pipeline", real, config=config, sample=sample)
    assert "unconditional" in caplog.text
    assert (result["n_generated"], result["n_reference"]) == (6, 6)
    assert "label_accuracy" not in result["metrics"]
    with pytest.raises(UserError):
        evaluate(tmp_path / "nowhere", real, config=config)
