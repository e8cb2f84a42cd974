"""Distances of features: closed forms, other implementations, reference values, bad input."""

import json
import logging

import numpy as np
import pytest
import scipy.linalg
import torch

from complexity_dit.evaluation.distances import (
    BLOCK_ROWS,
    KernelEstimate,
    Statistics,
    bootstrap,
    distance_of_sets,
    feature_statistics,
    fid_curve,
    fid_from_features,
    fid_to_statistics,
    frechet_distance,
    inception_score,
    kid_from_features,
    manifold_overlap,
    nearest,
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
    rel = 1e-9 if min(n1, n2) > d else 1e-5
    assert results[0] == pytest.approx(fid_by_sqrtm(a, b), rel=rel)


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


# Kernel distance


def test_kid_equals_torch_fidelity_for_the_same_seed() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features(90, 16, 0).astype(np.float64), features(70, 16, 1, 0.2).astype(np.float64)
    expected = kid_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        kid_subsets=7,
        kid_subset_size=30,
        rng_seed=5,
        verbose=False,
    )
    kid = kid_from_features(a, b, 7, 30, seed=5)
    assert kid.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert kid.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-10)
    assert (kid.subsets, kid.subset_size) == (7, 30)


def test_kid_of_full_sets_equals_torchmetrics_mmd(caplog: pytest.LogCaptureFixture) -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = features(50, 16, 0).astype(np.float64), features(50, 16, 1, 0.2).astype(np.float64)
    expected = float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))
    kid = kid_from_features(a, b, subsets=3, subset_size=1000)
    assert kid.mean == pytest.approx(expected, rel=1e-10)
    assert kid.subset_size == 50
    assert "kid_std is meaningless" in caplog.text


def test_many_rows_are_measured_by_subset_and_their_variance_by_a_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = features(400, 8, 0).astype(np.float64), features(300, 8, 1, 0.1).astype(np.float64)
    all_rows = kid_from_features(a, b, 20, 40)
    monkeypatch.setattr("complexity_dit.evaluation.distances.VARIANCE_ROWS", 299)
    part = kid_from_features(a, b, 20, 40)
    assert part[:2] == pytest.approx(all_rows[:2], rel=1e-9)
    assert part.stderr == pytest.approx(all_rows.stderr, rel=0.2)


def test_the_block_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(60, 8, 0).astype(np.float64), features(45, 8, 1, 0.1).astype(np.float64)
    full = kid_from_features(a, b, 20, 40)
    monkeypatch.setattr("complexity_dit.evaluation.distances.BLOCK_ROWS", 7)
    assert max(len(a), len(b)) < BLOCK_ROWS
    assert kid_from_features(a, b, 20, 40) == pytest.approx(full, rel=1e-9)


def test_float32_products_are_accurate_for_features_far_from_zero() -> None:
    """The kernel values differ by only 1e-4, and the distance still equals that in float64."""
    a, b = features(300, 64, 0) + 5, features(300, 64, 1, 0.02) + 5
    exact = kid_from_features(a.astype(np.float64), b.astype(np.float64), 20, 100)
    assert kid_from_features(a, b, 20, 100)[:3] == pytest.approx(exact[:3], rel=1e-4)


@pytest.mark.parametrize(("shift", "size"), [(0.0, 60), (0.0, 1000), (0.1, 60), (0.1, 1000)])
def test_two_standard_errors_of_kid_cover_the_distance(shift: float, size: int) -> None:
    """For subsets that overlap or are the full sets, of equal and of different distributions."""
    rng = np.random.default_rng(3)

    def distance(n: int) -> KernelEstimate:
        x, y = rng.standard_normal((2, n, 16)) + 0.3
        return kid_from_features(np.maximum(x, 0), np.maximum(y + shift, 0), 20, size)

    estimates = [distance(100) for _ in range(300)]
    # The distance is unbiased, so that of many images is the truth for 100.
    truth = distance(6000).mean if shift else 0.0
    inside = np.mean([abs(e.mean - truth) <= 1.96 * e.stderr for e in estimates])
    assert inside >= 0.90
    stderr = np.mean([e.stderr for e in estimates])
    assert 0.9 <= stderr / np.std([e.mean for e in estimates]) <= 1.5


def test_the_standard_error_of_kid_needs_four_images() -> None:
    a = features(4, 8, 0)
    assert set(kid_from_features(a, a[:3], 2).named("kid")) == {"kid_mean", "kid_std"}
    assert kid_from_features(a, features(4, 8, 1), 2).named("kid")["kid_stderr"] > 0


def test_errors_name_bad_sizes() -> None:
    a = features(6, 4, 0)
    with pytest.raises(UserError, match="subset_size is 1"):
        kid_from_features(a, a, subset_size=1)
    with pytest.raises(UserError, match="subsets is 0"):
        kid_from_features(a, a, subsets=0)


# Nearest neighbours


def gaussian(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, d)) + shift).astype(np.float32)


