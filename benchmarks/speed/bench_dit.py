"""Training speed of the image model and of diffusers' DiT of equal width, depth and tokens.

One process holds all models; their steps are timed in turn, so that a busy machine slows all of
them alike. Reports medians, and the median of the ratios to DiT within rounds. A step is forward,
backward, clipping and AdamW. `none` has the named size; with equal parameters it has a wider MLP.
diffusers' DiT has an embedding of time and label in every block, which runs once per image, a wider
MLP runs once per token, so the FLOPs of a step are reported as well, as torch counts them. Dropping
half of the tokens is compared with the same model on all tokens. Peak memory is the growth of a
fresh process with one model, eager.

    python -m benchmarks.speed.bench_dit --rows benchmarks/results.csv
    python -m benchmarks.speed.bench_dit --profile dynamics
"""

import argparse
import bisect
import multiprocessing

import torch
from benchmarks.common.diffusers_dit import DiffusersDiT
from benchmarks.common.memory import of_process, parameters
from benchmarks.common.results import append_rows, as_rows, format_values
from benchmarks.common.timing import paired, training_step
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.models.transformer import SIZES, ComplexityDiTTransformer2DModel

LABELS = {"label_fields": ["style"], "num_classes": [8]}
DYNAMICS = {"dynamics_placement": "branch", "dynamics_adaptive": "channel"}
# case: (changes of our model or None for diffusers', whether half of the tokens are dropped)
CASES = {
    "diffusers": (None, False),
    "none": ({"dynamics_placement": "none"}, False),
    "none, equal parameters": ({"dynamics_placement": "none", "mlp_ratio": "equal"}, False),
    "dynamics": (DYNAMICS, False),
    "dynamics, equal parameters": (DYNAMICS | {"mlp_ratio": "equal"}, False),
    "none, half the tokens": ({"dynamics_placement": "none"}, True),
    "dynamics, half the tokens": (DYNAMICS, True),
}
ITSELF = {"none, half the tokens": "none", "dynamics, half the tokens": "dynamics"}


def build(case, options):
    """The network of a case from one seed, with random numbers in layers initialised to zero."""
    torch.manual_seed(0)
    hidden, layers, heads = SIZES[options.size]
    shape = {
        "sample_size": options.cells, "patch_size": options.patch, "in_channels": options.channels,
        "hidden_size": hidden, "num_layers": layers, "num_attention_heads": heads, **LABELS,
    }  # fmt: skip
    changes, _ = CASES[case]
    if changes is None:
        model = DiffusersDiT(**shape)
    else:
        if changes.get("mlp_ratio") == "equal":
            changes = changes | {"mlp_ratio": equal_ratio(shape, options)}
        model = ComplexityDiTTransformer2DModel(**shape, **changes)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(options.device)


def equal_ratio(shape, options):
    """The MLP ratio, in steps of 64 units, at which our model has the parameters of DiT."""
    wanted = parameters(build("diffusers", options))

    def count(ratio):
        with torch.device("meta"):
            return parameters(
                ComplexityDiTTransformer2DModel(**shape, dynamics_placement="none", mlp_ratio=ratio)
            )

    ratios = [64 * k / shape["hidden_size"] for k in range(1, shape["hidden_size"])]
    above = bisect.bisect_left(ratios, wanted, key=count)
    return min(ratios[max(above - 1, 0) : above + 1], key=lambda r: abs(count(r) - wanted))


def stepper(case, options, compiled):
    """A function that trains for one step, and its model."""
    model = build(case, options)
    forward = torch.compile(model) if compiled else model
    batch, device = options.batch_size, options.device
    x = torch.randn(batch, options.channels, options.cells, options.cells, device=device)
    t = torch.rand(batch, device=device) * 1000
    labels = torch.randint(8, (batch, 1), device=device)
    tokens = (options.cells // options.patch) ** 2
    draw = torch.Generator().manual_seed(0)

    def loss():
        kept = {}
        if CASES[case][1]:
            kept["kept_tokens"] = draw_kept_tokens(batch, tokens, 0.5, draw).to(device)
        autocast = torch.autocast(
            torch.device(device).type, torch.bfloat16, options.dtype == "bf16"
        )
        with autocast:
            out = forward(x, t, labels, return_dict=False, **kept)[0]
        return torch.nn.functional.mse_loss(out.float(), x)

    return training_step(model, loss, clip=True), model


def step_gflops(case, options):
    """GFLOPs per image of a training step, as torch counts them."""
    step, _ = stepper(case, options, compiled=False)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / options.batch_size / 1e9


def peak_memory(case, options):
    """MiB that training the case adds to this process, which must be a fresh one."""
    if torch.device(options.device).type == "cuda":
        step, _ = stepper(case, options, compiled=False)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    torch.set_num_threads(options.threads)
    before = of_process("VmRSS")
    step, _ = stepper(case, options, compiled=False)
    for _ in range(2):
        step()
    return of_process("VmHWM") - before


def profiled(case, options, compiled):
    """The operations of three steps by time, from torch's profiler."""
    step, _ = stepper(case, options, compiled)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profile:
        for _ in range(3):
            step()
    on = "cuda" if torch.device(options.device).type == "cuda" else "cpu"
    return profile.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=25)


def measure(options, compiled):
    """{case: (seconds, ratio of speed to DiT, ratio to the same model on all tokens)}."""
    torch.compiler.reset()  # all models together exceed the limit of recompilations
    steps = {case: stepper(case, options, compiled)[0] for case in options.cases}
    found = paired(steps, options.rounds, options.device, rotate=True)
    itself = {}
    for case, whole in ITSELF.items():
        if case in steps and whole in steps:
            pair = {whole: steps[whole], case: steps[case]}
            itself[case] = 1 / paired(pair, options.rounds, options.device, rotate=True)[case][1]
    return {
        case: (seconds, 1 / ratio, itself.get(case)) for case, (seconds, ratio) in found.items()
    }


def main():
    """Print one table; `--rows` adds it to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--cells", type=int, default=16, help="side of the input")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--modes", nargs="+", default=["compiled", "eager"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--profile", choices=CASES, help="print a profile of this case only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    options.threads = torch.get_num_threads()
    if options.profile:
        for mode in options.modes:
            table = profiled(options.profile, options, compiled=mode == "compiled")
            print(f"{options.profile}, {mode}\n{table}")
        return

    spawn = multiprocessing.get_context("spawn")
    memory = {}
    for case in options.cases:
        with spawn.Pool(1) as one:
            memory[case] = one.apply(peak_memory, (case, options))
    shape = (
        f"{options.size}/{options.patch} {options.batch_size}x{options.channels}x"
        f"{options.cells}x{options.cells}"
    )
    counts = {case: parameters(build(case, options)) for case in options.cases}
    gflops = {case: step_gflops(case, options) for case in options.cases}
    for mode in options.modes:
        rows = []
        for case, (seconds, ratio, itself) in measure(options, mode == "compiled").items():
            speed = options.batch_size / seconds
            values = {
                "speed": (speed, "images/s"),
                "speed ratio": (ratio, "x diffusers"),
                "parameters": (counts[case], ""),
                "work of a step": (gflops[case], "GFLOP/image"),
                "peak memory, eager": (memory[case], "MiB"),
            }
            if itself is not None:
                values["over all tokens"] = (itself, "x itself")
            print(f"{mode:9} {case:26} {format_values(values)}", flush=True)
            rows += as_rows(values, f"{case}, {mode}", shape=shape, dtype=options.dtype)
        if options.rows:
            append_rows(options.rows, "bench_dit", rows, options.device)


if __name__ == "__main__":
    main()
