"""Everything that needs a GPU, in four parts that take at most 21 minutes together.

    python3 -m benchmarks.speed.gpu tests     # the kernels against the definition in fp64,
                                              # then their test modules
    python3 -m benchmarks.speed.gpu ops       # bench_ops: GB/s and TFLOP/s of every operation
    python3 -m benchmarks.speed.gpu models    # bench_tax: training steps of compiled stacks of
                                              # blocks, B/2 and XL/2, with each kind of dynamics
    python3 -m benchmarks.speed.gpu train     # bench_train: whole steps of S/2 and B/2, AdamW and
                                              # Muon, compiled by blocks and whole: images/s, share
                                              # of the peak, tax, memory

Needs torch and triton; the packages need not be installed. `train` measures the image model where
diffusers is installed, and else the stack of blocks. Rows are written to the folder $OUT
(runs/gpu) as they are measured. The exit status is 2 without a GPU, 1 after a failure and 3 if the
time ended during a measurement. `--device cpu --quick` tests the script with interpreted kernels.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MINUTES = {"tests": 5.0, "ops": 2.5, "models": 4.0, "train": 7.0}
"""Minutes after which a part starts nothing new."""
MORE = 0.5
"""Minutes after that, when running work is stopped."""
NOT_ON_A_DEVICE = "test_ops_switch.py"


def give_up(*_):
    print("the time is over; the rows measured so far are kept", file=sys.stderr)
    sys.stderr.flush()
    os._exit(3)


def device_tests(options, rows, deadline):
    from benchmarks.common.results import append_rows
    from benchmarks.speed import device_checks

    device = options.device
    failures = device_checks.run(
        device, options.quick, deadline, lambda row: append_rows(rows, "device", [row], device)
    )
    if device == "cpu":
        return failures
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: only the checks above ran")
        return failures
    folder = ROOT / "tests/core/kernels"
    modules = [p for p in sorted(folder.glob("test_*.py")) if p.name not in NOT_ON_A_DEVICE]
    # Without the project's settings, which name plugins that may be missing here.
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={ROOT}",
        "--import-mode=importlib", "-p", "no:cacheprovider", *map(str, modules),
    ]  # fmt: skip
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4"]  # most of the time is compilation of kernels
    environment = os.environ | {"INL_TEST_DEVICE": device}
    print("the kernels' test modules on the device:", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=deadline.left())
    except subprocess.TimeoutExpired:
        print("the time is over; the test modules were stopped")
        return failures
    return failures + (done.returncode != 0)


def device_ops(options, rows, deadline):
    import torch
    from benchmarks.speed import bench_ops

    device = options.device
    if not options.quick:
        return bench_ops.run(
            device, "full", torch.bfloat16, deadline, rows, seconds=options.seconds
        )
    some = ("eager", "triton", "F.rms_norm", "dense", "mask loop", "grouped_mm")  # none compiles
    return bench_ops.run(
        device, "quick", torch.bfloat16, deadline, rows, backends=some, seconds=0.01
    )


def device_models(options, rows, deadline):
    from benchmarks.speed import bench_tax

    from inl_core import ops

    device = options.device
    small = ["--sizes", "S/2", "--depth", "1", "--batch_size", "1", "--side", "4", "--rounds", "1",
             "--eager"]  # fmt: skip
    full = ["--sizes", "B/2", "XL/2", "--batch_size", "64", "--side", "16",
            "--rounds", str(options.rounds)]  # fmt: skip
    routing = ["64", "32", "64", "4"] if options.quick else ["65536", "768", "2048", "8"]
    # The most important kinds come first, because the time may end. `triton` shows what `auto`
    # gains by leaving operations to the compiler.
    order = (
        ("auto", ["channel", "token"]), ("triton", ["channel", "token"]), ("auto", None),
        ("auto", ["lite", "layer"]), ("triton", ["lite", "layer"]),
    )  # fmt: skip
    for backend, kinds in (("auto", ["channel"]), ("auto", None)) if options.quick else order:
        parsed = bench_tax.parse([
            *(small if options.quick else full), "--kinds", *(kinds or ["channel"]),
            "--routing", *routing,
            "--device", device, "--dtype", "bfloat16", "--backend", backend, "--out", str(rows),
        ])  # fmt: skip
        if kinds is None:
            parsed.sizes = []
        else:
            parsed.routing = None
        with ops.use_backend(backend):
            bench_tax.run(parsed, deadline)
    return 0


def device_train(options, rows, deadline):
    from benchmarks.speed import bench_train

    small = ["--sizes", "S/2", "--depth", "1", "--batch_size", "2", "--side", "4", "--rounds", "1",
             "--modes", "no", "--quick"]  # fmt: skip
    chosen = small if options.quick else ["--rounds", str(options.rounds)]
    parsed = bench_train.parse([*chosen, "--device", options.device, "--out", str(rows)])
    bench_train.run(parsed, deadline)
    return 0


PARTS = {
    "tests": device_tests, "ops": device_ops, "models": device_models, "train": device_train,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes")
    parser.add_argument("--minutes", type=float, help="no new work starts after this; see MINUTES")
    parser.add_argument("--seconds", type=float, default=0.2, help="ops: of calls per measurement")
    parser.add_argument(
        "--rounds", type=int, default=30, help="models and train: steps of each network"
    )
    options = parser.parse_args()
    minutes = options.minutes or MINUTES[options.part]
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed for {sys.executable}; nothing was measured")
            return 2
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU; nothing was measured")
        return 2
    sys.path[:0] = [str(ROOT / f"packages/{name}/src") for name in ("inl-core", "complexity-dit")]
    from benchmarks.common.results import hardware, triton_version
    from benchmarks.common.timing import Deadline

    name = hardware(options.device)
    print(f"{options.part} on {name}, torch {torch.__version__}, triton {triton_version()}")
    rows = Path(os.environ.get("OUT", "runs/gpu")) / f"{options.part}.csv"
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 60 * (minutes + MORE))
    failures = PARTS[options.part](options, rows, Deadline(minutes))
    print(f"rows: {rows}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
