"""One row of the recipe table: train a small model on real paintings and evaluate its samples.

    python -m benchmarks.recipe.recipe flow-none --latents CACHE --out DIR
    python -m benchmarks.recipe.recipe --list

A row changes some fields of one run (`BASE`): `diffusers-dit` is diffusers' DiT in the same loop
with epsilon prediction; `flow-none` is our model with plain flow matching and without dynamics; the
rows after it change one thing each; `three` has the knobs of `THREE` and dynamics. A row is
trained, samples without guidance under the labels of held-out paintings, and FID and KID compare
both. The pipeline stays in `--out/run/pipeline`. The same command resumes a stopped row.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.common.diffusers_dit import build_diffusers_dit
from benchmarks.common.fields import overridden, override_flag, with_fields
from benchmarks.common.memory import parameters
from benchmarks.common.painting import painting
from benchmarks.common.results import append_rows, as_rows, commit, dtype_of, format_values

from complexity_dit.config import DATA_FILE, EvalConfig, TrainConfig
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.models.tokens import kept_count
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training.network import build_model
from complexity_dit.training.plan import count_flops, token_count
from complexity_dit.training.train import train
from inl_core.run.checkpoints import all_checkpoints, latest_checkpoint, step_of

# The settings of all rows: 64 tokens of 2x2 latents, 4.2M parameters, one label.
BASE = {
    "batch_size": 32,
    "mixed_precision": "no",  # as all committed rows
    "compile": "no",
    "checkpoint_every": 500,
    "data.resolution": 128,
    "data.label_fields": ["style"],
    "data.holdout": 0.2,  # 2,113 of the shared paintings: enough for FID at n = 2,048
    "data.flip": False,
    "model.size": "tiny",
    "model.patch_size": 2,
    "model.dynamics_placement": "none",
    "optim.lr": 2e-3,
    "optim.warmup_steps": 300,
    "optim.schedule": "cosine",
    "ema.decay": 0.999,
    # Plain flow matching: uniform times, velocity prediction, labels always given.
    "objective.network_output": "target",
    "objective.time_sampling": "uniform",
    "objective.shift": 1.0,
    "objective.sampling_shift": 1.0,
    "objective.label_dropout": 0.0,
}

DYNAMICS = {"model.dynamics_placement": "branch", "model.dynamics_adaptive": "channel"}

# One change each to BASE.
KNOBS = {
    "flip": {"data.flip": True},
    "logit-normal": {"objective.time_sampling": "logit_normal"},
    "time-shift": {"objective.shift": 2.0, "objective.sampling_shift": 2.0},
    "writes-sample": {"objective.network_output": "sample"},
    "label-dropout": {"objective.label_dropout": 0.1},
    "token-dropping": {"model.token_drop_rate": 0.5},
    "muon": {"optim.name": "muon"},
    # All label fields of the data; none, as in a folder without labels; clusters in their place.
    "labels": {
        "data.label_fields": None,
        "objective.label_dropout": 0.1,
        "objective.label_dropout_all": 0.1,
    },
    "no-labels": {"data.label_fields": []},
    "clusters": {
        "data.label_fields": [],
        "data.clusters": 64,
        "objective.label_dropout": 0.1,
    },
    "dynamics": DYNAMICS,
}

# Those whose own row beats `flow-none` by more than the difference of two seeds.
THREE = ("logit-normal", "time-shift", "muon")


def _together(*names):
    return {field: value for name in names for field, value in KNOBS[name].items()}


ROWS = {
    "diffusers-dit": {"objective.prediction_type": "epsilon"},
    "flow-none": {},
    **KNOBS,
    "three-none": _together(*THREE),
    "three": _together(*THREE, "dynamics"),
}

BUILD = {"diffusers-dit": build_diffusers_dit}


def row_config(row, out, images, seed, overrides):
    """The training config of a row, for `images` training images."""
    config = with_fields(TrainConfig(), BASE | ROWS[row] | overrides)
    return replace(
        config, out=str(out), seed=seed, steps=images // config.batch_size, resume="auto"
    )


class Sessions:
    """Training seconds over restarts; a killed session counts up to its last checkpoint."""

    def __init__(self, path, run):
        self.path, self.checkpoints = path, run / "checkpoints"
        self.done = json.loads(path.read_text()) if path.exists() else []

    def begin(self):
        kept = latest_checkpoint(self.checkpoints)
        if self.done and "seconds" not in self.done[-1]:
            # Steps after its last checkpoint are repeated; it may have written none.
            started = self.done.pop()["started"]
            wrote = (kept / "state.json").stat().st_mtime if kept else 0
            if wrote > started:
                self.done.append({"started": started, "seconds": wrote - started})
        self.done.append({"started": time.time()})
        self._write()

    def end(self):
        self.done[-1]["seconds"] = time.time() - self.done[-1]["started"]
        self._write()

    def seconds(self):
        return sum(session["seconds"] for session in self.done)

    def _write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.done, indent=1) + "\n")


def trained(row, config, sessions):
    """The pipeline folder of a row and its training seconds; trains if there is no pipeline."""
    pipeline = Path(config.out) / "pipeline"
    if not pipeline.exists():
        sessions.begin()
        train(config, BUILD.get(row, build_model))
        sessions.end()
    return pipeline, sessions.seconds()


def used_tflops(config, network, speed):
    """TFLOP/s of training at `speed` images/s.

    Counts matrix products, once forward and twice backward, without those of dropped tokens.
    """
    rate = config.model.token_drop_rate
    kept = kept_count(token_count(network), rate) if rate else None
    _, flops = count_flops(network, kept)
    return speed * flops / 1e12


def utilisation(config, network, peak_tflops):
    """Speed between the last two checkpoints, and its share of the peak."""
    *_, before, last = all_checkpoints(Path(config.out) / "checkpoints")
    wrote = [(folder / "state.json").stat().st_mtime for folder in (before, last)]
    speed = (step_of(last) - step_of(before)) * config.batch_size / (wrote[1] - wrote[0])
    done = used_tflops(config, network, speed)
    return {
        "speed between the last checkpoints": (speed, "images/s"),
        "model FLOPs": (done, "TFLOP/s"),
        "utilisation": (done / peak_tflops, f"of {peak_tflops:g} TFLOP/s"),
    }


def main():
    """Train, evaluate and print one row; `--rows` adds it to the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", nargs="?", choices=ROWS, metavar="ROW", help="one of --list")
    parser.add_argument("--list", action="store_true", help="print the rows and what they change")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--latents", help="cache written by complexity-dit encode")
    source.add_argument("--source", help="a source of images, for training in pixels")
    parser.add_argument("--reference", help="source of reference images; default: the training's")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=100_000, help="training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=20, help="of the network per image")
    parser.add_argument("--num_images", type=int, default=2048, help="n of FID and KID")
    parser.add_argument("--weights", default="auto", help="of the feature network")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--note", help="names the case further, such as another autoencoder")
    parser.add_argument("--peak_tflops", type=float, help="of the device; adds the utilisation")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    if options.list:
        for row, changes in ROWS.items():
            print(f"{row:18} {', '.join(f'{k}={v}' for k, v in changes.items())}")
        return
    if options.row is None or options.out is None or not (options.latents or options.source):
        parser.error("give ROW, --out and one of --latents and --source")

    started_from = commit()
    overrides = overridden(options.override)
    overrides["data.source"] = options.source or f"latents:{options.latents}"
    config = row_config(options.row, options.out / "run", options.images, options.seed, overrides)
    sessions = Sessions(options.out / "sessions.json", Path(config.out))
    pipeline, seconds = trained(options.row, config, sessions)
    pipe = load_pipeline(str(pipeline))
    out = options.out / f"evaluation-{options.evaluations}"
    fresh = not (out / "result.json").exists()
    if fresh:
        evaluate(
            pipeline,
            options.reference or json.loads((pipeline / DATA_FILE).read_text())["source"],
            out,
            EvalConfig.brief(num_images=options.num_images, weights=options.weights),
            painting(num_inference_steps=options.evaluations, guidance_scale=1.0),
        )
    result = json.loads((out / "result.json").read_text())
    values = {
        "images": (config.steps * config.batch_size, ""),
        "training": (seconds, "s"),
        "speed": (config.steps * config.batch_size / seconds, "images/s"),
        "parameters": (parameters(pipe.transformer), ""),
        "evaluations": (result["settings"]["network_evaluations"], ""),
        "n": (result["n_generated"], ""),
        **{name: (value, "") for name, value in result["metrics"].items()},
    }
    if options.peak_tflops:
        values |= utilisation(config, pipe.transformer.config, options.peak_tflops)
    print(f"{options.row}: {format_values(values)}")
    if options.rows and fresh:
        command = (
            f"python -m benchmarks.recipe.recipe ROW --images {options.images} --evaluations "
            f"{options.evaluations} --num_images {options.num_images}"
            + override_flag(options.override)
        )
        dtype = dtype_of(config.mixed_precision)
        shape = ", ".join(filter(None, [f"seed {options.seed}", options.note]))
        rows = as_rows(values, options.row, shape=shape, dtype=dtype)
        append_rows(options.rows, "recipe", rows, command=command, commit=started_from)


if __name__ == "__main__":
    main()
