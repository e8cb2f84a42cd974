"""Time of a training step of the rows of the recipe, and whether the loader keeps up with it.

    python -m benchmarks.speed.bench_step flow-none full --latents CACHE \
        --rows benchmarks/results.csv

Every row repeats one step: forward, backward, clipping, optimizer and EMA on a fixed batch that is
already on the device. The rows take turns, and ratios are to the first row. `--loop N` also
measures the loader alone over N batches, and the loop of `complexity-dit train`, which has both: if
it is slower than its step, the loader is the limit. `--profile FILE` writes the operations of a
step of the first row by time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.common.fields import overridden, override_flag
from benchmarks.common.results import append_rows, as_rows, commit, dtype_of, format_values
from benchmarks.common.timing import paired, wait
from benchmarks.recipe.recipe import BUILD, ROWS, row_config, used_tflops

from complexity_dit.data.latents import load_training_data
from complexity_dit.training.batches import StepBatches, step_loader
from complexity_dit.training.callbacks import NoiseLevels
from complexity_dit.training.network import build_model
from complexity_dit.training.state import build_state, prepared_state
from complexity_dit.training.train import make_accelerator, optimizer_step


class Trained:
    """The training of a row, without files: a step is that of `complexity-dit train`."""

    def __init__(self, row, config):
        self.row, self.config = row, config
        self.accelerator = make_accelerator(config)
        self.data = load_training_data(config.data)
        torch.manual_seed(config.seed)
        network = BUILD.get(row, build_model)(config, self.data)
        self.network = network.config
        self.state, self.model = prepared_state(
            build_state(network, config), config, self.accelerator
        )
        self.noise = NoiseLevels(config.noise_bins, Path(config.out), 0, self.accelerator)
        device = self.accelerator.device
        self.batches = StepBatches(self.data, config, 0, 1)
        self.batch = {name: value.to(device) for name, value in self.batches[0].items()}

    def step(self, batch=None):
        optimizer_step(
            self.accelerator, self.model, self.state, batch or self.batch, self.config, self.noise
        )

    def speed(self, steps, work):
        """Images/s of a loop that passes each batch to `work`, without its first tenth."""
        begin = max(1, steps // 10)
        device = self.accelerator.device
        for i, batch in enumerate(step_loader(self.batches, range(steps), device)):
            if i == begin:
                wait(device)
                start = time.perf_counter()
            work(batch)
        wait(device)
        return (steps - begin) * self.config.batch_size / (time.perf_counter() - start)


def profile(training, file):
    """Write the operations of three steps, those with most device time first."""
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
    """Print one line per row; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=ROWS, metavar="ROW", help="of recipe.py --list")
    parser.add_argument("--latents", required=True, help="cache written by complexity-dit encode")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loop", type=int, default=0, metavar="N", help="steps with the loader")
    parser.add_argument("--profile", metavar="FILE")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--peak_tflops", type=float, help="of the device; adds the utilisation")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from = commit()
    overrides = overridden(options.override)
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
            if options.peak_tflops and row not in BUILD:  # FLOPs are those of our network
                used = used_tflops(own.config, own.network, speed)
                values["model FLOPs"] = (used, "TFLOP/s")
                share = used / options.peak_tflops
                values["utilisation"] = (share, f"of {options.peak_tflops:g} TFLOP/s")
            print(f"{row:18} {format_values(values)}", flush=True)
            size = f"{own.config.model.size}/{own.config.model.patch_size}"
            shape = f"{size} {'x'.join(map(str, own.batch['x'].shape))}"
            rows += as_rows(values, row, shape=shape, dtype=dtype_of(own.config.mixed_precision))
        if options.profile:
            profile(trainings[options.cases[0]], options.profile)
    if options.rows:
        command = (
            f"python -m benchmarks.speed.bench_step ROWS --latents CACHE --rounds {options.rounds}"
            + (f" --loop {options.loop}" if options.loop else "")
            + override_flag(options.override)
        )
        append_rows(options.rows, "step", rows, device.type, command=command, commit=started_from)


if __name__ == "__main__":
    main()
