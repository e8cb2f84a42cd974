"""Time of training steps with dynamics, and of routed MLPs, relative to plain ones.

    python -m benchmarks.speed.bench_tax --out benchmarks/results.csv

A stack of compiled transformer blocks with each kind of coefficients is compared with `none`: one
step of each in turn, the median of the ratios within rounds. A token-routed MLP (with its shared
expert, one plan for all calls) is compared with a dense MLP of the same active width and a loop
over experts, forward and backward.
"""

import argparse

import torch
from benchmarks.common import blocks
from benchmarks.common.memory import parameters
from benchmarks.common.results import append_rows
from benchmarks.common.timing import Deadline, paired
from benchmarks.speed.op_cases import mask_loop
from torch import nn

from inl_core import TokenRoutedMLP, make_routing_plan, ops


def stack_tax(size, batch_size, side, kinds, rounds, device, dtype, compiled, deadline):
    """Yield (kind, values): time of a step and number of parameters, with ratios to `none`."""
    width, depth, heads = size
    torch.compiler.reset()
    random = torch.Generator().manual_seed(0)
    batch = [
        torch.randn(*shape, generator=random).to(device)
        for shape in ((batch_size, side * side, width), (batch_size, width))
    ]

    def build(kind):
        model = blocks.Stack(width, depth, heads, kind, side, compiled).to(device)
        return blocks.batch_step(model, batch, dtype), parameters(model)

    plain, plain_parameters = build("none")
    for kind in kinds:
        if deadline.passed():
            print(f"not measured, the time is over: {kind}", flush=True)
            continue
        # Two models at a time: five of the largest do not fit on a GPU.
        step, own_parameters = build(kind)
        times = paired({"none": plain, kind: step}, rounds, device, deadline=deadline)
        seconds, ratio = times[kind]
        yield (
            kind,
            [
                ("none, same rounds", times["none"][0], "s"),
                ("step", seconds, "s"),
                ("ratio", ratio, "x none"),
                ("parameters", own_parameters / plain_parameters, "x none"),
            ],
        )


class Routed(nn.Module):
    def __init__(self, width, inner, experts, plan):
        super().__init__()
        self.mlp, self.plan = TokenRoutedMLP(width, inner, experts), plan

    def forward(self, x):
        return self.mlp(x, self.plan)


class MaskLoop(Routed):
    """The same weights, one expert after the other on the rows that a mask selects."""

    def forward(self, x):
        mlp = self.mlp
        rows = mask_loop(x, self.plan, mlp.gate, mlp.up, mlp.down)
        inner = ops.swiglu(x @ mlp.shared_gate.T, x @ mlp.shared_up.T)
        return rows + inner @ mlp.shared_down.T


def routing_cost(tokens, width, inner, experts, rounds, device, dtype, compiled, deadline):
    """{name: (seconds, ratio to the dense MLP)} of forward and backward."""
    random = torch.Generator().manual_seed(0)
    plan = make_routing_plan(torch.randint(experts, (tokens,), generator=random), experts)
    plan = type(plan)(*(t.to(device) for t in plan))
    x = torch.randn(tokens, width, generator=random).to(device, dtype).requires_grad_()
    down = torch.randn(tokens, width, generator=random).to(device, dtype)
    modules = {
        "dense": blocks.Mlp(width, 2 * inner),
        "routed": Routed(width, inner, experts, plan),
        "mask loop": MaskLoop(width, inner, experts, plan),
    }
    if compiled:
        for name in ("dense", "routed"):
            modules[f"{name}, compiled"] = torch.compile(modules[name], fullgraph=True)

    def both(module):
        module.to(device, dtype)
        return lambda: torch.autograd.grad(module(x), [x, *module.parameters()], down)

    functions = {name: both(module) for name, module in modules.items()}
    return paired(functions, rounds, device, deadline=deadline)


def run(options, deadline):
    """Measure, print, and write the rows as they are measured."""
    device, dtype = options.device, getattr(torch, options.dtype)
    compiled = "eager" if options.eager else "compiled"

    def write(rows):
        for row in rows:
            print(f"{row['case']:34} {row['shape']:26} {row['metric']:18} {row['value']:.4g}")
        if options.out:
            append_rows(options.out, "tax", rows, device)

    def row(case, shape, metric, value, unit):
        return {
            "case": case, "shape": shape, "dtype": options.dtype,
            "backend": ops.current_backend(), "metric": metric, "value": value, "unit": unit,
        }  # fmt: skip

    for size in options.sizes:
        width, depth, heads = blocks.SIZES[size]
        depth = options.depth or depth
        shape = f"{size} {depth}x{width} {options.batch_size}x{options.side}^2"
        found = stack_tax(
            (width, depth, heads), options.batch_size, options.side, options.kinds,
            options.rounds, device, dtype, not options.eager, deadline,
        )  # fmt: skip
        for kind, values in found:
            write([row(f"stack {compiled} {kind}", shape, *value) for value in values])
    if options.routing and not deadline.passed():
        tokens, width, inner, experts = options.routing
        shape = f"{tokens} tokens, {width}, {inner} + {inner}, {experts} experts"
        times = routing_cost(
            tokens, width, inner, experts, options.rounds, device, dtype, not options.eager,
            deadline,
        )  # fmt: skip
        for case, (seconds, ratio) in times.items():
            write([
                row(f"mlp {case}", shape, "step", seconds, "s"),
                row(f"mlp {case}", shape, "ratio", ratio, "x dense"),
            ])  # fmt: skip


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", choices=blocks.SIZES, default=["S/2"])
    parser.add_argument("--depth", type=int, help="layers; default: the size's own")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--side", type=int, default=8, help="tokens per side of a sample")
    parser.add_argument("--kinds", nargs="+", choices=blocks.KINDS, default=list(blocks.KINDS[1:]))
    parser.add_argument(
        "--routing", type=int, nargs=4, metavar=("TOKENS", "WIDTH", "INNER", "EXPERTS"),
        default=[2048, 384, 512, 8], help="sizes of the routed MLP",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=["auto", "reference", "triton"], default="auto")
    parser.add_argument("--minutes", type=float, default=60, help="no new work starts after this")
    parser.add_argument("--out", help="CSV to add the rows to")
    return parser.parse_args(arguments)


def main():
    options = parse()
    with ops.use_backend(options.backend):
        run(options, Deadline(options.minutes))


if __name__ == "__main__":
    main()
