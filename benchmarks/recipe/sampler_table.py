"""FID of one checkpoint per scheduler, number of network evaluations, and guidance.

    python -m benchmarks.recipe.sampler_table PIPELINE --reference imagefolder:PATH --out DIR
    python -m benchmarks.recipe.sampler_table PIPELINE … --evaluations --guide EARLY
    python -m benchmarks.recipe.sampler_table PIPELINE … --evaluations --kinds "internal guidance"

First every scheduler with every number of network evaluations, without guidance. Then guidance of
every kind that the checkpoint has, with every scale and interval of noise levels: away from the
null rows, away from the earlier checkpoint `--guide` (autoguidance), away from the auxiliary output
(internal guidance). Each of the `--bisections` then tries, for the best scale of a kind, two lower
edges of the interval: halfway between the best edge so far and its neighbours.

Evaluations are counted during sampling: a step of Heun takes two and a guided one twice as many, so
Heun gets the largest number of steps within the budget, and guided lines report their number.

A line is printed as soon as it is measured and kept in `--out`: the same command continues after a
kill, in the middle of a line too, and reads what is there. Features of the reference are computed
once. On one core, n = 2,048 takes minutes a line: search with a small `--num_images` and another
`--out`, then measure the best scales and intervals alone.

`--recommend` saves the best guidance that needs no other network in the pipeline, whose calls use
it from then on.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.painting import painting
from benchmarks.common.results import append_rows, as_rows, commit, format_values

from complexity_dit.config import GUIDANCE, EvalConfig
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.pipelines.sampling import find_pipeline, load_pipeline, recorded
from complexity_dit.pipelines.schedulers import count_evaluations, named_scheduler

SCHEDULERS = {
    "Euler": "FlowMatchEulerDiscreteScheduler",
    "Heun": "FlowMatchHeunDiscreteScheduler",
    "DPM-Solver++ 2M": "DPMSolverMultistepScheduler",
}
KINDS = ("guidance", "autoguidance", "internal guidance")
HIGHEST_EDGE = 0.9
"""The next lower edge after the largest given one, for the bisection."""


def steps_within(scheduler, evaluations):
    """The largest number of steps within a budget of evaluations, without guidance."""
    steps = evaluations
    while steps > 1 and count_evaluations(scheduler, steps) > evaluations:
        steps -= 1
    return steps


def unguided(scheduler, options):
    """{name: sampling config}: the grid of schedulers; last, what guidance is compared with."""
    table = {}
    for name, cls in SCHEDULERS.items():
        solver = named_scheduler(scheduler, cls, options.shift)
        for evaluations in options.evaluations:
            table[f"{name} {evaluations}"] = painting(
                num_inference_steps=steps_within(solver, evaluations),
                scheduler=cls,
                shift=options.shift,
            )
    plain = painting(
        num_inference_steps=options.guided_steps,
        scheduler=SCHEDULERS["Euler"],
        shift=options.shift,
    )
    return table | {f"Euler {options.guided_steps}": plain}


def kinds_of(pipe, options):
    """{kind of guidance: its scale as a field of the sampling config, with what else it needs}."""
    kinds = {}
    if pipe.transformer.config.label_fields:
        kinds["guidance"] = lambda scale: {"guidance_scale": scale}
    if options.guide:
        kinds["autoguidance"] = lambda scale: {
            "guidance_scale": scale,
            "autoguidance": options.guide,
        }
    if pipe.transformer.config.get("auxiliary_layer"):
        kinds["internal guidance"] = lambda scale: {"internal_guidance_scale": scale}
    return {kind: fields for kind, fields in kinds.items() if kind in options.kinds}


def guided(options, kind, fields, scale, interval):
    """Name and sampling config of one line of guidance."""
    low, high = interval
    name = f"Euler {options.guided_steps} steps, {kind} {scale:g} in {low:g}-{high:g}"
    return name, painting(
        num_inference_steps=options.guided_steps,
        scheduler=SCHEDULERS["Euler"],
        shift=options.shift,
        guidance_interval=interval,
        **fields(scale),
    )


def better_edges(values):
    """Two lower edges to try next, from {edge: distance}: halfway to the best one's neighbours."""
    edges = sorted(values)
    best = edges.index(min(edges, key=values.get))
    ends = [*edges, max(HIGHEST_EDGE, edges[-1])]
    around = {ends[max(best - 1, 0)], ends[best + 1]} - {edges[best]}
    return [round((edge + edges[best]) / 2, 4) for edge in sorted(around)]


