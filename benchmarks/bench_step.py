"""What a training step of the recipe's rows costs, and whether the loader keeps up with it.

    python benchmarks/bench_step.py flow-none full --latents CACHE --rows benchmarks/results.csv

Every row takes the same step again and again: forward, backward, clipping, optimizer and average on
one fixed batch that is on the device already. The rows take turns, and ratios are to the first row.
With `--loop N` two more numbers stand beside that: how fast the loader makes N batches when nobody
waits for anything else, and how fast training is with both, the loop of `complexity-dit train`. If
the loop is slower than its step alone, the loader is the brake. `--profile FILE` writes which
operations the time of the first row's step goes to.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from fields import parsed
from recipe import BUILD, ROWS, row_config, used_tflops
from results import append_rows, commit
from timing import paired, wait
from torch.utils.data import DataLoader

from complexity_dit.acceleration import make_accelerator
from complexity_dit.batches import StepBatches
from complexity_dit.build import build_model, build_state
from complexity_dit.latents import load_training_data
from complexity_dit.noise_levels import NoiseLevels
from complexity_dit.step import optimizer_step


class Trained:
    """A row's network in training, without files: what `complexity-dit train` does in a step."""

    def __init__(self, row, config):
        self.row, self.config = row, config
        self.accelerator = make_accelerator(config)
        self.data = load_training_data(config.data)
        torch.manual_seed(config.seed)
        network = BUILD.get(row, build_model)(config, self.data)
        self.network = network.config
        self.state = build_state(network, config)
        if config.compile == "regional":
            network.compile_repeated_blocks(fullgraph=True)
        self.model, self.state.optimizer = self.accelerator.prepare(
            self.state.model, self.state.optimizer
        )
        self.state.average_from_here()
        self.noise = NoiseLevels(config.noise_bins, Path(config.out), 0, self.accelerator)
        device = self.accelerator.device
        first = StepBatches(self.data, config, 0, 1)[0]
        self.batch = {name: value.to(device) for name, value in first.items()}

    def step(self, batch=None):
        optimizer_step(
            self.accelerator, self.model, self.state, batch or self.batch, self.config, self.noise
        )

    def loader(self, steps):
        return DataLoader(
            StepBatches(self.data, self.config, 0, 1),
            batch_size=None,
            sampler=range(steps),
            num_workers=self.config.loader_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def speed(self, steps, work):
        """Images/s of a loop that hands each batch to `work`, its first tenth not counted."""
        begin = max(1, steps // 10)
        for i, batch in enumerate(self.loader(steps)):
            if i == begin:
                wait(self.accelerator.device)
                start = time.perf_counter()
            work(batch)
        wait(self.accelerator.device)
        return (steps - begin) * self.config.batch_size / (time.perf_counter() - start)


def profile(training, file):
    """Write the operations of three steps, those with most time of the device first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = training.accelerator.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profiler(activities=activities) as seen:
        for _ in range(3):
            training.step()
        wait(training.accelerator.device)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    Path(file).write_text(seen.key_averages().table(sort_by=order, row_limit=40) + "\n")


def main():
    """Print a line a row and, if asked, add its numbers to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=ROWS, metavar="ROW", help="of recipe.py --list")
    parser.add_argument("--latents", required=True, help="cache written by complexity-dit encode")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loop", type=int, default=0, metavar="N", help="steps with the loader")
    parser.add_argument("--profile", metavar="FILE")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--peak_tflops", type=float, help="of the device: adds its utilisation")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from = commit()
    overrides = {k: parsed(v) for k, _, v in (item.partition("=") for item in options.override)}
    overrides |= {"data.source": f"latents:{options.latents}", "report_to": "none"}
    with tempfile.TemporaryDirectory() as out:
        trainings = {
            row: Trained(row, row_config(row, f"{out}/{row}", 10**9, 0, overrides))
            for row in options.cases
        }
        device = next(iter(trainings.values())).accelerator.device
        steps = paired({row: own.step for row, own in trainings.items()}, options.rounds, device)
        rows = []
        for row, own in trainings.items():
            seconds, ratio = steps[row]
            speed = own.config.batch_size / seconds
            values = {
                "step": (1000 * seconds, "ms"),
                "ratio": (ratio, f"x {options.cases[0]}"),
                "speed": (speed, "images/s"),
            }
            if options.loop:
                values["loader alone"] = (own.speed(options.loop, lambda batch: None), "images/s")
                values["loop"] = (own.speed(options.loop, own.step), "images/s")
            if options.peak_tflops and row not in BUILD:  # the formulas know our network
                used = used_tflops(own.config, own.network, speed)
                values["model FLOPs"] = (used, "TFLOP/s")
                values["utilisation"] = (
                    used / options.peak_tflops,
                    f"of {options.peak_tflops:g} TFLOP/s",
                )
            print(f"{row:18} " + ", ".join(f"{k} {v:.5g} {u}" for k, (v, u) in values.items()),
                  flush=True)  # fmt: skip
            size, dtype = own.config.model.size, own.config.mixed_precision
            about = {
                "case": row,
                "shape": f"{size}/{own.config.model.patch_size} "
                + "x".join(map(str, own.batch["x"].shape)),
                "dtype": "bfloat16" if dtype == "bf16" else "float32",
            }
            rows += [about | {"metric": m, "value": v, "unit": u} for m, (v, u) in values.items()]
        if options.profile:
            profile(trainings[options.cases[0]], options.profile)
    if options.rows:
        changed = "".join(f" {item}" for item in options.override)
        command = (
            f"python benchmarks/bench_step.py ROWS --latents CACHE --rounds {options.rounds}"
            + (f" --loop {options.loop}" if options.loop else "")
            + (f" --override{changed}" if changed else "")
        )
        append_rows(options.rows, "step", rows, device.type, command=command, commit=started_from)


if __name__ == "__main__":
    main()
