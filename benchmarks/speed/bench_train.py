"""Speed of whole training steps: images/s, share of the peak, dynamics tax and memory.

    python -m benchmarks.speed.bench_train --out runs/train.csv

For every size and optimizer, a network with dynamics and one without train in turn on a fixed
batch: forward in bf16, backward, clipping and the optimizer of `complexity-dit train`; its data,
EMA and logs are not part of it. The blocks are compiled as its trainer does. The network is the
image model, or, where diffusers is missing, the stack of blocks of `bench_tax` (the column `case`
says which). Rows are written after each size and optimizer; FLOPs are those that torch counts.
"""

import argparse
import importlib.util
import statistics

import torch
from benchmarks.common import blocks
from benchmarks.common.memory import MIB, peak_of
from benchmarks.common.results import append_rows, as_rows, format_values, hardware
from benchmarks.common.timing import Deadline, in_turn, matmul_tflops, ratio_of, training_step
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.config import OptimConfig
from complexity_dit.training.optimizer import build_optimizer

PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
}
"""Dense bf16 products, from the data sheets, by the name that torch reports."""

OPTIMIZERS = ("adamw", "muon")
KINDS = ("none", "channel")
"""Without dynamics, and the default kind of coefficients in placement `branch`."""


def peak(device, quick):
    """(TFLOP/s, where the number is from): the data sheet's, or that of a large bf16 product."""
    if known := PEAK_TFLOPS.get(hardware(device)):
        return known, "of the data sheet"
    return matmul_tflops(device, 256 if quick else 8192, torch.bfloat16), "of a measured product"


def has_diffusers():
    return importlib.util.find_spec("diffusers") is not None


def build(kind, options, batch_size, compiled):
    """(name, network, function that returns the loss of a fixed batch)."""
    width, depth, heads = blocks.SIZES[options.size]
    depth = options.depth or depth
    device, random = options.device, torch.Generator().manual_seed(0)
    if has_diffusers():
        from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel

        torch.manual_seed(0)
        dynamics = (
            {"dynamics_placement": "none"}
            if kind == "none"
            else {"dynamics_placement": "branch", "dynamics_adaptive": kind}
        )
        model = ComplexityDiTTransformer2DModel(
            sample_size=2 * options.side, in_channels=4, hidden_size=width, num_layers=depth,
            num_attention_heads=heads, label_fields=("class",), num_classes=(1000,), **dynamics,
        ).to(device)  # fmt: skip
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        name, side = "model", 2 * options.side
        x, target = (
            torch.randn(batch_size, 4, side, side, generator=random).to(device) for _ in range(2)
        )
        times = (1000 * torch.rand(batch_size, generator=random)).to(device)
        labels = torch.randint(1000, (batch_size, 1), generator=random).to(device)

        def output():
            return model(x, times, labels, return_dict=False)[0]
    else:
        model = blocks.Stack(width, depth, heads, kind, options.side, compiled).to(device)
        name = "stack"
        x, target = (
            torch.randn(batch_size, options.side**2, width, generator=random).to(device)
            for _ in range(2)
        )
        condition = torch.randn(batch_size, width, generator=random).to(device)

        def output():
            return model(x, condition)

    def loss():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = output()
        return F.mse_loss(out.float(), target)

    return name, model.train(), loss


def step_flops(kind, options):
    """FLOPs of forward and backward of the batch, as torch counts them for one sample, eager."""
    _, _, loss = build(kind, options, 1, compiled=False)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return options.batch_size * counter.get_total_flops()


def held_mib(model, optimizer):
    """MiB of the parameters and of the optimizer's state."""
    tensors = [*model.parameters()]
    tensors += [t for own in optimizer.state.values() for t in own.values() if torch.is_tensor(t)]
    return sum(t.nbytes for t in tensors) / MIB


def measure(options, optimizer_name, peak_tflops, deadline):
    """Yield (case, {metric: (value, unit)}) of one size and optimizer, for each of `KINDS`."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    steps, flops, memory, names = {}, {}, {}, {}
    for kind in KINDS:
        flops[kind] = step_flops(kind, options)
        name, model, loss = build(kind, options, options.batch_size, not options.eager)
        optimizer = build_optimizer(model, OptimConfig(name=optimizer_name, lr=1e-4))
        step = training_step(model, loss, clip=True, optimizer=optimizer)
        step()  # compiles, and creates the state of the optimizer
        memory[kind] = held_mib(model, optimizer) + peak_of(step, options.device)
        steps[kind], names[kind] = step, f"{name} {optimizer_name} {kind}"
        print(f"{options.size} {names[kind]}: first steps done", flush=True)
    times = in_turn(steps, options.rounds, options.device, deadline=deadline)
    for kind in KINDS:
        seconds = statistics.median(times[kind])
        used = flops[kind] / seconds / 1e12
        yield (
            names[kind],
            {
                "step": (seconds, "s"),
                "speed": (options.batch_size / seconds, "images/s"),
                "model FLOPs": (used, "TFLOP/s"),
                "utilisation": (used / peak_tflops[0], peak_tflops[1]),
                "peak": (peak_tflops[0], f"TFLOP/s {peak_tflops[1]}"),
                "ratio": (ratio_of(times[kind], times["none"]), "x none"),
                "peak memory": (memory[kind], "MiB"),
                "rounds": (len(times[kind]), ""),
            },
        )


def run(options, deadline):
    """Measure, print, and write the rows as they are measured."""
    if not has_diffusers():
        print("diffusers is not installed: the stack of blocks is measured, not the image model")
    peak_tflops = peak(options.device, options.quick)
    print(f"peak: {peak_tflops[0]:.4g} TFLOP/s {peak_tflops[1]}", flush=True)
    for size in options.sizes:
        options.size = size
        width, depth, _ = blocks.SIZES[size]
        shape = f"{size} {options.depth or depth}x{width} {options.batch_size}x{options.side}^2"
        for name in OPTIMIZERS:
            if deadline.passed():
                print(f"not measured, the time is over: {size} {name}", flush=True)
                continue
            for case, values in measure(options, name, peak_tflops, deadline):
                case = f"{case} {'eager' if options.eager else 'compiled'}"
                print(f"{size} {case}: {format_values(values)}", flush=True)
                if options.out:
                    rows = as_rows(values, case, shape=shape, dtype="bfloat16", backend="auto")
                    append_rows(options.out, "train", rows, options.device)


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=blocks.SIZES, default=["S/2", "B/2"])
    parser.add_argument("--depth", type=int, help="layers; default: the size's own")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--side", type=int, default=16, help="tokens per side of a sample")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--quick", action="store_true", help="a small product for the peak")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=60, help="no new work starts after this")
    parser.add_argument("--out", help="CSV to add the rows to")
    return parser.parse_args(arguments)


def main():
    options = parse()
    run(options, Deadline(options.minutes))


if __name__ == "__main__":
    main()
