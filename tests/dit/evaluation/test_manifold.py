"""Precision, recall, density and coverage against their definitions and torch-fidelity."""

import numpy as np
import pytest
import torch

from complexity_dit.evaluation.distances import manifold_overlap, nearest
from inl_core.run.errors import UserError


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
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
    x, y = features(70, 6, 0, 0.7), features(55, 6, 1)
    expected = by_definition(x, y, 4)
    assert 0 < min(expected[0], expected[1], expected[3]) < 1
    for block in (1024, 16, 1):
        monkeypatch.setattr("complexity_dit.evaluation.distances.BLOCK_ROWS", block)
        assert manifold_overlap(x, y, 4, 4) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(200, 12, 0, 0.5) + 4, features(150, 12, 1) + 4
    expected = prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), verbose=False)
    overlap = manifold_overlap(x, y)
    assert overlap.precision == pytest.approx(expected["precision"], rel=1e-6)
    assert overlap.recall == pytest.approx(expected["recall"], rel=1e-6)


def test_equal_sets_overlap_fully_and_distant_sets_do_not() -> None:
    x = features(40, 5, 0)
    same = manifold_overlap(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert manifold_overlap(x, x + 100) == (0, 0, 0, 0)


def test_nearest_finds_the_nearest_rows_and_their_distances() -> None:
    x, y = features(30, 5, 0), features(50, 5, 1)
    x[3] = y[17]
    distances, rows = nearest(x, y)
    all_of = np.linalg.norm(x[:, None].astype(np.float64) - y[None], axis=2)
    np.testing.assert_array_equal(rows, all_of.argmin(1))
    np.testing.assert_allclose(distances, all_of.min(1), rtol=1e-6)
    # A copy is at distance exactly 0, without rounding of a difference of large squares.
    assert (rows[3], distances[3]) == (17, 0)


def test_sets_too_small_for_k_neighbours_are_rejected() -> None:
    x = features(5, 3, 0)
    with pytest.raises(UserError, match="more than 5 images per side"):
        manifold_overlap(x, features(9, 3, 1))
    with pytest.raises(UserError, match="no neighbours 0"):
        manifold_overlap(x, x, 0, 3)
    with pytest.raises(UserError, match="not finite"):
        nearest(x * np.nan, x)
