"""Kernel distances against torch-fidelity and torchmetrics, and both algorithms."""

import numpy as np
import pytest
import torch

from complexity_dit.evaluation.distances import (
    BLOCK_ROWS,
    _mmd2_direct,
    _mmd2_masked,
    common_centre,
    kid_from_features,
)
from inl_core.run.errors import UserError


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    return (rng.standard_normal((n, d)) @ mix + shift).astype(np.float32)


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
    assert kid.stderr == pytest.approx(kid.std / 7**0.5, rel=1e-12)
    assert (kid.subsets, kid.subset_size) == (7, 30)


def test_kid_of_full_sets_equals_torchmetrics_mmd(caplog: pytest.LogCaptureFixture) -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = features(50, 16, 0).astype(np.float64), features(50, 16, 1, 0.2).astype(np.float64)
    expected = float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))
    kid = kid_from_features(a, b, subsets=3, subset_size=1000)
    assert kid.mean == pytest.approx(expected, rel=1e-10)
    assert kid.subset_size == 50
    assert "kid_std is meaningless" in caplog.text


def test_both_algorithms_agree() -> None:
    a, b = features(40, 8, 0).astype(np.float64), features(30, 8, 1, 0.1).astype(np.float64)
    rng = np.random.default_rng(0)
    draws = [(rng.choice(40, 12, False), rng.choice(30, 12, False)) for _ in range(5)]
    c = common_centre(a, b)
    direct = _mmd2_direct(a, b, draws, c)
    np.testing.assert_allclose(_mmd2_masked(a, b, draws, c), direct, rtol=1e-9)


def test_the_block_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(60, 8, 0).astype(np.float64), features(45, 8, 1, 0.1).astype(np.float64)
    full = kid_from_features(a, b, 20, 40)
    monkeypatch.setattr("complexity_dit.evaluation.distances.BLOCK_ROWS", 7)
    assert max(len(a), len(b)) < BLOCK_ROWS
    assert kid_from_features(a, b, 20, 40).mean == pytest.approx(full.mean, rel=1e-12)


def test_float32_products_are_accurate_for_features_far_from_zero() -> None:
    """The kernel values differ by only 1e-4, and the distance still equals that in float64."""
    a, b = features(300, 64, 0) + 5, features(300, 64, 1, 0.02) + 5
    exact = kid_from_features(a.astype(np.float64), b.astype(np.float64), 20, 100)
    assert kid_from_features(a, b, 20, 100).mean == pytest.approx(exact.mean, rel=1e-4)


def test_errors_name_bad_sizes() -> None:
    a = features(6, 4, 0)
    with pytest.raises(UserError, match="subset_size is 1"):
        kid_from_features(a, a, subset_size=1)
    with pytest.raises(UserError, match="subsets is 0"):
        kid_from_features(a, a, subsets=0)
