"""Distances of features: closed forms, other implementations, reference values, bad input."""

import json
import logging

import numpy as np
import pytest
import scipy.linalg
import torch

from complexity_dit.evaluation.distances import (
    Statistics,
    distance_of_sets,
    feature_statistics,
    fid_from_features,
    fid_to_statistics,
    frechet_distance,
    inception_score,
    kid_from_features,
)
from inl_core.run.errors import UserError
from support.data import needs_data, shared_data


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    return (rng.standard_normal((n, d)) @ mix + shift).astype(np.float32)


def fid_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """Definition with scipy's matrix square root in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real))


def test_diagonal_gaussians_give_the_closed_form() -> None:
    s1, s2 = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.0])
    mu = np.array([1.0, -2.0, 0.5])
    expected = (mu**2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    got = frechet_distance(mu, np.diag(s1), np.zeros(3), np.diag(s2))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n1", "n2", "d"), [(200, 150, 24), (12, 40, 24), (9, 7, 24)])
def test_fid_equals_scipy_by_every_function(n1: int, n2: int, d: int) -> None:
    a, b = features(n1, d, 0), features(n2, d, 1, shift=0.3)
    s1, s2 = feature_statistics(a), feature_statistics(b)
    results = [
        fid_from_features(a, b),
        frechet_distance(s1.mu, s1.sigma, s2.mu, s2.sigma),
        fid_to_statistics(a, s2),
    ]
    assert results == pytest.approx([results[0]] * 3, rel=1e-9)
    # sqrtm loses digits for a rank-deficient product.
    full_rank = min(n1, n2) > d
    if full_rank:
        assert results[0] == pytest.approx(fid_by_sqrtm(a, b), rel=1e-9)
    else:
        assert results[0] == pytest.approx(fid_by_sqrtm(a, b), rel=1e-5)


def test_fid_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = features(300, 32, 0), features(300, 32, 1, shift=0.2)
    s1, s2 = (tuple(map(torch.as_tensor, feature_statistics(x)[:2])) for x in (a, b))
    assert fid_from_features(a, b) == pytest.approx(float(_compute_fid(*s1, *s2)), rel=1e-9)


def trace_of_root(s1: np.ndarray, s2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) by scipy, through the symmetric product S1^(1/2) S2 S1^(1/2)."""
    values, vectors = scipy.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return float(np.sqrt(scipy.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum())


@pytest.mark.parametrize(
    ("n1", "n2", "d", "rank"),
    [(40, 50, 600, 100), (900, 700, 600, 550), (560, 900, 640, 540), (600, 600, 560, 20)],
)
def test_rank_deficient_covariances_equal_scipy(n1: int, n2: int, d: int, rank: int) -> None:
    """Few samples, constant features, and both, for sizes around the switch to eigenvalues.

    scipy works in the space spanned by the features, where no matrix is singular; in the full
    space, eigenvalues that should be 0 leave it three digits.
    """
    rng = np.random.default_rng(5)
    spanned = np.linalg.qr(rng.standard_normal((d, rank)))[0].T
    scale = np.exp(-3 * np.arange(rank) / rank)
    coordinates = rng.standard_normal((n1, rank)) * scale, rng.standard_normal((n2, rank)) * scale
    a, b = coordinates[0] @ spanned, coordinates[1] @ spanned + 0.05
    s1, s2 = (np.cov(c, rowvar=False) for c in coordinates)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2)
    expected = apart - 2 * trace_of_root(s1, s2)
    assert fid_from_features(a, b) == pytest.approx(expected, rel=1e-6)
    assert fid_to_statistics(a, feature_statistics(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(6, 40), (300, 40), (600, 640), (900, 600)])
def test_equal_sets_have_distance_zero(n: int, d: int) -> None:
    a = features(n, d, 0) * 10
    assert abs(fid_from_features(a, a)) < 1e-6
    assert abs(fid_from_features(a, a[::-1])) < 1e-6
    s = feature_statistics(a)
    assert abs(frechet_distance(s.mu, s.sigma, s.mu, s.sigma)) < 1e-6


@pytest.mark.parametrize("d", [5, 60])
def test_a_row_with_a_count_equals_repeated_rows(d: int) -> None:
    a, b = features(30, d, 0), features(20, d, 1, 0.3)
    counts = np.random.default_rng(0).integers(1, 5, 30)
    copied = distance_of_sets(np.repeat(a, counts, 0), b)
    assert distance_of_sets(a, b, counts.astype(float)) == pytest.approx(copied, rel=1e-9)


def test_inception_score_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * np.random.default_rng(0).standard_normal((103, 17))
    expected = isc_features_to_metric(torch.from_numpy(logits))
    mean, std = inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-9)
    assert inception_score(np.zeros((20, 4)))[0] == pytest.approx(1)
    assert inception_score(np.tile(1e3 * np.eye(4), (25, 1)), 1)[0] == pytest.approx(4)
    with pytest.raises(UserError, match="as many images; got 9"):
        inception_score(logits[:9])


@needs_data
def test_reference_values_from_stored_features() -> None:
    folder = shared_data() / "fid_reference"
    values = list(json.loads((folder / "reference_values.json").read_text())["values"].values())
    with np.load(folder / "wikiart_pool3_features_00000-00511.npz") as file:
        x = file["features"]
    with np.load(folder / "sample_small_pool3_features.npz") as file:
        small = file["sample_1"], file["sample_2"]
    assert fid_from_features(x[:256], x[256:]) == pytest.approx(values[0], rel=1e-5)
    assert fid_from_features(x[:256, :64], x[256:, :64]) == pytest.approx(values[1], rel=1e-8)
    assert fid_from_features(*small) == pytest.approx(values[2], rel=1e-5)


def test_few_samples_are_rejected_or_give_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    a = features(5, 4, 0)
    for measure in (fid_from_features, kid_from_features):
        with pytest.raises(UserError, match="at least 2"):
            measure(a[:1], a)
    with caplog.at_level(logging.WARNING):
        fid_from_features(a, a)
    assert "n is 5: below 2048" in caplog.text
    assert "feature dimension" not in caplog.text
    with caplog.at_level(logging.WARNING):
        fid_from_features(features(5, 6, 0), features(7, 6, 1))
    assert "below the feature dimension 6" in caplog.text


def test_errors_name_what_is_wrong_with_the_features() -> None:
    a = features(6, 4, 0)
    broken = a.copy()
    broken[2, 1] = np.nan
    with pytest.raises(UserError, match=r"1 of 6 rows .* \(the first is row 2\)"):
        fid_from_features(broken, a)
    with pytest.raises(UserError, match="4 and 3 wide"):
        fid_from_features(a, a[:, :3])
    with pytest.raises(UserError, match="positive semi-definite"):
        frechet_distance(a[0], -np.eye(4), a[0], np.eye(4))
    with pytest.raises(UserError, match="made with another network"):
        fid_to_statistics(a, Statistics(np.zeros(3), np.eye(3), 9))
    with pytest.raises(UserError, match="shapes"):
        frechet_distance(a[0], np.eye(3), a[0], np.eye(4))
