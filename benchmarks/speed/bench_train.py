"""Speed of whole training steps: images/s, share of the peak, dynamics tax and memory.

    python -m benchmarks.speed.bench_train --out runs/train.csv
    python -m benchmarks.speed.bench_train --count --out benchmarks/results.csv

For every size and way to compile, a network with dynamics and one without train in turn on a fixed
batch, with each optimizer of `complexity-dit train`: forward in bf16, backward, clipping and the
optimizer; data, EMA and logs are not part of it. The network is the image model, or, where
diffusers is missing, the stack of blocks of `bench_tax` (the column `case` says which). Rows are
written after each size and way; FLOPs are those that torch counts.

`--count` counts the operations that a step dispatches, without computing them: all but views and
allocations, so each launches at least one kernel on a GPU. Muon launches more of them than fused
AdamW, which is a launch for each group of parameters, whatever is done; what matters is that a step
does not wait for them. So the bound is on the whole step: with Muon it has at most 1.5 times the
operations that it has with AdamW, even if forward and backward pass were fused down to what no
compiler fuses, products and attention. A test holds S/2 to that.
"""

import argparse
import importlib.util
import statistics

import torch
from benchmarks.common import blocks
from benchmarks.common.memory import MIB, peak_of
from benchmarks.common.results import append_rows, as_rows, format_values, hardware
from benchmarks.common.timing import Deadline, in_turn, matmul_tflops, ratio_of, training_step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.config import OptimConfig
from complexity_dit.training.compilation import compile_network
from complexity_dit.training.optimizer import MuonWithAdamW, build_optimizer
from inl_core.run.peaks import PEAK_TFLOPS

OPTIMIZERS = ("adamw", "muon")
MODES = ("regional", "max")
"""Ways to compile, see `complexity_dit.training.compilation`."""
KINDS = ("none", "channel")
"""Without dynamics, and the default kind of coefficients in placement `branch`."""


def peak(device, quick):
    """(TFLOP/s, where the number is from): the data sheet's, or that of a large bf16 product."""
    if known := PEAK_TFLOPS.get(hardware(device)):
        return known, "of the data sheet"
    return matmul_tflops(device, 256 if quick else 8192, torch.bfloat16), "of a measured product"


def has_diffusers():
    return importlib.util.find_spec("diffusers") is not None


def build(kind, options, batch_size, mode="no"):
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
        with torch.device(device):
            model = ComplexityDiTTransformer2DModel(
                sample_size=2 * options.side, in_channels=4, hidden_size=width, num_layers=depth,
                num_attention_heads=heads, label_fields=("class",), num_classes=(1000,), **dynamics,
            )  # fmt: skip
        name, side = "model", 2 * options.side
        x, target = (
            torch.randn(batch_size, 4, side, side, generator=random).to(device) for _ in range(2)
        )
        times = (1000 * torch.rand(batch_size, generator=random)).to(device)
        labels = torch.randint(1000, (batch_size, 1), generator=random).to(device)

        def output():
            return model(x, times, labels, return_dict=False)[0]
    else:
        with torch.device(device):
            model = blocks.Stack(width, depth, heads, kind, options.side, mode == "regional")
        name, mode = "stack", "max" if mode == "max" else "no"
        x, target = (
            torch.randn(batch_size, options.side**2, width, generator=random).to(device)
            for _ in range(2)
        )
        condition = torch.randn(batch_size, width, generator=random).to(device)

        def output():
            return model(x, condition)

    compile_network(model, mode)

    def loss():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = output()
        return F.mse_loss(out.float(), target)

    return name, model.train(), loss


def step_flops(kind, options):
    """FLOPs of forward and backward of the batch, as torch counts them for one sample, eager."""
    _, _, loss = build(kind, options, 1)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return options.batch_size * counter.get_total_flops()


def held_mib(model, optimizer):
    """MiB of the parameters and of the optimizer's state."""
    tensors = [*model.parameters()]
    tensors += [t for own in optimizer.state.values() for t in own.values() if torch.is_tensor(t)]
    return sum(t.nbytes for t in tensors) / MIB


