"""Bias of the Frechet distance over n, on Gaussians with a known distance."""

import numpy as np
import pytest

from complexity_dit.evaluation.distances import (
    bootstrap,
    distance_of_sets,
    fid_curve,
    frechet_distance,
)
from inl_core.run.errors import UserError

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
        stderr = bootstrap(x, y, 20, seed).stderr
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
    estimate = np.mean([bootstrap(*samples(256, seed), 20, seed).stderr for seed in range(10)])
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
