"""FID of one checkpoint per scheduler, number of network evaluations and guidance interval.

    python -m benchmarks.recipe.sampler_table PIPELINE --reference imagefolder:PATH --out DIR

First every scheduler with every number of network evaluations, without guidance; then guidance
within intervals of noise levels. Evaluations are counted during sampling: a step of Heun takes two
and a guided one twice as many, so Heun gets the largest number of steps within the budget, and
guided lines report their number. Results in `--out` are read and not measured again.
"""

import argparse
import json
from pathlib import Path

from benchmarks.common.painting import painting
from benchmarks.common.results import append_rows, as_rows, commit, format_values

from complexity_dit.config import EvalConfig
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.pipelines.schedulers import count_evaluations, named_scheduler

SCHEDULERS = {
    "Euler": "FlowMatchEulerDiscreteScheduler",
    "Heun": "FlowMatchHeunDiscreteScheduler",
    "DPM-Solver++ 2M": "DPMSolverMultistepScheduler",
}


def steps_within(scheduler, evaluations):
    """The largest number of steps within a budget of evaluations, without guidance."""
    steps = evaluations
    while steps > 1 and count_evaluations(scheduler, steps) > evaluations:
        steps -= 1
    return steps


def cases(scheduler, options):
    """{name: sampling config}: the grid of schedulers, then that of guidance."""
    table = {}
    for name, cls in SCHEDULERS.items():
        solver = named_scheduler(scheduler, cls, options.shift)
        for evaluations in options.evaluations:
            table[f"{name} {evaluations}"] = painting(
                num_inference_steps=steps_within(solver, evaluations),
                scheduler=cls,
                shift=options.shift,
                guidance_scale=1.0,
            )
    for scale in options.scales:
        for interval in options.intervals:
            low, high = (float(level) for level in interval.split("-"))
            table[f"Euler {options.guided_steps} steps, guidance {scale:g} in {low:g}-{high:g}"] = (
                painting(
                    num_inference_steps=options.guided_steps,
                    scheduler=SCHEDULERS["Euler"],
                    shift=options.shift,
                    guidance_scale=scale,
                    guidance_interval=(low, high),
                )
            )
    return table


def main():
    """Measure missing cases and print all; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=1024, help="n of FID and KID")
    parser.add_argument("--evaluations", type=int, nargs="*", default=[5, 10, 20, 50])
    parser.add_argument("--shift", type=float, help="time shift; by default the pipeline's")
    parser.add_argument("--scales", type=float, nargs="*", default=[1.5, 2.0])
    parser.add_argument("--intervals", nargs="*", default=["0-1", "0.2-0.8", "0-0.6"])
    parser.add_argument("--guided_steps", type=int, default=20)
    parser.add_argument("--weights", default="auto", help="of the feature network")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    measured = EvalConfig.brief(num_images=options.num_images, weights=options.weights, quiet=True)
    started_from = commit()
    for case, sampling in cases(load_pipeline(options.pipeline).scheduler, options).items():
        out = options.out / case.replace(" ", "_").replace(",", "")
        written = out / "result.json"
        fresh = not written.exists()
        if fresh:
            evaluate(options.pipeline, options.reference, out, measured, sampling)
        result = json.loads(written.read_text())
        metrics = {"evaluations": result["settings"]["network_evaluations"], **result["metrics"]}
        values = {name: (value, "") for name, value in metrics.items()}
        print(f"{case}: {format_values(values)}", flush=True)
        if options.rows and fresh:
            shift = result["settings"]["scheduler"]
            shift = shift.get("flow_shift", shift.get("shift"))
            append_rows(
                options.rows,
                "sampler",
                as_rows(values, case, shape=f"n {options.num_images}, shift {shift:g}"),
                command="python -m benchmarks.recipe.sampler_table PIPELINE --reference PICTURES",
                commit=started_from,
            )


if __name__ == "__main__":
    main()
