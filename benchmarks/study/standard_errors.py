"""Whether the standard errors of KID and FID are right, by simulation.

    python -m benchmarks.study.standard_errors --rows benchmarks/results.csv

Features are Gaussian (for KID with a ReLU, as Inception's last pooling has no negative numbers),
their variances fall as a power of the index. Two sets are drawn again and again, from one
distribution or from two. An error is right if its ratio to the standard deviation of the distances
is 1, and if 1.96 of it cover the truth in 95 %. KID is unbiased, so that its mean over the
repetitions is the truth; the Frechet distance of the Gaussians themselves is known.
"""

import argparse
import logging

import numpy as np
from benchmarks.common.results import append_rows, as_rows, format_values

from complexity_dit.evaluation.distances import (
    NORMAL_95,
    bootstrap,
    distance_of_sets,
    fid_curve,
    frechet_distance,
    kid_from_features,
)

DIMENSION = 64
KID_REPETITIONS = {256: 1000, 1024: 400, 2048: 300}
FID_RATIOS, FID_REPETITIONS, FID_ERRORS = (1, 2, 4, 8), 200, 50


class Pair:
    """Two distributions over features: the second is the first, mixed by `mix` and moved."""

    def __init__(self, power, mix, shift):
        rng = np.random.default_rng(7)
        self.root = np.arange(1, DIMENSION + 1) ** (-power / 2)
        self.mix = np.eye(DIMENSION) + mix * rng.standard_normal((DIMENSION, DIMENSION))
        self.shift = shift

    def draw(self, n, *seed):
        """n features of each, (n, D)."""
        x, y = np.random.default_rng(seed).standard_normal((2, n, DIMENSION)) * self.root
        return x, y @ self.mix + self.shift

    def frechet(self):
        """The distance of the two Gaussians."""
        mixed = self.root[:, None] * self.mix
        zero, moved = np.zeros(DIMENSION), np.full(DIMENSION, self.shift)
        return frechet_distance(zero, np.diag(self.root**2), moved, mixed.T @ mixed)


def covered(values, errors, truth):
    """Share of values within 1.96 errors of the truth."""
    return float((np.abs(values - truth) <= NORMAL_95 * errors).mean())


def kid_errors(pair, n, repetitions):
    """The new standard error and the one before it, std / sqrt(subsets)."""

    def estimate(seed):
        x, y = (np.maximum(z + 0.2, 0).astype(np.float32) for z in pair.draw(n, seed, n))
        return kid_from_features(x, y, seed=seed)

    found = [estimate(seed) for seed in range(repetitions)]
    means, errors, old = np.array([(e.mean, e.stderr, e.std / e.subsets**0.5) for e in found]).T
    truth, deviation = means.mean(), means.std(ddof=1)
    return {
        "KID x 1000": (1000 * float(truth), ""),
        "deviation x 1000": (1000 * float(deviation), ""),
        "error": (float(np.sqrt((errors**2).mean()) / deviation), "x deviation"),
        "covered": (100 * covered(means, errors, truth), "%"),
        "old error": (float(np.sqrt((old**2).mean()) / deviation), "x deviation"),
        "old covered": (100 * covered(means, old, truth), "%"),
        "repetitions": (repetitions, ""),
    }


def fid_errors(pair, n):
    """The bootstrap, and the extrapolation to infinite n."""
    truth = pair.frechet()
    values = np.array([distance_of_sets(*pair.draw(n, s, n)) for s in range(FID_REPETITIONS)])
    errors, limits = [], []
    for seed in range(FID_ERRORS):
        x, y = pair.draw(n, seed, n)
        errors.append(bootstrap(x, y, 20, seed))
        limits.append(fid_curve(x, y, errors[-1], seed))
    bias, deviation = values.mean() - truth, values.std(ddof=1)
    limit = np.mean([curve.infinity for curve in limits])
    half = np.mean([curve.high - curve.low for curve in limits]) / 2
    return {
        "truth": (truth, ""),
        "distance": (float(values.mean()), ""),
        "deviation": (float(deviation), ""),
        "error": (float(np.sqrt(np.mean(np.square(errors))) / deviation), "x deviation"),
        "bias left": (100 * float((limit - truth) / bias), "%"),
        "half interval": (float(half), ""),
        "covered": (100 * float(np.mean([c.low <= truth <= c.high for c in limits])), "%"),
    }


def main():
    """Print one line per case; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few repetitions, to try the script")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    logging.getLogger("complexity_dit").setLevel(logging.ERROR)  # every n here is small

    rows = {"kid_errors": [], "fid_errors": []}

    def add(bench, case, n, values):
        print(f"{bench} {case:20} n {n:<5} {format_values(values)}", flush=True)
        rows[bench] += as_rows(values, case, shape=f"n {n} x {DIMENSION}", dtype="")

    for case, pair in {
        "equal": Pair(1, 0, 0), "close": Pair(1, 0, 0.02), "different": Pair(1, 0.1, 0.05),
        "far": Pair(1, 0, 0.3),
    }.items():  # fmt: skip
        for n, repetitions in ({256: 8} if options.quick else KID_REPETITIONS).items():
            add("kid_errors", case, n, kid_errors(pair, n, repetitions))
    for power in (0.5, 1.5):
        for case, pair in {
            "equal": Pair(power, 0, 0),
            "different": Pair(power, 0.15, 0.05),
        }.items():
            for ratio in (1,) if options.quick else FID_RATIOS:
                n = ratio * DIMENSION
                add("fid_errors", f"{case}, power {power:g}", n, fid_errors(pair, n))
    if options.rows:
        for bench, found in rows.items():
            append_rows(options.rows, bench, found, device="cpu")


if __name__ == "__main__":
    main()
