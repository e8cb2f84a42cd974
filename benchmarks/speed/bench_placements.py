"""Step time, memory and parameters of both models with each placement, relative to `none`.

    python -m benchmarks.speed.bench_placements --rows benchmarks/results.csv

The image model (`tiny`, 64 tokens of 2x2 latents) and a language model of as many blocks train on
one batch, compiled as in their trainers. The steps of all cases of a model are taken in turn, so
that a busy machine slows all of them alike: medians, and the median of the ratios to `none` within
rounds. Memory is the peak of a step in addition to weights and optimizer state.
"""

import argparse

import torch
from benchmarks.common.memory import parameters, peak_of
from benchmarks.common.results import append_rows, as_rows, commit, format_values
from benchmarks.common.timing import DEVICE, paired, training_step

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_lm import DeepConfig, DeepForCausalLM

# Placement and kind of coefficients; after `none`, the first is the demo's of each model.
CASES = {
    "dit": ("none", "branch channel", "branch token", "stream channel", "force channel",
            "force_mlp channel"),
    "lm": ("none", "force_mlp channel", "branch channel", "branch token", "stream token",
           "force token"),
}  # fmt: skip
DIT = {"sample_size": 16, "patch_size": 2, "in_channels": 32, "label_fields": ["style"],
       "num_classes": [8]}  # fmt: skip
LM = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
      "num_attention_heads": 6, "num_key_value_heads": 3, "num_experts": 0}  # fmt: skip


def settings(case):
    """The config fields of a case."""
    placement, _, kind = case.partition(" ")
    return {"dynamics_placement": placement} | ({"dynamics_adaptive": kind} if kind else {})


def image_model(case, options):
    """A network and a function that returns its loss."""
    model = ComplexityDiTTransformer2DModel.from_size("tiny", **DIT, **settings(case))
    if not options.eager:
        model.compile_repeated_blocks(fullgraph=True)
    x = torch.randn(options.images, 32, 16, 16, device=options.device)
    times = torch.rand(options.images, device=options.device) * 1000
    labels = torch.zeros(options.images, 1, dtype=torch.long, device=options.device)
    return model, lambda: model(x, times, labels, return_dict=False)[0].square().mean()


def language_model(case, options):
    """A network and a function that returns its loss."""
    model = DeepForCausalLM(DeepConfig(**LM, **settings(case)))
    forward = model if options.eager else torch.compile(model)
    ids = torch.randint(LM["vocab_size"], (options.texts, options.context), device=options.device)
    return model, lambda: forward(ids, labels=ids, use_cache=False).loss


BUILD = {"dit": image_model, "lm": language_model}


def trainer(build, case, options):
    """A network and a function that trains it for one step."""
    torch.manual_seed(0)
    model, loss = build(case, options)
    return model, training_step(model.to(options.device), loss)


def measured(name, options):
    """{case: {metric: (value, unit)}} of one model."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # one code for the blocks of every case
    trained = {case: trainer(BUILD[name], case, options) for case in CASES[name]}
    steps = {case: step for case, (_, step) in trained.items()}
    times = paired(steps, options.rounds, options.device, rotate=True)
    memory = {case: peak_of(step, options.device) for case, step in steps.items()}
    sizes = {case: parameters(model) for case, (model, _) in trained.items()}
    return {
        case: {
            "step": (1000 * seconds, "ms"),
            "ratio": (ratio, "x none"),
            "memory of a step": (memory[case], "MiB"),
            "memory ratio": (memory[case] / memory["none"], "x none"),
            "parameters": (sizes[case], ""),
            "parameter ratio": (sizes[case] / sizes["none"], "x none"),
        }
        for case, (seconds, ratio) in times.items()
    }


def main():
    """Print one line per case; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", type=int, default=32, help="dit: images per batch")
    parser.add_argument("--texts", type=int, default=8, help="lm: texts per batch")
    parser.add_argument("--context", type=int, default=256, help="lm: tokens per text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from = commit()
    for name in options.models:
        shape = {
            "dit": f"tiny/2 {options.images}x32x16x16",
            "lm": f"{LM['num_hidden_layers']}x{LM['hidden_size']} "
            f"{options.texts}x{options.context} tokens",
        }[name]
        rows = []
        for case, values in measured(name, options).items():
            print(f"{name} {case:18} {format_values(values)}", flush=True)
            mode = "eager" if options.eager else "compiled"
            rows += as_rows(values, f"{name} {case}, {mode}", shape=shape)
        if options.rows:
            append_rows(options.rows, "placements", rows, options.device, commit=started_from)


if __name__ == "__main__":
    main()
