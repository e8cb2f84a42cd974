"""Cost of a loop at equal FLOPs: step time, memory and decoding of both models, compiled.

    python -m benchmarks.speed.bench_loops --rows benchmarks/results.csv

A core of one layer, or more, between two others is applied six times, as a plain loop and with the
velocity that `LoopedDynamics` carries; `unshared` is the stack that it unrolls to, a layer of its
own for each repetition. All are compiled layer by layer, as the trainers compile a loop and image
models. Decoding is greedy into a static cache, compiled whole, which unrolls the loop. The steps of
all cases are taken in turn, so that a busy machine slows all of them alike: medians, and the median
of the ratios to `unshared` within rounds. Memory is the peak of a step in addition to weights and
optimizer state, FLOPs are of matrix products and attention, of one forward pass of the batch.
"""

import argparse
import statistics
import time

import torch
from benchmarks.common.memory import parameters, peak_of
from benchmarks.common.results import append_rows, as_rows, commit, format_values
from benchmarks.common.timing import DEVICE, in_turn, paired, ratio_of, training_step
from benchmarks.speed.bench_lm import decoder
from benchmarks.speed.bench_placements import DIT, LM
from torch.utils.flop_counter import FlopCounterMode

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_lm import DeepConfig, DeepForCausalLM
from complexity_lm.trainer import compile_layers

LOOPS = 6
CASES = ("unshared", "plain loop", "velocity loop")


def stack(case, core, layers):
    """The fields of a config; `layers` is the name of its number of layers."""
    fields = {"dynamics_placement": "none"}
    if case == "unshared":
        return fields | {layers: 2 + LOOPS * core}
    return fields | {
        layers: 2 + core, "num_loops": LOOPS, "loop_dynamics": case == "velocity loop",
    }  # fmt: skip


def language_model(case, core):
    torch.manual_seed(0)
    return DeepForCausalLM(DeepConfig(**(LM | stack(case, core, "num_hidden_layers"))))


def language_trainer(case, core, options):
    """A network and a function that returns its loss."""
    model = language_model(case, core).to(options.device)
    if not options.eager:
        compile_layers(model)
    ids = torch.randint(LM["vocab_size"], (options.texts, options.context), device=options.device)
    return model, lambda: model(ids, labels=ids, use_cache=False).loss


def image_trainer(case, core, options):
    """A network and a function that returns its loss."""
    torch.manual_seed(0)
    model = ComplexityDiTTransformer2DModel.from_size(
        "tiny", **DIT, **stack(case, core, "num_layers")
    ).to(options.device)
    if not options.eager:
        model.compile_repeated_blocks(fullgraph=True)
    x = torch.randn(options.images, 32, 16, 16, device=options.device)
    times = torch.rand(options.images, device=options.device) * 1000
    labels = torch.zeros(options.images, 1, dtype=torch.long, device=options.device)
    return model, lambda: model(x, times, labels, return_dict=False)[0].square().mean()


TRAINERS = {"lm": language_trainer, "dit": image_trainer}


def started(works):
    """Call each function once, which compiles it, and print how long that takes."""
    for name, work in works.items():
        start = time.perf_counter()
        work()
        print(f"  {name}: first call {time.perf_counter() - start:.1f} s", flush=True)
    return works


def trained(name, core, options):
    """{case: {metric: (value, unit)}} of training steps."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # one code for the layers of every case
    built = {case: TRAINERS[name](case, core, options) for case in CASES}
    flops = {}
    for case, (_, loss) in built.items():
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            loss()
        flops[case] = counter.get_total_flops() / 1e9
    steps = {case: training_step(model, loss) for case, (model, loss) in built.items()}
    times = paired(started(steps), options.rounds, options.device, warm_up=1, rotate=True)
    memory = {case: peak_of(step, options.device) for case, step in steps.items()}
    return {
        case: {
            "forward": (flops[case], "GFLOP"),
            "step": (1000 * seconds, "ms"),
            "ratio": (ratio, "x unshared"),
            "memory of a step": (memory[case], "MiB"),
            "memory ratio": (memory[case] / memory["unshared"], "x unshared"),
            "parameters": (parameters(built[case][0]), ""),
        }
        for case, (seconds, ratio) in times.items()
    }


def decoded(core, options):
    """{case: {metric: (value, unit)}} of greedy decoding by the language model."""
    torch.compiler.reset()
    prompt = torch.randint(LM["vocab_size"], (1, 16), device=options.device)
    works = {
        case: decoder(
            language_model(case, core).to(options.device), prompt, options.new_tokens,
            not options.eager,
        )
        for case in CASES
    }  # fmt: skip
    times = in_turn(started(works), options.rounds, options.device, warm_up=1, rotate=True)
    return {
        case: {
            "decode": (1000 * statistics.median(own) / options.new_tokens, "ms a token"),
            "decode ratio": (ratio_of(own, times["unshared"]), "x unshared"),
        }
        for case, own in times.items()
    }


def main():
    """Print one line per case; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--cores", nargs="+", type=int, default=[1], help="layers in the loop")
    parser.add_argument("--images", type=int, default=32, help="dit: images per batch")
    parser.add_argument("--texts", type=int, default=8, help="lm: texts per batch")
    parser.add_argument("--context", type=int, default=256, help="lm: tokens per text")
    parser.add_argument("--new_tokens", type=int, default=32, help="lm: tokens decoded")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from, rows = commit(), []
    mode = "eager" if options.eager else "compiled"
    sizes = {
        "dit": f"tiny/2 {options.images}x32x16x16",
        "lm": f"{LM['hidden_size']} {options.texts}x{options.context} tokens",
    }
    for name in options.models:
        for core in options.cores:
            print(f"{name}, core of {core}, {mode}", flush=True)
            found = trained(name, core, options)
            if name == "lm":
                for case, values in decoded(core, options).items():
                    found[case] |= values
            for case, values in found.items():
                full = f"{name}, core of {core}, {case}, {mode}"
                print(f"{full:42} {format_values(values)}", flush=True)
                rows += as_rows(values, full, shape=sizes[name])
    if options.rows:
        append_rows(options.rows, "loop_cost", rows, options.device, commit=started_from)


if __name__ == "__main__":
    main()