def measure(options, mode, peak_tflops, deadline):
    """Yield (case, {metric: (value, unit)}) of one size and mode, by optimizer and `KINDS`."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    steps, flops, memory, names = {}, {}, {}, {}
    for kind in KINDS:
        flops[kind] = step_flops(kind, options)
        name, model, loss = build(kind, options, options.batch_size, mode)
        for optimizer_name in OPTIMIZERS:  # of one network, which is compiled once
            key = optimizer_name, kind
            optimizer = build_optimizer(model, OptimConfig(name=optimizer_name, lr=1e-4))
            step = training_step(model, loss, clip=True, optimizer=optimizer)
            step()  # compiles, and creates the state of the optimizer
            peak_memory = peak_of(step, options.device)
            # CUDA graphs allocate when they are recorded, in the second call of the network.
            if mode != "max" or optimizer_name == OPTIMIZERS[0]:
                memory[key] = held_mib(model, optimizer) + peak_memory
            steps[key], names[key] = step, f"{name} {optimizer_name} {kind}"
            print(f"{options.size} {names[key]} {mode}: first steps done", flush=True)
    times = in_turn(steps, options.rounds, options.device, deadline=deadline)
    for optimizer_name, kind in steps:
        key = optimizer_name, kind
        seconds = statistics.median(times[key])
        used = flops[kind] / seconds / 1e12
        values = {
            "step": (seconds, "s"),
            "speed": (options.batch_size / seconds, "images/s"),
            "model FLOPs": (used, "TFLOP/s"),
            "utilisation": (used / peak_tflops[0], peak_tflops[1]),
            "peak": (peak_tflops[0], f"TFLOP/s {peak_tflops[1]}"),
            "ratio": (ratio_of(times[key], times[optimizer_name, "none"]), "x none"),
            "rounds": (len(times[key]), ""),
        }
        if key in memory:
            values["peak memory"] = (memory[key], "MiB")
        yield names[key], values


class Operations(TorchDispatchMode):
    """Counts operations that compute: no views, no allocations, no questions about a tensor."""

    FREE = (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
        "_local_scalar_dense",
    )  # fmt: skip
    WHOLE = ("mm", "addmm", "bmm", "baddbmm")
    """Products; with attention, what no compiler fuses with others."""

    def __init__(self):
        super().__init__()
        self.total = self.whole = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        asks = func.namespace == "prim" or name.startswith("sym_")
        if not (asks or func.is_view or name in self.FREE):
            self.total += 1
            self.whole += name in self.WHOLE or "attention" in name
        return func(*args, **(kwargs or {}))


def count(options, kind="channel"):
    """{optimizer: {metric: (number, unit)}} of one size, for those of the trainer and of torch."""
    with FakeTensorMode():
        _, model, loss = build(kind, options, options.batch_size)
        ours = {n: build_optimizer(model, OptimConfig(name=n, lr=1e-4)) for n in OPTIMIZERS}
        *rest, hidden = ([*group["params"]] for group in ours["muon"].param_groups)
        theirs = {
            "adamw foreach": torch.optim.AdamW(
                [{"params": [*group["params"]]} for group in ours["adamw"].param_groups],
                foreach=True,
            ),
            "muon by matrix": MuonWithAdamW(
                torch.optim.AdamW([{"params": group} for group in rest], fused=True),
                torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw"),
            ),
        }
        with Operations() as passes:
            loss().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        counts = {}
        for name, optimizer in (ours | theirs).items():
            for _ in range(2):  # the first creates the state
                with Operations() as update:
                    optimizer.step()
            counts[name] = {
                "optimizer": (update.total, "operations"),
                "step": (passes.total + update.total, "operations"),
                "products and attention": (passes.whole, "operations"),
            }
    return counts


def shape_of(options):
    width, depth, _ = blocks.SIZES[options.size]
    tokens = f"{options.batch_size}x{options.side}^2"
    return f"{options.size} {options.depth or depth}x{width} {tokens}"


def run_count(options):
    """Count, print and write the rows."""
    for size in options.sizes:
        options.size = size
        for case, values in count(options).items():
            print(f"{size} {case}: {format_values(values)}")
            if options.out:
                rows = as_rows(values, f"count {case}", shape=shape_of(options), dtype="bfloat16")
                append_rows(options.out, "train", rows, "cpu")


def run(options, deadline):
    """Measure, print, and write the rows as they are measured."""
    if not has_diffusers():
        print("diffusers is not installed: the stack of blocks is measured, not the image model")
    peak_tflops = peak(options.device, options.quick)
    print(f"peak: {peak_tflops[0]:.4g} TFLOP/s {peak_tflops[1]}", flush=True)
    for mode in options.modes:
        for size in options.sizes:
            options.size = size
            if deadline.passed():
                print(f"not measured, the time is over: {size} {mode}", flush=True)
                continue
            for case, values in measure(options, mode, peak_tflops, deadline):
                case = f"{case} {mode}"
                print(f"{size} {case}: {format_values(values)}", flush=True)
                if options.out:
                    rows = as_rows(
                        values, case, shape=shape_of(options), dtype="bfloat16", backend="auto"
                    )
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
    parser.add_argument("--modes", nargs="+", choices=(*MODES, "no"), default=MODES)
    parser.add_argument("--count", action="store_true", help="count operations, measure nothing")
    parser.add_argument("--quick", action="store_true", help="a small product for the peak")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=60, help="no new work starts after this")
    parser.add_argument("--out", help="CSV to add the rows to")
    return parser.parse_args(arguments)


def main():
    options = parse()
    if options.count:
        run_count(options)
    else:
        run(options, Deadline(options.minutes))


if __name__ == "__main__":
    main()
