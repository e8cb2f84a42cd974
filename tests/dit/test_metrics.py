"""Distances from features: closed forms, outside judges, reference values, bad input."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from complexity_dit.errors import UserError
from complexity_dit.metrics import (
    _mmd2_direct,
    _mmd2_masked,
    class_means,
    feature_statistics,
    fid_from_features,
    fid_to_statistics,
    frechet_distance,
    kid_from_features,
    nearest_class_mean_accuracy,
)

needs_data = pytest.mark.skipif(
    "COMPLEXITY_DATA" not in os.environ, reason="COMPLEXITY_DATA names no data folder"
)


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    return (rng.standard_normal((n, d)) @ mix + shift).astype(np.float32)


def fid_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula, with scipy's matrix square root in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real))


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    s1, s2 = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.0])
    mu = np.array([1.0, -2.0, 0.5])
    expected = (mu**2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    got = frechet_distance(mu, np.diag(s1), np.zeros(3), np.diag(s2))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n1", "n2", "d"), [(200, 150, 24), (12, 40, 24), (9, 7, 24)])
def test_fid_equals_scipy_and_both_routes_agree(n1: int, n2: int, d: int) -> None:
    a, b = features(n1, d, 0), features(n2, d, 1, shift=0.3)
    s1, s2 = feature_statistics(a), feature_statistics(b)
    routes = [
        fid_from_features(a, b),
        frechet_distance(s1.mu, s1.sigma, s2.mu, s2.sigma),
        fid_to_statistics(a, s2),
    ]
    assert routes == pytest.approx([routes[0]] * 3, rel=1e-9)
    # A rank-deficient product costs sqrtm digits, not us.
    full_rank = min(n1, n2) > d
    if full_rank:
        assert routes[0] == pytest.approx(fid_by_sqrtm(a, b), rel=1e-9)
    else:
        assert routes[0] == pytest.approx(fid_by_sqrtm(a, b), rel=1e-5)


def test_fid_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = features(300, 32, 0), features(300, 32, 1, shift=0.2)
    s1, s2 = (tuple(map(torch.as_tensor, feature_statistics(x)[:2])) for x in (a, b))
    assert fid_from_features(a, b) == pytest.approx(float(_compute_fid(*s1, *s2)), rel=1e-9)


def test_identical_sets_are_at_distance_zero() -> None:
    for n, d in ((6, 40), (300, 40)):
        a = features(n, d, 0)
        assert abs(fid_from_features(a, a)) < 1e-9
        s = feature_statistics(a)
        assert abs(frechet_distance(s.mu, s.sigma, s.mu, s.sigma)) < 1e-9


@needs_data
def test_reference_values_from_stored_features() -> None:
    folder = Path(os.environ["COMPLEXITY_DATA"]) / "fid_reference"
    values = list(json.loads((folder / "reference_values.json").read_text())["values"].values())
    with np.load(folder / "wikiart_pool3_features_00000-00511.npz") as file:
        x = file["features"]
    with np.load(folder / "sample_small_pool3_features.npz") as file:
        small = file["sample_1"], file["sample_2"]
    assert fid_from_features(x[:256], x[256:]) == pytest.approx(values[0], rel=1e-5)
    assert fid_from_features(x[:256, :64], x[256:, :64]) == pytest.approx(values[1], rel=1e-8)
    assert fid_from_features(*small) == pytest.approx(values[2], rel=1e-5)


def test_kid_is_torch_fidelitys_for_the_same_seed() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features(90, 16, 0).astype(np.float64), features(70, 16, 1, 0.2).astype(np.float64)
    judge = kid_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        kid_subsets=7,
        kid_subset_size=30,
        rng_seed=5,
        verbose=False,
    )
    ours = kid_from_features(a, b, 7, 30, seed=5)
    assert ours.mean == pytest.approx(judge["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.std == pytest.approx(judge["kernel_inception_distance_std"], rel=1e-10)
    assert ours.stderr == pytest.approx(ours.std / 7**0.5, rel=1e-12)
    assert (ours.subsets, ours.subset_size) == (7, 30)


def test_kid_of_whole_sets_is_torchmetrics_mmd(caplog: pytest.LogCaptureFixture) -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = features(50, 16, 0), features(50, 16, 1, shift=0.2)
    judge = float(poly_mmd(torch.from_numpy(a).double(), torch.from_numpy(b).double()))
    ours = kid_from_features(a, b, subsets=3, subset_size=1000)
    assert ours.mean == pytest.approx(judge, rel=1e-10)
    assert ours.subset_size == 50
    assert "kid_std says nothing" in caplog.text


def test_kid_routes_agree() -> None:
    a, b = features(40, 8, 0).astype(np.float64), features(30, 8, 1, 0.1).astype(np.float64)
    rng = np.random.default_rng(0)
    draws = [(rng.choice(40, 12, False), rng.choice(30, 12, False)) for _ in range(5)]
    np.testing.assert_allclose(_mmd2_masked(a, b, draws), _mmd2_direct(a, b, draws), rtol=1e-9)


def test_few_samples_are_refused_or_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    a = features(5, 4, 0)
    for measure in (fid_from_features, kid_from_features):
        with pytest.raises(UserError, match="at least 2"):
            measure(a[:1], a)
    with caplog.at_level(logging.WARNING):
        fid_from_features(a, a)
    assert "n is 5: below 2048" in caplog.text


def test_bad_features_name_the_fault() -> None:
    a = features(6, 4, 0)
    broken = a.copy()
    broken[2, 1] = np.nan
    with pytest.raises(UserError, match="1 of 6 rows"):
        fid_from_features(broken, a)
    with pytest.raises(UserError, match="4 and 3 wide"):
        fid_from_features(a, a[:, :3])
    with pytest.raises(UserError, match="positive semi-definite"):
        frechet_distance(a[0], -np.eye(4), a[0], np.eye(4))
    with pytest.raises(UserError, match="shapes"):
        frechet_distance(a[0], np.eye(3), a[0], np.eye(4))
    with pytest.raises(UserError, match="subset_size is 1"):
        kid_from_features(a, a, subset_size=1)


def test_class_means_and_nearest_mean_leave_missing_labels_out() -> None:
    x = np.array([[0.0, 0], [2, 0], [10, 0], [10, 4], [99, 99]])
    labels = np.array([0, 0, 3, 3, -1])
    means = class_means(x, labels)
    assert sorted(means) == [0, 3]
    np.testing.assert_array_equal(means[3], [10, 2])
    probe = np.array([[1.0, 1], [9, 1], [9, 0], [50, 50], [0, 0]])
    asked = np.array([0, 3, 0, -1, 7])
    # hit, hit, miss, left out, a class without a mean: miss
    assert nearest_class_mean_accuracy(probe, asked, means) == 0.5
    with pytest.raises(UserError, match="no image has a label"):
        class_means(x, np.full(5, -1))
    with pytest.raises(UserError, match=r"labels \(2,\)"):
        class_means(x, np.array([0, 1]))
