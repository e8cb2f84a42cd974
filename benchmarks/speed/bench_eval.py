"""Time and peak memory of FID, KID, precision and recall: ours, torch-fidelity and torchmetrics.

    python -m benchmarks.speed.bench_eval --rows benchmarks/results.csv

All three get the same features, (n, 2048) float32 with the decaying spectrum and the positive means
of Inception's pool3, so no network is timed. Each program runs in a process of its own, in turn,
`--rounds` times; times are medians. Memory is the largest growth of the process, without features.
FID: covariances and distance from features. KID: 100 subsets of 1,000. prdc: precision and recall
(ours includes density and coverage).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarks.common.results import append_rows, as_rows, format_values

PROGRAMS = ("ours", "torch-fidelity", "torchmetrics")
MEASURES = ("fid", "kid", "prdc")
SUBSETS, SUBSET_SIZE, UPDATE = 100, 1000, 256


def features(n, d, seed):
    """(n, d) float32 with means near 0.4 and eigenvalues of the covariance that fall as a power."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0]
    scale = 4.0 / (1 + np.arange(d)) ** 0.75
    rows = rng.standard_normal((n, d)) * (scale * (1 + 0.1 * seed)) @ basis
    return np.abs(rows + 0.4 + 0.01 * seed).astype(np.float32)


def ours(measure, a, b):
    from complexity_dit.evaluation.distances import (
        fid_from_features,
        kid_from_features,
        manifold_overlap,
    )

    if measure == "fid":
        return fid_from_features(a, b)
    if measure == "kid":
        return kid_from_features(a, b, SUBSETS, min(SUBSET_SIZE, len(a))).mean
    return manifold_overlap(a, b).precision


def torch_fidelity(measure, a, b):
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = torch.from_numpy(a), torch.from_numpy(b)
    if measure == "fid":
        one, two = fid_features_to_statistics(a), fid_features_to_statistics(b)
        return fid_statistics_to_metric(one, two, False)["frechet_inception_distance"]
    if measure == "kid":
        size = min(SUBSET_SIZE, len(a))
        found = kid_features_to_metric(
            a, b, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=0, verbose=False
        )
        return found["kernel_inception_distance_mean"]
    return prc_features_to_metric(a, b, verbose=False)["precision"]


def torchmetrics(measure, a, b):
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Given(torch.nn.Module):
        """A feature network that returns its input, so that only the metric is timed."""

        num_features = a.shape[1]

        def forward(self, x):
            return x

    if measure == "fid":
        metric = FrechetInceptionDistance(feature=Given())
    else:
        size = min(SUBSET_SIZE, len(a))
        metric = KernelInceptionDistance(feature=Given(), subsets=SUBSETS, subset_size=size)
    for rows, real in ((b, True), (a, False)):
        for part in torch.from_numpy(rows).split(UPDATE):
            metric.update(part, real=real)
    found = metric.compute()
    return float(found if measure == "fid" else found[0])


def peak_mib():
    """Largest resident size of the process so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(program, measure, folder):
    """Print one measure of one program as JSON: value, seconds and growth of memory."""
    run = {"ours": ours, "torch-fidelity": torch_fidelity, "torchmetrics": torchmetrics}[program]
    a, b = np.load(folder / "a.npy"), np.load(folder / "b.npy")
    # Imports and thread pools are not measured.
    run(measure, a[:16].copy(), b[:16].copy())
    before = peak_mib()
    start = time.perf_counter()
    value = run(measure, a, b)
    seconds = time.perf_counter() - start
    print(json.dumps({"value": value, "seconds": seconds, "mib": peak_mib() - before}))


def measured(program, measure, folder):
    command = ["-m", "benchmarks.speed.bench_eval", "--child", program, measure, str(folder)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} {measure} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(n, width, rounds, folder):
    """Rows of all programs and measures at one n."""
    for name, seed in (("a", 1), ("b", 0)):
        np.save(folder / f"{name}.npy", features(n, width, seed))
    for measure in MEASURES:
        programs = [p for p in PROGRAMS if (measure, p) != ("prdc", "torchmetrics")]
        found = {p: [] for p in programs}
        for _ in range(rounds):
            for program in programs:
                found[program].append(measured(program, measure, folder))
        seconds = {p: statistics.median(r["seconds"] for r in found[p]) for p in programs}
        fastest = min(seconds[p] for p in programs if p != "ours")
        for program in programs:
            values = {
                "time": (seconds[program], "s"),
                "ratio": (seconds[program] / fastest, "x faster other"),
                "memory": (max(r["mib"] for r in found[program]), "MiB"),
                "value": (float(found[program][0]["value"]), ""),
            }
            print(f"n {n:6} {measure:5} {program:15} {format_values(values)}", flush=True)
            yield from as_rows(values, f"{measure} {program}", shape=f"n {n} x {width}")


def main():
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 10000], help="images per set")
    parser.add_argument("--width", type=int, default=2048, help="features per image")
    parser.add_argument("--rounds", type=int, default=1, help="processes per program")
    parser.add_argument("--rows", type=Path, help="append rows to this CSV")
    options = parser.parse_args()
    for n in options.n:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(rows_of(n, options.width, options.rounds, Path(folder)))
        if options.rows:
            append_rows(options.rows, "eval", rows, "cpu")


if __name__ == "__main__":
    main()
