"""Nearest training images of samples, compared with those of held-out images."""

import json

import numpy as np
import pytest

from complexity_dit.evaluation.breakdown import memorisation


def features(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, 12)) + shift).astype(np.float32)


def test_new_samples_resemble_held_out_images() -> None:
    found = memorisation(features(400, 1), features(400, 2), features(300, 0))
    assert found.probability_closer == pytest.approx(0.5, abs=0.05)
    assert found.closer_than_1_percent < 0.04
    # The probability by its definition.
    a, b = found.samples[:, None], found.heldout[None]
    assert found.probability_closer == pytest.approx(((a < b) + (a == b) / 2).mean(), rel=1e-12)


def test_copies_are_listed_nearest_first() -> None:
    train, samples = features(300, 0), features(100, 1)
    samples[7] = train[42]
    samples[8] = train[42]  # two copies of one image give one pair
    samples[30] = train[5] + np.float32(0.01)
    found = memorisation(samples, features(100, 2), train, pairs=4)
    assert [pair[:2] for pair in found.pairs[:2]] == [(7, 42), (30, 5)]
    assert found.pairs[0][2] == 0
    distances = [pair[2] for pair in found.pairs]
    assert distances == sorted(distances)
    assert len({pair[1] for pair in found.pairs}) == 4
    assert found.closer_than_1_percent >= 0.03
    summary = found.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["closest_pairs"][0] == {"sample": 7, "training_image": 42, "distance": 0.0}
    assert summary["quantiles"]["samples"]["0"] == 0
