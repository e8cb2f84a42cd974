"""Any-time models: one layer in the middle is repeated more, or less, often than in training.

    python -m benchmarks.study.any_time lm  --out runs/any-time-lm  --rows benchmarks/results.csv
    python -m benchmarks.study.any_time dit --out runs/any-time-dit --rows benchmarks/results.csv

Three layers, of which the one in the middle is applied `LOOPS` times in training. Measured are, of
the language model, bits per byte of held-out text after 1 to four times as many repetitions, and of
the image model FID and KID of samples at half, equal and double the number. The arms are those of
`loops`, and two more:

sampled            `plain`, trained with a number of repetitions drawn for each step, mean `LOOPS`
velocity, sampled  `velocity`, trained likewise

`unshared` has a layer of its own for each repetition, for the same FLOPs, and is measured as
trained. In the language model all other arms have the parameters of `velocity`, by the width of the
MLP; in the image model, whose widths are multiples of 64, `spring` and `recall`, which project the
input, have 1 % more.

Runs with rows are not repeated, and the same command continues a stopped one. The first of --arms
is run with all seeds before the next.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

from benchmarks.common.fields import overridden, override_flag, with_fields
from benchmarks.common.memory import parameters
from benchmarks.common.results import dtype_of, read_rows, run_missing
from benchmarks.study.any_time_report import ARMS, COUNTS, LOOPS, SAMPLED, curves, draw
from benchmarks.theory.physics_report import known_of


class LanguageModel:
    """2.0 million parameters on the source of Python's standard library, or another text."""

    source, steps = "stdlib", 600
    fields = {  # noqa: RUF012
        "batch_size": 16, "eval_every": 0, "keep_last": 1, "dynamics_every": 0,
        "report_to": "none", "mixed_precision": "bf16", "compile": False,
        "data.context": 256, "tokenizer.vocab_size": 4096, "optim.lr": 3e-3,
        "optim.schedule": "cosine", "model.dynamics_placement": "none",
    }  # fmt: skip
    shape = {  # noqa: RUF012
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3,
    }  # fmt: skip

    def config(self, base):
        """The config of an arm, without what both models have in common."""
        from complexity_lm.config import TrainConfig

        shape = dict(self.shape)
        if base in ("spring", "recall"):
            # Their projection has hidden_size² numbers, a unit of the MLPs 3 · hidden_size a layer.
            shape["intermediate_size"] -= round(shape["hidden_size"] / 3 / 3)
        if base == "unshared":
            shape["num_hidden_layers"] = LOOPS + 2
        return with_fields(TrainConfig(), self.fields | {"model.overrides": shape})

    def train(self, config, swap):
        from benchmarks.study.variants_lm import varied_build

        from complexity_lm.train import train

        train(config, varied_build(swap))

    def measured(self, config, swap, counts, options):
        """Bits per byte at each number of repetitions, and the number of parameters."""
        from complexity_lm.config import EvalConfig
        from complexity_lm.evaluate import evaluate
        from complexity_lm.loading import load

        loaded = load(config.out)  # of a variant by the name in its config
        found = {"parameters": (parameters(loaded.model), "")}
        for count in counts:
            how = EvalConfig(num_loops=count, quiet=True, max_documents=options.documents)
            metrics = evaluate(loaded, config.data.source, config=how)["metrics"]
            found[f"bits per byte, {count or LOOPS} loops"] = (metrics["bits_per_byte"], "")
        return found


class ImageModel:
    """1.1 million parameters on paintings of 32 pixels: the embedded set, or a folder."""

    source, steps = "art", 1200
    fields = {  # noqa: RUF012
        "batch_size": 32, "keep_last": 1, "dynamics_every": 0, "noise_bins": 0,
        "report_to": "none", "mixed_precision": "bf16", "compile": "no",
        "data.resolution": 32, "data.label_fields": ["style"], "data.holdout": 0.2,
        "model.size": "nano", "model.patch_size": 4, "optim.lr": 3e-3,
        "optim.schedule": "cosine", "model.dynamics_placement": "none",
    }  # fmt: skip

    def config(self, base):
        """The config of an arm, without what both models have in common."""
        from complexity_dit.config import TrainConfig

        layers = LOOPS + 2 if base == "unshared" else 3
        return with_fields(TrainConfig(), self.fields | {"model.overrides": {"num_layers": layers}})

    def train(self, config, swap):
        from benchmarks.study.variants_dit import varied_build

        from complexity_dit.training.train import train

        train(config, varied_build(swap))

    def measured(self, config, swap, counts, options):
        """FID and KID at each number of repetitions, and the number of parameters."""
        from benchmarks.common.painting import painting
        from benchmarks.study.variants_dit import varied_dit

        from complexity_dit.config import EvalConfig
        from complexity_dit.evaluation.evaluate import evaluate
        from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline

        folder = Path(config.out) / "pipeline"
        network = varied_dit(swap).from_pretrained(folder / "transformer").eval()
        pipe = ComplexityDiTPipeline.from_pretrained(folder, transformer=network)
        found = {"parameters": (parameters(network), "")}
        how = EvalConfig.brief(num_images=options.num_images, weights=options.weights, quiet=True)
        for count in counts:
            out = Path(config.out) / f"evaluation-{count or LOOPS}"
            if not (out / "result.json").exists():
                sampling = painting(num_inference_steps=options.evaluations, num_loops=count)
                evaluate(pipe, config.data.source, out, how, sampling, config.data)
            metrics = json.loads((out / "result.json").read_text())["metrics"]
            for name, value in metrics.items():
                found[f"{name}, {count or LOOPS} loops"] = (value, "")
        return found