def by_definition(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """All four from full distance matrices, as defined in the papers."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    ball_x, ball_y = (np.sort(distances(a, a), 1)[:, k] for a in (x, y))
    between = distances(x, y)
    return (
        (between <= ball_y).any(1).mean(),
        (between <= ball_x[:, None]).any(0).mean(),
        (between <= ball_y).sum() / (k * len(x)),
        (between <= ball_y).any(0).mean(),
    )


def test_the_four_numbers_equal_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = gaussian(70, 6, 0, 0.7), gaussian(55, 6, 1)
    expected = by_definition(x, y, 4)
    assert 0 < min(expected[0], expected[1], expected[3]) < 1
    for block in (1024, 16, 1):
        monkeypatch.setattr("complexity_dit.evaluation.distances.BLOCK_ROWS", block)
        assert manifold_overlap(x, y, 4, 4) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = gaussian(200, 12, 0, 0.5) + 4, gaussian(150, 12, 1) + 4
    expected = prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), verbose=False)
    overlap = manifold_overlap(x, y)
    assert overlap.precision == pytest.approx(expected["precision"], rel=1e-6)
    assert overlap.recall == pytest.approx(expected["recall"], rel=1e-6)


def test_equal_sets_overlap_fully_and_distant_sets_do_not() -> None:
    x = gaussian(40, 5, 0)
    same = manifold_overlap(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert manifold_overlap(x, x + 100) == (0, 0, 0, 0)


def test_nearest_finds_the_nearest_rows_and_their_distances() -> None:
    x, y = gaussian(30, 5, 0), gaussian(50, 5, 1)
    x[3] = y[17]
    distances, rows = nearest(x, y)
    all_of = np.linalg.norm(x[:, None].astype(np.float64) - y[None], axis=2)
    np.testing.assert_array_equal(rows, all_of.argmin(1))
    np.testing.assert_allclose(distances, all_of.min(1), rtol=1e-6)
    # A copy is at distance exactly 0, without rounding of a difference of large squares.
    assert (rows[3], distances[3]) == (17, 0)


def test_sets_too_small_for_k_neighbours_are_rejected() -> None:
    x = gaussian(5, 3, 0)
    with pytest.raises(UserError, match="more than 5 images per side"):
        manifold_overlap(x, gaussian(9, 3, 1))
    with pytest.raises(UserError, match="no neighbours 0"):
        manifold_overlap(x, x, 0, 3)
    with pytest.raises(UserError, match="not finite"):
        nearest(x * np.nan, x)


# Bias of the Frechet distance over n, on Gaussians with a known distance

D = 8
_RNG = np.random.default_rng(1)
MIX = _RNG.standard_normal((D, D)) / np.sqrt(D)
SIGMA = MIX @ MIX.T + 0.1 * np.eye(D)
MU = 0.1 * _RNG.standard_normal(D)
TRUTH = frechet_distance(np.zeros(D), np.eye(D), MU, SIGMA)


def samples(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n draws of N(0, 1) and of N(MU, SIGMA)."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n, D))
    return x, y @ np.linalg.cholesky(SIGMA).T + MU


def test_the_distance_converges_to_the_analytic_value_with_n() -> None:
    errors = [
        abs(np.mean([distance_of_sets(*samples(n, seed)) for seed in range(30)]) - TRUTH)
        for n in (32, 256, 8192)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.01 * TRUTH


def test_the_extrapolation_removes_the_bias_within_its_interval() -> None:
    n, seeds = 128, range(30)
    raw, infinite, inside = [], [], 0
    for seed in seeds:
        x, y = samples(n, seed)
        stderr = bootstrap(x, y, 20, seed)
        curve = fid_curve(x, y, stderr, seed=seed)
        assert curve.values[0] == pytest.approx(distance_of_sets(x, y), rel=1e-9)
        raw.append(curve.values[0])
        infinite.append(curve.infinity)
        inside += curve.low <= TRUTH <= curve.high
    bias = np.mean(raw) - TRUTH
    assert bias > 4 * np.std(raw) / np.sqrt(len(seeds))
    assert abs(np.mean(infinite) - TRUTH) < bias / 4
    # 95 % of 30 are 28.5; an interval with that coverage gives fewer than 26 in 1 of 60 tests.
    assert inside >= 26


def test_the_bootstrap_estimates_the_deviation_over_new_samples() -> None:
    fresh = np.std([distance_of_sets(*samples(256, seed)) for seed in range(60)])
    estimate = np.mean([bootstrap(*samples(256, seed), 20, seed) for seed in range(10)])
    assert estimate == pytest.approx(fresh, rel=0.35)
    x, y = samples(64, 0)
    assert bootstrap(x, y, 5, seed=3) == bootstrap(x, y, 5, seed=3)
    assert bootstrap(x, y, 5, seed=3) != bootstrap(x, y, 5, seed=4)


def test_the_interval_is_wide_where_the_curve_is_not_straight() -> None:
    """With fewer images than dimensions, the distance is not linear in 1 / n."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 80, 200)) * np.exp(-np.arange(200) / 30)
    curve = fid_curve(x, y, 0.0)
    assert curve.high - curve.low > 2 * abs(curve.curvature) > 0
    assert curve.low <= 0 <= curve.high


def test_sizes_are_halved_and_too_few_images_are_rejected() -> None:
    x, y = samples(70, 0)
    assert fid_curve(x, y[:64], 0.0).sizes == [64, 32, 16, 8]
    with pytest.raises(UserError, match="3 sizes of at least 8 images; 20 images give 2"):
        fid_curve(x[:20], y, 0.0)
    with pytest.raises(UserError, match="at least 2 rounds"):
        bootstrap(x, y, 1)
