"""Evaluations against torch-fidelity, torchmetrics and pytorch-fid on the same images.

The network is Inception where the published value of the other program needs it, and the random
network where only the metrics are compared.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from complexity_dit.config import EvalConfig
from complexity_dit.evaluation.distances import fid_from_features, kid_from_features
from complexity_dit.evaluation.evaluate import evaluate_images
from complexity_dit.evaluation.image_sets import array_images, folder_images
from complexity_dit.evaluation.networks import load_extractor, load_random_features
from support.data import needs_data, needs_weights, shared_data

pytestmark = pytest.mark.usefixtures("weights_cache")


class AdaptedFeatures(FeatureExtractorBase):
    """A `FeatureExtractor` behind the interface of torch-fidelity."""

    name = "complexity-dit"
    network: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pooled"

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor]:
        # torch-fidelity keeps the dtype, and in float32 a small KID would have only four digits.
        return (type(self).network(input).double(),)


def measured_by_torch_fidelity(
    first: Path, second: Path, network: Callable, subset_size: int, seed: int
) -> dict[str, float]:
    AdaptedFeatures.network = staticmethod(network)
    torch_fidelity.register_feature_extractor(AdaptedFeatures.name, AdaptedFeatures)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations in torch-fidelity
            return torch_fidelity.calculate_metrics(
                input1=str(first), input2=str(second), feature_extractor=AdaptedFeatures.name,
                fid=True, kid=True, prc=True, kid_subsets=20, kid_subset_size=subset_size,
                rng_seed=seed, cuda=False, cache=False, batch_size=16, verbose=False,
                samples_find_deep=True,
            )  # fmt: skip
    finally:
        torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY.pop(AdaptedFeatures.name)


def compared(first: Path, second: Path, extractor, subset_size: int) -> None:
    expected = measured_by_torch_fidelity(first, second, extractor, subset_size, seed=3)
    config = EvalConfig(
        seed=3, kid_subsets=20, kid_subset_size=subset_size, measures=["fid", "kid", "prdc"],
        bootstrap=0,
    )  # fmt: skip
    metrics = evaluate_images(
        folder_images(first), folder_images(second), config, extractor
    ).metrics
    fd, kd = extractor.prefixes
    pairs = {
        fd: "frechet_inception_distance",
        f"{kd}_mean": "kernel_inception_distance_mean",
        f"{kd}_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    for name, other in pairs.items():
        assert metrics[name] == pytest.approx(expected[other], rel=1e-4), name


def test_png_folders_equal_torch_fidelity(tmp_path: Path) -> None:
    """FID, KID with the same subsets, precision and recall, of the same features."""
    rng = np.random.default_rng(0)
    sides = []
    for name, n, shift in (("a", 60, 25), ("b", 70, 0)):
        (tmp_path / name).mkdir()
        colours = rng.integers(40, 160, (n, 1, 1, 3)) + shift
        for i, colour in enumerate(colours):
            image = (colour + rng.integers(0, 60, (24, 20, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
        sides.append(tmp_path / name)
    compared(sides[0], sides[1], load_random_features(), subset_size=30)


@pytest.mark.slow
@needs_data
@needs_weights
def test_paintings_equal_torch_fidelity_with_inception(tmp_path: Path) -> None:
    """48 + 48 paintings as PNG, Inception with resize tf1."""
    source = shared_data() / "wikiart" / "images"
    sides = []
    for name, start in (("a", 0), ("b", 300)):
        (tmp_path / name).mkdir()
        for i in range(start, start + 48):
            with Image.open(source / f"{i:05d}.jpg") as image:
                image.convert("RGB").save(tmp_path / name / f"{i:05d}.png")
        sides.append(tmp_path / name)
    compared(sides[0], sides[1], load_extractor(resize="tf1"), subset_size=24)


def docstring_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the examples in torchmetrics' documentation.

    Its metric first initialises its network, which draws from the same generator.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(42)
    with pytest.MonkeyPatch.context() as patch:

        class Initialised(Exception):
            """The network is initialised, and its weights are about to be loaded."""

        def stop(*args: object, **kwargs: object) -> None:
            raise Initialised

        patch.setattr(
            torch_fidelity.feature_extractor_inceptionv3, "load_state_dict_from_url", stop
        )
        with pytest.raises(Initialised):
            FeatureExtractorInceptionV3("inception-v3-compat", ["64"])
    first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    return first, torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)


@pytest.mark.slow
@needs_weights
def test_values_in_the_documentation_of_torchmetrics() -> None:
    """FID of the 64 channels after the first pooling, KID of pool3; resize antialias."""
    import torch.nn.functional as F

    images = docstring_images()
    draws = [
        (torch.randperm(100)[:50].numpy(), torch.randperm(100)[:50].numpy()) for _ in range(100)
    ]
    extractor = load_extractor(resize="antialias")
    network = extractor.network

    @torch.inference_mode()
    def first_pooling(x: torch.Tensor) -> np.ndarray:
        parts = []
        for part in x.split(20):
            y = network.preprocess(part)
            for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
                y = getattr(network, name)(y)
            parts.append(F.max_pool2d(y, 3, 2).mean((2, 3)))
        return torch.cat(parts).numpy()

    assert round(fid_from_features(*map(first_pooling, images)), 4) == 12.6388
    both = [torch.cat([extractor(part) for part in x.split(20)]).numpy() for x in images]
    subsets = [(both[0][i], both[1][j]) for i, j in draws]
    values = [kid_from_features(x, y, subsets=1, subset_size=len(x)).mean for x, y in subsets]
    assert (round(np.mean(values), 4), round(np.std(values), 4)) == (0.0312, 0.0025)


@pytest.mark.slow
@needs_data
@needs_weights
def test_reference_values_of_pytorch_fid_from_images() -> None:
    """The stored features are those of pytorch-fid; these are computed with its resize."""
    data = shared_data()
    folder = data / "fid_reference"
    values = list(json.loads((folder / "reference_values.json").read_text())["values"].values())
    extractor = load_extractor(resize="pytorch-fid")
    sides = []
    for start in (0, 256):
        paths = [data / "wikiart" / "images" / f"{i:05d}.jpg" for i in range(start, start + 256)]
        pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        sides.append(array_images(pictures))
    from complexity_dit.evaluation.features import set_features

    a, b = (set_features(side, np.arange(256), extractor, cache=False) for side in sides)
    assert fid_from_features(a[:, :64], b[:, :64]) == pytest.approx(values[1], rel=1e-4)
    assert fid_from_features(a, b) == pytest.approx(values[0], rel=1e-3)