MODELS = {"lm": LanguageModel(), "dit": ImageModel()}


def config_of(model, arm, seed, options):
    """The config of a run, and the name of the variant that makes its network, or None."""
    base = SAMPLED.get(arm, arm)
    own = {
        "out": str(options.out / re.sub(r"\W+", "-", arm) / f"seed-{seed}"),
        "seed": seed, "resume": "auto", "steps": options.steps,
        "checkpoint_every": max(1, options.steps // 4),
        "optim.warmup_steps": options.steps // 10,
        "loop_sampling": "uniform" if arm in SAMPLED else "fixed",
        "data.source": options.source,
        "model.num_loops": 1 if base == "unshared" else LOOPS,
    }  # fmt: skip
    if base == "plain":
        own["model.overrides.loop_dynamics"] = False
    config = with_fields(model.config(base), own | overridden(options.override))
    return config, None if base in ("plain", "unshared", "velocity") else f"loop, {base}"


def run(name, arm, seed, options):
    """Train one network, or continue, and measure it; returns its metrics."""
    model = MODELS[name]
    config, swap = config_of(model, arm, seed, options)
    start = time.perf_counter()
    model.train(config, swap)
    trained = time.perf_counter()
    found = model.measured(config, swap, COUNTS[name] if arm != "unshared" else (None,), options)
    return found | {
        "training": (trained - start, "s"),
        "measuring": (time.perf_counter() - trained, "s"),
    }


def main():
    """Run what has no rows yet, print the table of all rows, and draw the figure if asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--source", help="as of the trainer; default: stdlib, or art")
    parser.add_argument("--steps", type=int, help="default: 600 of the text, 1200 of the images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this")
    parser.add_argument("--documents", type=int, default=16, help="lm: held-out documents")
    parser.add_argument("--num_images", type=int, default=1024, help="dit: n of FID and KID")
    parser.add_argument("--evaluations", type=int, default=10, help="dit: of the network, an image")
    parser.add_argument("--weights", default="auto", help="dit: of the feature network")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--rows", help="CSV to add the rows to; runs that it has are skipped")
    parser.add_argument("--figure", help="PNG of the curves over the repetitions")
    options = parser.parse_args()
    model, bench = MODELS[options.model], f"any_time_{options.model}"
    options.source = options.source or model.source
    options.steps = options.steps or model.steps
    scheme, _, path = options.source.partition(":")
    data = Path(path).stem or scheme
    measured, amounts = (
        (f"{options.documents} documents", f"--documents {options.documents}")
        if options.model == "lm"
        else (
            f"n {options.num_images}, {options.evaluations} evaluations",
            f"--num_images {options.num_images} --evaluations {options.evaluations}",
        )
    )
    known = known_of(row for row in read_rows(options.rows or "") if row["bench"] == bench)
    cases = []
    for arm in options.arms:
        for seed in range(options.seeds):
            config, _ = config_of(model, arm, seed, options)
            amount = f"{data}, {options.steps} steps of {config.batch_size}, {measured}"
            case = f"{', '.join([amount, *options.override])} / {arm} / seed {seed}"
            columns = {"dtype": dtype_of(config.mixed_precision)}
            cases.append((case, (options.model, arm, seed, options), columns))
    source = f"{scheme}:{Path(path).name}".rstrip(":")
    command = (
        f"python -m benchmarks.study.any_time {options.model} --source {source} "
        f"--steps {options.steps} {amounts}{override_flag(options.override)}"
    )
    run_missing(bench, run, cases, known, options, command)
    print("\n".join(curves(known)))
    if options.figure:
        draw(known, options.figure)


if __name__ == "__main__":
    main()
