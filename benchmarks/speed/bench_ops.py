"""Speed of every operation, forward and backward, relative to the limits of the machine.

Operations limited by memory: GB/s of the tensors that must move, and the share of a plain copy
measured in the same run. Matrix products: TFLOP/s and the share of a large product. Baselines:
the definition (eager and compiled), F.rms_norm, Liger-Kernel where it is installed, and for the
routed MLP a dense MLP of equal active width and a loop over experts.

`time` is that of calls from Python, launches included; `device time`, on a GPU, that of the same
calls replayed from a CUDA graph. Rates and shares are those of the device time where there is one.

    python -m benchmarks.speed.bench_ops --out benchmarks/results.csv
    python -m benchmarks.speed.bench_ops --device cpu --quick --backends eager F.rms_norm
"""

import argparse
import sys
import traceback

import torch
import torch._functorch.config
from benchmarks.common.results import append_rows
from benchmarks.common.timing import Deadline, copy_gbs, graph_ms, matmul_tflops, median_ms
from benchmarks.speed import op_cases

SIZES = {
    # (samples, tokens per sample, widths), (tokens, width, inner, experts), copy MiB, product
    "full": ((256, 256, (768, 1152)), (65_536, 768, 2048, 8), 1024, 8192),
    "quick": ((2, 64, (64,)), (256, 64, 96, 4), 4, 128),
}


WAITS = {"mask loop"}
"""Implementations that wait for the device, which a CUDA graph cannot."""


def passes(case, function):
    """(name, function that makes the call, traffic, flops) of the forward and of the backward."""

    def backward():
        own = case.changed(lambda x: x)  # leaves of the stream that this runs on
        outputs, leaves = own.run(function), own.leaves()
        downs = [torch.randn_like(y) for y in outputs]
        # the dense baseline uses one expert only and ignores the plan
        options = {"retain_graph": True, "allow_unused": True}
        return lambda: torch.autograd.grad(outputs, leaves, downs, **options)

    yield "forward", lambda: lambda: case.run(function), case.forward, case.flops
    yield "backward", backward, case.backward, 2 * case.flops


def rows_of(case, backend, function, limits, dtype, device, seconds):
    """Rows of one implementation of one case."""
    element = torch.finfo(dtype).bits // 8
    for name, make, traffic, flops in passes(case, function):
        ms = median_ms(make(), device, seconds)
        about = {
            "case": f"{case.name} {name}", "shape": "x".join(map(str, case.shape)),
            "dtype": str(dtype).removeprefix("torch."), "backend": backend,
        }  # fmt: skip
        yield about | {"metric": "time", "value": ms, "unit": "ms"}
        if torch.device(device).type == "cuda" and backend not in WAITS:
            try:
                ms = graph_ms(make, seconds)
                yield about | {"metric": "device time", "value": ms, "unit": "ms"}
            except RuntimeError as error:
                what = f"{about['case']} {about['shape']} {backend}"
                print(f"device time not measured, no CUDA graph of {what}: {error}", flush=True)
        if flops:
            rate, limit, unit, of = flops / ms / 1e9, limits["matmul"], "TFLOP/s", "of matmul"
        else:
            moved = traffic * case.shape[0] * case.shape[1] * element
            rate, limit, unit, of = moved / ms / 1e6, limits["copy"], "GB/s", "of copy"
        yield about | {"metric": unit, "value": rate, "unit": unit}
        yield about | {"metric": of, "value": rate / limit, "unit": ""}


def cases(size, dtype, device):
    (samples, tokens, widths), routed, *_ = SIZES[size]
    for width in widths:
        yield from op_cases.bandwidth_cases(samples, tokens, width, dtype, device)
    yield op_cases.routed_case(*routed, dtype, device)


def measure(device, size, dtype, deadline, backends=(), match="", seconds=0.2):
    """Yield one list of rows per implementation; failures and omissions are yielded as text."""
    copy_size, product_size = SIZES[size][2:]
    limits = {
        "copy": copy_gbs(device, copy_size), "matmul": matmul_tflops(device, product_size, dtype)
    }  # fmt: skip
    kind = str(dtype).removeprefix("torch.")
    yield [
        {"case": "copy", "shape": f"{copy_size} MiB", "metric": "GB/s",
         "value": limits["copy"], "unit": "GB/s", "backend": "torch"},
        {"case": "matmul", "shape": f"{product_size}^3", "metric": "TFLOP/s", "dtype": kind,
         "value": limits["matmul"], "unit": "TFLOP/s", "backend": "torch"},
    ]  # fmt: skip
    for case in cases(size, dtype, device):
        if match not in case.name:
            continue
        for backend, function in op_cases.implementations(case, device).items():
            if backends and backend not in backends:
                continue
            if deadline.passed():
                yield f"not measured, the time is over: {case.name} {case.shape} {backend}"
                continue
            torch.compiler.reset()
            try:
                yield list(rows_of(case, backend, function, limits, dtype, device, seconds))
            except Exception:
                yield f"FAILED: {case.name} {case.shape} {backend}\n{traceback.format_exc()}"


def run(device, size, dtype, deadline, out, backends=(), match="", seconds=0.2):
    """Measure, print and write the rows; returns the number of failures."""
    # The backward is repeated on one graph.
    torch._functorch.config.donated_buffer = False
    if torch.device(device).type != "cuda":
        print(f"device time: not measured, {device} has no CUDA graphs", flush=True)
    failures = 0
    found = measure(device, size, dtype, deadline, backends, match, seconds)
    for rows in found:
        if isinstance(rows, str):
            failures += rows.startswith("FAILED")
            print(rows, file=sys.stderr, flush=True)
            continue
        if out:
            append_rows(out, "ops", rows, device)
        by_case = {}
        for row in rows:
            key = f"{row['case']:32} {row['shape']:20} {row['backend']:14}"
            by_case.setdefault(key, []).append(f"{row['value']:.4g} {row['unit'] or row['metric']}")
        for key, values in by_case.items():
            print(key, "  ".join(values), flush=True)
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--backends", nargs="+", default=[], help="only these; default: all")
    parser.add_argument("--match", default="", help="only operations with this in their name")
    parser.add_argument("--seconds", type=float, default=0.2, help="of calls per measurement")
    parser.add_argument("--minutes", type=float, default=30, help="no new work starts after this")
    parser.add_argument("--out", help="CSV to add the rows to")
    options = parser.parse_args()
    size = "quick" if options.quick else "full"
    failures = run(
        options.device, size, getattr(torch, options.dtype), Deadline(options.minutes),
        options.out,
        options.backends, options.match, options.seconds,
    )  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
