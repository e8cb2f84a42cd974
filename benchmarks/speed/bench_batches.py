"""Time to build a training batch of latents on one CPU core, next to its definition.

    python -m benchmarks.speed.bench_batches --latents CACHE --rows benchmarks/results.csv

The definition works on the whole batch at once and allocates each result; the bits of both must be
equal. They take turns. Time is CPU time of the process, which other programs hardly change. A page
fault is 4 KiB that the system had to allocate and clear.
"""

import argparse
import resource
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from benchmarks.common.results import append_rows, as_rows, format_values

from complexity_dit.config import DataConfig, TrainConfig
from complexity_dit.data.latents import folder_of, load_training_data, read_cache
from complexity_dit.seeding import generator_for
from complexity_dit.training.batches import StepBatches, random_batch_indices
from complexity_dit.training.objective import drop_labels, noisy_input_and_target, sample_times

COMMAND = "python -m benchmarks.speed.bench_batches --latents CACHE"


def definition(batches, step):
    """A batch of latents without a posterior, by definition."""
    data, config = batches.data, batches.config
    count = config.batch_size
    indices = random_batch_indices(len(data), config.seed, step * count, count)
    draw = generator_for(config.seed, "train", step)
    flips = torch.rand(count, generator=draw) < (0.5 if config.data.flip else 0.0)
    times = sample_times(count, config.objective, draw)
    labels = drop_labels(data.labels[indices], batches.dropouts, draw)
    noise = torch.randn(count, data.channels, data.sample_size, data.sample_size, generator=draw)
    clean = data._read("latents", data._kept[np.asarray(indices)], flips.long().numpy()).float()
    if not clean.isfinite().all():
        raise ValueError("a latent is not finite")
    clean = (clean - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
    noisy, timestep, target = noisy_input_and_target(clean, noise, times, config.objective)
    return {"labels": labels, "x": noisy, "timestep": timestep, "target": target}


def costs(functions, rounds):
    """{name: (median CPU ms, median ratio to the first, median page faults)} of calls in turn."""
    found = {name: [] for name in functions}
    for step in range(rounds + 2):
        for name, function in functions.items():
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.process_time()
            function(step)
            took = 1000 * (time.process_time() - start)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            if step >= 2:  # after the warm-up
                found[name].append((took, faults))
    first = next(iter(found.values()))
    return {
        name: (
            statistics.median(took for took, _ in own),
            statistics.median(took / first[i][0] for i, (took, _) in enumerate(own)),
            statistics.median(faults for _, faults in own),
        )
        for name, own in found.items()
    }


def main():
    """Print one line per case; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", required=True, help="cache written by complexity-dit encode")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker of the loader

    source = DataConfig(source=f"latents:{options.latents}")
    info = read_cache(folder_of(source))
    config = replace(
        TrainConfig(),
        batch_size=options.batch_size,
        data=replace(source, resolution=info["resolution"], holdout=info["statistics"]["holdout"]),
    )
    batches = StepBatches(load_training_data(config.data), config, 0, 1)
    expected, found = definition(batches, 0), batches[0]
    if not all(torch.equal(found[name], value) for name, value in expected.items()):
        raise SystemExit("the batches differ from their definition")

    shape = (options.batch_size, *expected["x"].shape[1:])
    generator, normal = torch.Generator(), torch.empty(shape)
    table = costs(
        {
            "definition": lambda step: definition(batches, step),
            "StepBatches": batches.__getitem__,
            "its noise alone": lambda step: torch.randn(shape, generator=generator, out=normal),
        },
        options.rounds,
    )
    rows = []
    for case, (took, ratio, faults) in table.items():
        values = {
            "time": (took, "ms CPU"),
            "ratio": (ratio, "x definition"),
            "page faults": (float(faults), ""),
        }
        print(f"{case:16} {format_values(values)}")
        rows += as_rows(values, case, shape="x".join(map(str, shape)))
    if options.rows:
        append_rows(options.rows, "batches", rows, device="cpu", command=COMMAND)


if __name__ == "__main__":
    main()
