"""What dynamics cost: parameters and step time of every placement beside `none`.

One process, one model of each kind; their training steps are timed in turn, so that a busy machine
slows all of them alike. Reports medians, and the median of the per-round ratios to `none`.

    python benchmarks/bench_placements.py --rows benchmarks/results.csv
"""

import argparse
import statistics
import time

import torch
from results import append_rows

from complexity_dit.architecture import PLACEMENTS
from complexity_dit.transformer import ComplexityDiTTransformer2DModel


def one_step(model, optimizer, batch):
    """Forward, backward, update: the time in seconds."""
    start = time.perf_counter()
    x, timestep, labels = batch
    model(x, timestep, labels, return_dict=False)[0].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size, adaptive, sample_size, patch_size, batch_size, rounds, device):
    """Rows for one size: {placement, parameters, seconds, ratio}."""
    torch.manual_seed(0)
    batch = (
        torch.randn(batch_size, 3, sample_size, sample_size, device=device),
        torch.rand(batch_size, device=device) * 1000,
        torch.zeros(batch_size, 1, dtype=torch.long, device=device),
    )
    runs = {}
    for placement in reversed(PLACEMENTS):  # `none` first in every round
        model = ComplexityDiTTransformer2DModel.from_size(
            size,
            sample_size=sample_size,
            patch_size=patch_size,
            label_fields=["style"],
            num_classes=[8],
            dynamics_placement=placement,
            dynamics_adaptive=adaptive,
        ).to(device)
        runs[placement] = (model, torch.optim.AdamW(model.parameters(), fused=True), [])
    for i in range(rounds + 2):
        for model, optimizer, times in runs.values():
            seconds = one_step(model, optimizer, batch)
            if i >= 2:  # the first two rounds warm up
                times.append(seconds)
    plain = runs["none"][2]
    return [
        {
            "placement": placement,
            "adaptive": "-" if placement == "none" else adaptive,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": statistics.median(times),
            "ratio": statistics.median(t / p for t, p in zip(times, plain, strict=True)),
        }
        for placement, (model, _, times) in runs.items()
    ]


def main():
    """Print the table and, if asked, add its rows to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--adaptive", nargs="+", default=["token", "channel", "lite"])
    parser.add_argument("--sample_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    print(f"{'placement':10} {'adaptive':9} {'parameters':>11} {'extra':>7} {'ms':>8} {'ratio':>6}")
    rows = []
    for adaptive in options.adaptive:
        table = measure(
            options.size, adaptive, options.sample_size, options.patch_size,
            options.batch_size, options.rounds, device,
        )  # fmt: skip
        base = table[0]["parameters"]
        for row in table if not rows else table[1:]:
            extra = row["parameters"] / base - 1
            print(
                f"{row['placement']:10} {row['adaptive']:9} {row['parameters']:11,} {extra:7.1%} "
                f"{1000 * row['seconds']:8.1f} {row['ratio']:6.3f}"
            )
            name = f"{options.size} {row['placement']} {row['adaptive']}"
            for metric, unit in (("parameters", ""), ("seconds", "s"), ("ratio", "x none")):
                rows.append({"case": name, "metric": metric, "value": row[metric], "unit": unit})
    if options.rows:
        append_rows(options.rows, "placements", rows)


if __name__ == "__main__":
    main()
