"""Training steps with three ways of waiting in OpenMP, on an idle machine and beside other work.

    python -m benchmarks.speed.bench_threads --rows benchmarks/results.csv

Each candidate is a process of its own, as the policy is read when torch is loaded: the default of
OpenMP, which spins for long, a passive one, and the short spin that the commands set, with as many
threads as there are cores. They take turns of `--seconds`, one at a time, in `--rounds` rounds:
alone, and beside `--busy` processes that compute without end. A row is the median of steps per
second, and the median over the rounds of its ratio to the default on an idle machine. Run it with
nothing else on the machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack, contextmanager

from benchmarks.common.results import append_rows, as_rows, format_values

from inl_core.run.threads import SHORT_SPIN

POLICIES = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"},
    "short spin": SHORT_SPIN,
}
SET = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")

# Waits for a line, trains for so many seconds, and prints its steps per second.
WORKER = """
import sys, time, torch
from benchmarks.common.timing import training_step
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
torch.manual_seed(0)
model = ComplexityDiTTransformer2DModel.from_size(
    sys.argv[1], sample_size=16, in_channels=32, patch_size=2, dynamics_adaptive="channel"
)
x, t = torch.randn(int(sys.argv[2]), 32, 16, 16), torch.rand(int(sys.argv[2])) * 1000
step = training_step(model, lambda: model(x, t, return_dict=False)[0].square().mean(), clip=True)
step()
print("ready", flush=True)
for line in sys.stdin:
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < float(line):
        step()
        count += 1
    print(count / (time.perf_counter() - start), flush=True)
"""
BUSY = "while True: pass"


@contextmanager
def process(code, *words, **environment):
    """A Python process with pipes, which is ended afterwards."""
    own = {name: value for name, value in os.environ.items() if name not in SET}
    started = subprocess.Popen(
        [sys.executable, "-c", code, *words], env=own | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def turn(worker, seconds):
    worker.stdin.write(f"{seconds}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main():
    """Print one line per candidate; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy", type=int, default=2, help="processes beside the training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    speeds = {}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                process(
                    WORKER, options.size, str(options.batch_size),
                    OMP_NUM_THREADS=str(options.threads), **environment,
                )
            )
            for name, environment in POLICIES.items()
        }  # fmt: skip
        for worker in workers.values():
            worker.stdout.readline()
        for _ in range(options.rounds):
            for busy in (0, options.busy):
                with ExitStack() as beside:
                    for _ in range(busy):
                        beside.enter_context(process(BUSY))
                    for name, worker in workers.items():
                        case = f"{name}, {f'{busy} busy processes' if busy else 'idle'}"
                        speeds.setdefault(case, []).append(turn(worker, options.seconds))
    base, rows = next(iter(speeds.values())), []
    for case, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        values = {"speed": (statistics.median(found), "steps/s"), "ratio": (ratio, "x idle")}
        print(f"{case:30} {format_values(values)}", flush=True)
        shape = f"{options.size}/2 batch {options.batch_size}, {options.threads} threads"
        rows += as_rows(values, case, shape=shape)
    if options.rows:
        append_rows(options.rows, "threads", rows, "cpu", threads=options.threads)


if __name__ == "__main__":
    main()
