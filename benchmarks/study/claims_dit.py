"""Denoising paths, colours and steadiness of FID: the paper's claims on images (§6.3, §7.3).

    python -m benchmarks.study.claims_dit paths   none/0=RUN branch/0=RUN none/1=RUN branch/1=RUN \
        --source imagefolder:PATH --rows benchmarks/results.csv
    python -m benchmarks.study.claims_dit colours none/0=RUN branch/0=RUN … --source … --rows …
    python -m benchmarks.study.claims_dit fid     none/0=RUN branch/0=RUN … --source … --out DIR \
        --rows …

The measures are defined in `claims_measures`. NETWORK/SEED=FOLDER names a trained model: the folder
of a run or, for `paths` and `colours`, a pipeline. All models sample from the same noise under the
labels of the held-out paintings, without guidance, in Euler steps; the tables pair differences to
`none` by seed. `fid` takes a run with its last checkpoints (train with `--keep_last 5`), or a
folder of result.json files with the step in their names (`step-00001400`). Results in --out are
read and not measured again, and results of other settings are refused.
"""

import argparse
import copy
import re
from pathlib import Path

import numpy as np
import torch
from benchmarks.common.painting import painting
from benchmarks.common.results import append_rows, as_rows, commit
from benchmarks.common.timing import DEVICE
from benchmarks.study.claims_measures import (
    colour_distances,
    length_over_chord,
    steadiness,
    total_curvature,
)

from complexity_dit.config import EvalConfig
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.evaluation.features import draw
from complexity_dit.evaluation.image_sets import labels_for_samples, open_reference, trained_on
from complexity_dit.evaluation.report import different_settings, read_result
from complexity_dit.pipelines.sampling import iter_samples, load_pipeline
from complexity_dit.pipelines.schedulers import is_flow, named_scheduler
from complexity_dit.seeding import generator_for
from inl_core.run.checkpoints import all_checkpoints

EULER = "FlowMatchEulerDiscreteScheduler"
FLOOR = "training paintings"
STEP = re.compile(r"step-(\d+)")


def named(item):
    """Parse NETWORK/SEED=FOLDER into (network, seed, folder)."""
    found = re.fullmatch(r"(.+)/(\d+)=(.+)", item)
    if found is None or not Path(found[3]).is_dir():
        why = f"{found[3]} is not a folder" if found else "expected NETWORK/SEED=FOLDER"
        raise argparse.ArgumentTypeError(f"{item!r}: {why}, for example branch/0=runs/branch-0")
    return found[1], int(found[2]), Path(found[3])


def pipeline_folder(folder):
    """The pipeline of a run, or the folder itself."""
    return folder / "pipeline" if (folder / "pipeline").is_dir() else folder


@torch.no_grad()
def expected_pictures(pipe, labels, steps, seed, batch_size=32):
    """Yield the images that a flow network predicts at each step, (steps, B, D) per batch.

    Derived from the states: an Euler step from level s to s' moves x by (s' − s) u.
    """
    if not is_flow(pipe.scheduler):
        raise ValueError(
            f"the pipeline samples with {type(pipe.scheduler).__name__}: the path is defined for "
            "flow matching"
        )
    pipe = copy.copy(pipe)
    pipe.scheduler = named_scheduler(pipe.scheduler, EULER)
    pipe.set_progress_bar_config(disable=True)
    side, channels = pipe.transformer.config.sample_size, pipe.transformer.config.in_channels
    for first in range(0, len(labels), batch_size):
        rows = labels[first : first + batch_size]
        draws = [generator_for(seed, "sample", first + i) for i in range(len(rows))]
        noise = torch.stack([torch.randn(channels, side, side, generator=draw) for draw in draws])
        states = [noise]

        def keep(_, step, time, tensors, states=states):
            states.append(tensors["latents"].cpu().clone())
            return {}

        pipe(
            class_labels=rows, latents=noise, num_inference_steps=steps, guidance_scale=1.0,
            output_type="latent", callback_on_step_end=keep,
        )  # fmt: skip
        x = torch.stack(states).double().flatten(2)
        level = pipe.scheduler.sigmas.double().cpu()[:, None, None]
        yield x[:-1] - level[:-1] * x.diff(dim=0) / level.diff(dim=0)


