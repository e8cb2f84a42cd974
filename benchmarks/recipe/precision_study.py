"""Held-out loss after the same images, in fp32 and under bf16 autocast, for several seeds.

    python -m benchmarks.recipe.precision_study --out runs/precision --rows benchmarks/results.csv

The network is tiny/2 with dynamics on TAEF2 latents of the paintings in `--data`, trained by the
loop of `complexity-dit train`. Both precisions of a seed start from the same weights and see the
same batches, so differences are taken per seed; their interval is Student's. The held-out loss is
that of the EMA weights, computed in fp32 for both, on the same images, times and noise.

The latents of `--paintings` of them are encoded first, into `--out`/latents. The same command goes
on with what is missing: encoded parts and finished arms are not computed again, and a stopped arm
resumes from its last checkpoint. Rows are written at the end, when all arms are finished.
"""

import argparse
import csv
import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common.results import append_rows, as_rows, commit, dtype_of, format_values
from benchmarks.recipe.lora_style import link_paintings
from benchmarks.recipe.recipe import row_config
from benchmarks.study.ablation_labs import LABS
from benchmarks.study.ablation_report import interval

from complexity_dit.config import DataConfig
from complexity_dit.data.encode import encode
from inl_core.run.files import atomic_file

ROW = "dynamics"
"""Row of the recipe that is trained."""

HOLDOUT = 0.25

ARMS = {"fp32": "no", "bf16": "bf16"}
"""{name: mixed_precision}, the baseline first."""


def encoded(data, paintings, out):
    """Encode `paintings` of the paintings of `data`/wikiart, drawn once, into `out`/latents."""
    with (data / "wikiart" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = random.Random(0).sample(rows, min(paintings, len(rows)))
    link_paintings(data / "wikiart", chosen, out / "paintings")
    encode(
        DataConfig(
            source=f"imagefolder:{out / 'paintings'}", vae=str(data / "taef2"), resolution=128,
            label_fields=["style"], holdout=HOLDOUT, flip=False,
        ),
        out / "latents",
    )  # fmt: skip


def arm_config(arm, seed, out, images):
    """The run of one arm: the row of the recipe, with a warm-up that fits a short run."""
    changes = {
        "data.source": f"latents:{out / 'latents'}",
        "data.holdout": HOLDOUT,
        "mixed_precision": ARMS[arm],
        "optim.warmup_steps": 100,
        "checkpoint_every": 125,
        "keep_last": 1,
        "report_to": "none",
        "noise_bins": 0,
    }
    return row_config(ROW, out / f"{arm}-{seed}" / "run", images, seed, changes)


def held_out_loss(arm, seed, out, images):
    """The held-out loss of one arm, which is trained if it is not finished."""
    config, lab = arm_config(arm, seed, out, images), LABS["dit"]
    done = out / f"{arm}-{seed}" / "result.json"
    if not done.exists():
        lab.train(config, None)
        *_, measured = lab.finished(config, None)
        with atomic_file(done) as part:
            found = {
                "images": config.steps * config.batch_size,
                "loss": measured["held-out loss"][0],
            }
            part.write_text(json.dumps(found) + "\n")
    found = json.loads(done.read_text())
    if found["images"] != config.steps * config.batch_size:
        raise SystemExit(
            f"{done.parent} was trained on {found['images']} images: choose another --out"
        )
    return found["loss"]


def main():
    """Train what is missing, print the losses; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = Path(os.environ.get("COMPLEXITY_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=shared, help="with wikiart/ and taef2/")
    parser.add_argument("--paintings", type=int, default=1536, help="to encode, a few a second")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20_000, help="training images of an arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from = commit()
    encoded(options.data, options.paintings, options.out)
    losses = {arm: [] for arm in ARMS}
    # A process for each arm: accelerate keeps the precision of the first one in a process.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for seed in options.seeds:
            for arm in ARMS:
                arguments = (arm, seed, options.out, options.images)
                losses[arm].append(pool.submit(held_out_loss, *arguments).result())
                print(f"{arm}, seed {seed}: {losses[arm][-1]:.5f}", flush=True)

    base, *others = ARMS
    rows = [
        row
        for arm in ARMS
        for seed, loss in zip(options.seeds, losses[arm], strict=True)
        for row in as_rows(
            {"held-out loss": (loss, "")}, arm, shape=f"seed {seed}", dtype=dtype_of(ARMS[arm])
        )
    ]
    for arm in others:
        apart = [own - plain for own, plain in zip(losses[arm], losses[base], strict=True)]
        middle, half = interval(apart)
        values = {"difference": (middle, "")}
        if half is not None:
            values |= {"half width of its 95 % interval": (half, "")}
        print(f"{arm} - {base}: {format_values(values)}")
        shape = f"{len(options.seeds)} seeds, {options.images} images"
        rows += as_rows(values, f"{arm} - {base}", shape=shape, dtype=dtype_of(ARMS[arm]))
    if options.rows:
        command = f"python -m benchmarks.recipe.precision_study --images {options.images}"
        append_rows(options.rows, "precision", rows, command=command, commit=started_from)


if __name__ == "__main__":
    main()
