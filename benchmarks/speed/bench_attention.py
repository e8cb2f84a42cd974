"""Attention in bf16 on this machine: torch's own and `ops.attention`, forward and both passes.

All are timed in turn, so that a busy machine slows all alike; ratios are medians within rounds. The
row "torch, fp32" shows what bf16 gains at all.

    python -m benchmarks.speed.bench_attention --rows benchmarks/results.csv
"""

import argparse
import statistics

import torch
from benchmarks.common.results import append_rows, as_rows, format_values
from benchmarks.common.timing import DEVICE, in_turn, ratio_of
from torch.nn import functional as F

from inl_core import cpu_attention
from inl_core.reference.layers import causal_mask

# name: (samples, tokens, heads, heads of keys and values, head width, causal)
SHAPES = {
    "tiny/2": (32, 64, 6, 6, 32, False),
    "S/2": (8, 256, 6, 6, 64, False),
    "language, 256": (8, 256, 8, 2, 64, True),
    "512 tokens": (4, 512, 6, 6, 64, False),
    "1024 tokens": (2, 1024, 6, 6, 64, False),
}


def torch_attention(q, k, v, causal):
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def products(q, k, v, causal):
    """As `ops.attention`, for any number of keys."""
    mask = causal_mask(q, k)[None, None] if causal else None
    return cpu_attention.attention(q, k, v, mask, q.shape[-1] ** -0.5)


CANDIDATES = {
    "torch": (torch_attention, torch.bfloat16),
    "torch, fp32": (torch_attention, torch.float32),
    "ops.attention": (products, torch.bfloat16),
}


def work(name, shape, training, device):
    """A function that runs one candidate on tensors laid out as projections give them."""
    function, dtype = CANDIDATES[name]
    samples, tokens, heads, kv_heads, width, causal = shape

    def draw(count):
        x = torch.randn(samples, tokens, count, width, device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_(training)

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    down = torch.randn(samples, heads, tokens, width, device=device, dtype=dtype)

    def run():
        out = function(q, k, v, causal)
        if training:
            torch.autograd.grad(out, (q, k, v), down)

    return run


def measure(shape, training, rounds, device):
    """{candidate: {metric: (value, unit)}}."""
    times = in_turn(
        {name: work(name, shape, training, device) for name in CANDIDATES},
        rounds, device, warm_up=3, rotate=True,
    )  # fmt: skip
    return {
        name: {
            "time": (1000 * statistics.median(own), "ms"),
            "speed ratio": (1 / ratio_of(own, times["torch"]), "x torch in bf16"),
        }
        for name, own in times.items()
    }


def main():
    """Print one line per candidate and shape; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    rows = []
    for shape in options.shapes:
        for kind in ("forward", "forward and backward"):
            training = kind != "forward"
            found = measure(SHAPES[shape], training, options.rounds, options.device)
            for name, values in found.items():
                print(f"{shape:14} {kind:21} {name:14} {format_values(values)}", flush=True)
                dtype = str(CANDIDATES[name][1]).removeprefix("torch.")
                rows += as_rows(values, f"{name}, {kind}", shape=shape, dtype=dtype)
    if options.rows:
        append_rows(options.rows, "attention", rows, options.device)


if __name__ == "__main__":
    main()