def held_out(pipe, folder, options):
    """The held-out paintings at the pipeline's size, the rows to take, and their labels."""
    side = pipe.sample_size
    reference = open_reference(options.source, (side, side), trained_on(folder))
    if reference.images is None or reference.train is None:
        raise ValueError(
            f"--source {options.source}: expected art, imagefolder:PATH or hub:NAME, which have "
            "training and held-out paintings"
        )
    rows = draw(len(reference.images), options.num_images, options.seed)
    labels, _ = labels_for_samples(pipe, len(rows), reference.images, rows)
    return reference, rows, labels


def sampling(options):
    """The sampling config of all measures."""
    return painting(
        seed=options.seed, scheduler=EULER, num_inference_steps=options.steps, guidance_scale=1.0
    )


def paths(items, options):
    """Rows on the path of the expected picture, per model."""
    for network, seed, folder in items:
        pipe = load_pipeline(str(pipeline_folder(folder))).to(DEVICE)
        *_, labels = held_out(pipe, pipeline_folder(folder), options)
        curved, longer = [], []
        for path in expected_pictures(pipe, labels, options.steps, options.seed):
            curved.append(total_curvature(path))
            longer.append(length_over_chord(path))
        curved, longer = torch.cat(curved), torch.cat(longer)
        count = len(curved)
        values = {
            "total curvature of the expected picture": (float(curved.mean()), "rad"),
            "its standard error over pictures": (float(curved.std() / count**0.5), "rad"),
            "length over chord": (float(longer.mean()), ""),
        }
        yield from as_rows(values, network, shape=f"seed {seed}, n {count}, {options.steps} steps")


def colours(items, options):
    """Rows on the distance of colours from those of the style, per model, and the floor."""
    floors = set()
    for network, seed, folder in items:
        pipe = load_pipeline(str(pipeline_folder(folder))).to(DEVICE)
        reference, rows, labels = held_out(pipe, pipeline_folder(folder), options)
        real = reference.images
        if options.field not in real.label_names or options.field not in pipe.id2label:
            raise ValueError(
                f"--field {options.field}: the paintings have {list(real.label_names)} and "
                f"{folder} knows {list(pipe.id2label)}"
            )
        paintings, styles = real.read(range(len(real))), real.column(options.field)
        images = np.concatenate([x for _, x in iter_samples(pipe, labels, sampling(options))])
        shape = f"n {len(rows)}, {options.steps} steps, {real.size[0]} px"
        floor = (reference.images.fingerprint, shape)
        if floor not in floors:
            floors.add(floor)
            others, their_styles = as_many(reference.train(), styles[rows], options)
            yield from colour_rows(
                FLOOR, f"seed 0, {shape}", others, their_styles, paintings, styles
            )
        yield from colour_rows(
            network, f"seed {seed}, {shape}", images, styles[rows], paintings, styles
        )


def as_many(train, wanted, options):
    """Training paintings with at most as many of each style as `wanted` has."""
    of, chosen = train.column(options.field), []
    for style in np.unique(wanted[wanted >= 0]):
        there = np.flatnonzero(of == style)
        count = min(len(there), int((wanted == style).sum()))
        order = torch.randperm(
            len(there), generator=generator_for(options.seed, "floor", int(style))
        )
        chosen.append(there[order[:count].numpy()])
    chosen = np.sort(np.concatenate(chosen))
    return train.read(chosen.tolist()), of[chosen]


def colour_rows(case, shape, images, labels, real, real_labels):
    palette, picture, styles = colour_distances(images, labels, real, real_labels)
    values = {"palette to style": palette, "picture to style": picture, "styles": styles}
    return as_rows({name: (value, "") for name, value in values.items()}, case, shape=shape)