def kept_result(path, **settings):
    """A result of an earlier call, which must be one of these settings."""
    result = json.loads(path.read_text())
    asked = json.loads(json.dumps(settings))
    other = [name for name in asked if result["settings"][name] != asked[name]]
    if other:
        raise SystemExit(f"{path} has another {' and '.join(other)}: choose another --out")
    return result


def main():
    """Measure missing cases and print all; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=2048, help="n of FID and KID")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, metavar="KIND")
    parser.add_argument("--evaluations", type=int, nargs="*", default=[5, 10, 20, 50])
    parser.add_argument("--shift", type=float, help="time shift; by default the pipeline's")
    parser.add_argument("--scales", type=float, nargs="*", default=[1.5, 2.0, 3.0])
    parser.add_argument("--intervals", nargs="*", default=["0-1", "0.3-1"])
    parser.add_argument("--guided_steps", type=int, default=20)
    parser.add_argument("--guide", help="an earlier checkpoint of the same run, for autoguidance")
    parser.add_argument("--bisections", type=int, default=0, help="of the interval's lower edge")
    parser.add_argument("--weights", default="auto", help="of the feature network")
    parser.add_argument("--name", help="what the pipeline is, for the rows")
    parser.add_argument("--rows", help="CSV to add the rows to")
    parser.add_argument("--recommend", action="store_true", help="save the best in the pipeline")
    options = parser.parse_args()

    started_from, pipe = commit(), load_pipeline(options.pipeline)
    measured = EvalConfig.brief(num_images=options.num_images, weights=options.weights, quiet=True)

    def distance(case, sampling):
        """The first distance of one case, from its result if there is one."""
        out = options.out / case.replace(" ", "_").replace(",", "")
        written = out / "result.json"
        fresh = not written.exists()
        if fresh:
            evaluate(options.pipeline, options.reference, out, measured, sampling)
        result = kept_result(
            written,
            target=options.pipeline,
            reference=options.reference,
            eval=asdict(measured),
            sample=recorded(sampling),
        )
        metrics = {"evaluations": result["settings"]["network_evaluations"], **result["metrics"]}
        values = {name: (value, "") for name, value in metrics.items()}
        print(f"{case}: {format_values(values)}", flush=True)
        if options.rows and fresh:
            shift = result["settings"]["scheduler"]
            shift = shift.get("flow_shift", shift.get("shift"))
            name = f"{options.name}, " if options.name else ""
            append_rows(
                options.rows,
                "sampler",
                as_rows(values, case, shape=f"{name}n {options.num_images}, shift {shift:g}"),
                command="python -m benchmarks.recipe.sampler_table PIPELINE --reference PICTURES",
                commit=started_from,
            )
        return next(iter(result["metrics"].values()))

    found = [
        (distance(case, sampling), case, sampling)
        for case, sampling in unguided(pipe.scheduler, options).items()
    ][-1:]
    intervals = [tuple(map(float, interval.split("-"))) for interval in options.intervals]
    for kind, fields in kinds_of(pipe, options).items():
        by_scale = {}
        for scale in options.scales:
            for interval in intervals:
                case, sampling = guided(options, kind, fields, scale, interval)
                found.append((distance(case, sampling), case, sampling))
                by_scale.setdefault(scale, {})[interval] = found[-1][0]
        best = min(by_scale, key=lambda scale: min(by_scale[scale].values()), default=None)
        edges = {low: d for (low, high), d in by_scale.get(best, {}).items() if high == 1}
        for _ in range(options.bisections if edges else 0):
            for low in better_edges(edges):
                case, sampling = guided(options, kind, fields, best, (low, 1.0))
                edges[low] = distance(case, sampling)
                found.append((edges[low], case, sampling))
    alone = [one for one in found if one[2].autoguidance is None]
    for title, some in (("the best", found), ("the best of one network", alone)):
        _, case, sampling = min(some, key=lambda one: one[0])
        print(f"{title}: {case}")
    if options.recommend:
        pipe.guidance = {name: getattr(sampling, name) for name in GUIDANCE}
        pipe.save_pretrained(find_pipeline(Path(options.pipeline)))


if __name__ == "__main__":
    main()