def fid(items, options):
    """Rows on the variance of FID over the last checkpoints, per run."""
    first = None
    for network, seed, folder in items:
        found = checkpoint_results(network, seed, folder, options)
        if len(found) < options.last:
            raise ValueError(
                f"{folder} has {len(found)} checkpoints, expected {options.last}: train with "
                f"--keep_last {options.last}, or set --last"
            )
        steps, results = zip(*sorted(found.items())[-options.last :], strict=True)
        first = first or results[0]
        for step, result in zip(steps, results, strict=True):
            if other := different_settings(first, result):
                raise ValueError(
                    f"{folder}, step {step}: measured under other settings than the first result, "
                    + ", ".join(f"{name} {a} and {b}" for name, (a, b) in other.items())
                )
        # The distance under a random feature network is not an FID and has another name.
        name = "fid" if "fid" in first["metrics"] else "fd_random"
        values = [result["metrics"][name] for result in results]
        shape = f"seed {seed}, n {first['n_generated']}, last {options.last} checkpoints"
        measured = {f"{name}, {what}": (x, "") for what, x in steadiness(steps, values).items()}
        measured["steps between"] = ((steps[-1] - steps[0]) / (len(steps) - 1), "")
        yield from as_rows(measured, network, shape=shape)


def checkpoint_results(network, seed, folder, options):
    """{step: result} of a folder of results or of a run's checkpoints, measured where missing."""
    checkpoints = all_checkpoints(folder / "checkpoints")[-options.last :]
    if not checkpoints:
        return {
            int(STEP.findall(str(path.relative_to(folder)))[-1]): read_result(path)
            for path in sorted(folder.rglob("*.json"))
            if STEP.search(str(path.relative_to(folder))) and path.name.startswith("result")
        }
    if options.out is None:
        raise ValueError("fid of checkpoints needs --out, the folder for their results")
    name, found = re.sub(r"[^\w.-]+", "-", network), {}
    brief = EvalConfig.brief(num_images=options.num_images, weights=options.weights, quiet=True)
    for checkpoint in checkpoints:
        out = options.out / f"{name}-seed-{seed}" / checkpoint.name
        if not (out / "result.json").exists():
            evaluate(checkpoint / "pipeline", options.source, out, brief, sampling(options))
        found[int(STEP.fullmatch(checkpoint.name)[1])] = read_result(out)
    return found


MEASURES = {"paths": (paths, 256), "colours": (colours, 2048), "fid": (fid, 2048)}
"""Name of a measure: (its function, default number of images)."""


def main():
    """Measure and print model by model; `--rows` adds the rows to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("models", nargs="+", type=named, metavar="NETWORK/SEED=FOLDER")
    parser.add_argument("--source", required=True, help="art, imagefolder:PATH or hub:NAME")
    parser.add_argument("--field", default="style", help="colours: the label field of styles")
    parser.add_argument("--num_images", type=int, help="256 for paths, 2048 otherwise")
    parser.add_argument("--steps", type=int, default=20, help="of denoising")
    parser.add_argument("--seed", type=int, default=0, help="of noise and draws")
    parser.add_argument("--last", type=int, default=5, help="fid: number of checkpoints")
    parser.add_argument("--out", type=Path, help="fid: folder of the results")
    parser.add_argument("--weights", default="auto", help="fid: of the feature network")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    measure, usual = MEASURES[options.measure]
    options.num_images = usual if options.num_images is None else options.num_images
    if options.num_images < 2 or options.steps < 3:
        parser.error(
            f"--num_images {options.num_images} must be at least 2 and --steps {options.steps} at "
            "least 3: a shorter path does not turn"
        )
    started_from = commit()
    # Without folders, so that rows of one measure have one command.
    command = f"python -m benchmarks.study.claims_dit {options.measure} NETWORK/SEED=FOLDER …"
    for row in measure(options.models, options):
        print(f"{row['case']}, {row['shape']}: {row['metric']} {row['value']:.6g}", flush=True)
        if options.rows:
            append_rows(options.rows, "claims_dit", [row], command=command, commit=started_from)


if __name__ == "__main__":
    main()
