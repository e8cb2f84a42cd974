"""Training and measurement of a cell of a study: `LM` and `DiT`, with the same methods.

Numbers come from the files of the trainers (train_log.csv, dynamics.csv, result.json) where they
exist. The activations after every layer and, for the image model, the held-out loss are measured
here on the finished network.
"""

import csv
import importlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from benchmarks.common.memory import parameters
from benchmarks.common.timing import DEVICE, training_step
from benchmarks.study.ablation_curves import curve_metrics, read_curve
from benchmarks.study.claims_measures import total_curvature

HELDOUT_SEED = 10_007
"""Seed of the images, times and noise of held-out losses of the image model."""
HELDOUT_DRAWS = 4096
STATS = ("alpha_mean", "beta_mean", "gate_mean", "velocity_rms", "spectral_radius")
CLIPS = ("mu_clip_fraction", "beta_clip_fraction", "velocity_clip_fraction")


class Lab:
    """Base of both labs.

    Attributes:
        bench: Name in the rows.
        unit: Unit of a loss.
        package: Package of the trainer.
    """

    bench = unit = package = ""

    def blank(self):
        """A config with the defaults of the package."""
        return importlib.import_module(f"{self.package}.config").TrainConfig()

    def metrics(self, config, swap):
        """Metrics of a finished cell, {name: (value, unit)}, and its profile over depth."""
        curve = read_curve(Path(config.out) / "train_log.csv")
        found = curve_metrics(*curve, config.optim.warmup_steps, self.unit)
        network, layers, probe, measured = self.finished(config, swap)
        probe = send_to_device(probe, DEVICE)
        states = states_by_depth(layers, lambda: network(**probe))
        found = measured | {"parameters": (parameters(network), "")} | found | path_metrics(states)
        profile = {"activation_rms": [float(x.square().mean().sqrt()) for x in states]}
        modules = read_last_stats(Path(config.out) / "dynamics.csv")
        if modules:
            profile["dynamics"] = modules
            for clip in CLIPS:
                name = clip.replace("_", " ").replace("fraction", "share, largest of a layer")
                found[name] = (max(stats[clip] for stats in modules), "")
        return found, profile


class LM(Lab):
    bench, unit, package = "ablate_lm", "nats", "complexity_lm"

    def train(self, config, swap):
        from benchmarks.study.variants_lm import varied_build
        from transformers.utils import logging as transformers_logging

        from complexity_lm.train import train

        transformers_logging.set_verbosity_error()
        train(config, varied_build(swap))

    def finished(self, config, swap):
        from complexity_lm.data import collate, load_split, pack, tokenize
        from complexity_lm.loading import load

        metrics = json.loads((Path(config.out) / "result.json").read_text())["metrics"]
        measured = {
            "held-out loss": (metrics["loss"], self.unit),
            "held-out bits per byte": (metrics["bits_per_byte"], "bits"),
        }
        loaded = load(config.out)
        heldout = load_split(config.data, "heldout")
        some = tokenize(heldout.take(min(16, len(heldout))), loaded.tokenizer)
        blocks = pack(some, config.data.context, "held-out")
        probe = collate([blocks[i] for i in range(min(4, len(blocks)))])
        inputs = {"input_ids": probe["input_ids"], "use_cache": False}
        model = loaded.model.to(DEVICE)
        return model, model.model.layers, inputs, measured

    def step(self, config, swap):
        """A function that trains one step on random ids, and the number of parameters."""
        from benchmarks.study.variants_lm import varied_build

        from complexity_lm.data import load_corpus
        from complexity_lm.tokenizer import train_tokenizer

        texts = load_corpus(config.data).sample["text"]
        tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
        model = varied_build(swap)(config, tokenizer, None)
        ids = torch.randint(len(tokenizer), (config.batch_size, config.data.context))
        return stepper(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


class DiT(Lab):
    bench, unit, package = "ablate_dit", "", "complexity_dit"

    def train(self, config, swap):
        from benchmarks.study.variants_dit import varied_build

        from complexity_dit.training.train import train

        train(config, varied_build(swap))

    def network(self, config, swap):
        """The network of a finished run, with the EMA of its weights."""
        from benchmarks.study.variants_dit import varied_dit

        folder = Path(config.out) / "pipeline/transformer"
        return varied_dit(swap).from_pretrained(folder).eval().to(DEVICE)

    def finished(self, config, swap):
        batches = heldout_batches(config)
        network = self.network(config, swap)
        batch = batches[0]
        probe = {
            "hidden_states": batch["x"],
            "timestep": batch["timestep"],
            "class_labels": batch["labels"],
        }
        loss = heldout_loss(network, batches, config)
        return network, network.blocks, probe, {"held-out loss": (loss, self.unit)}

    def fid(self, config, swap, num_images, evaluations, weights, out):
        """FID and KID of a finished cell as in `recipe`, {name: (value, unit)}."""
        from benchmarks.common.painting import painting

        from complexity_dit.config import EvalConfig
        from complexity_dit.evaluation.evaluate import evaluate
        from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline

        folder = Path(config.out) / "pipeline"
        pipe = ComplexityDiTPipeline.from_pretrained(folder, transformer=self.network(config, swap))
        result = evaluate(
            pipe,
            config.data.source,
            out,
            EvalConfig(
                num_images=num_images, weights=weights, measures=["fid", "kid"], bootstrap=0,
                curve=False, report=False, quiet=True,
            ),
            painting(num_inference_steps=evaluations, guidance_scale=1.0),
            config.data,
        )  # fmt: skip
        about = f"n {result['n_generated']}, {evaluations} evaluations"
        return {f"{name} ({about})": (value, "") for name, value in result["metrics"].items()}

    def step(self, config, swap):
        from benchmarks.study.variants_dit import varied_build

        from complexity_dit.data.latents import load_training_data

        data = load_training_data(config.data)
        model = varied_build(swap)(config, data)
        shape = (config.batch_size, data.channels, data.sample_size, data.sample_size)
        x, timestep = torch.randn(shape), 1000 * torch.rand(config.batch_size)
        labels = torch.zeros(config.batch_size, len(data.label_names), dtype=torch.int64)
        return stepper(
            model, lambda: model(x, timestep, labels, return_dict=False)[0].square().mean()
        )


LABS = {"lm": LM(), "dit": DiT()}


def stepper(model, loss):
    return training_step(model.train(), loss, lr=1e-5, clip=True), parameters(model)


def heldout_batches(config):
    """Held-out images with noise and times, the same for every network of a study."""
    from complexity_dit.data.latents import load_training_data
    from complexity_dit.training.batches import StepBatches

    fixed = replace(
        config,
        seed=HELDOUT_SEED,
        steps=-(-HELDOUT_DRAWS // config.batch_size),
        model=replace(config.model, token_drop_rate=0.0),
        objective=replace(config.objective, label_dropout=0.0),
    )
    return StepBatches(load_training_data(config.data, "heldout"), fixed, 0, 1)


@torch.no_grad()
def heldout_loss(network, batches, config):
    """Mean training loss over the batches, without dropping labels or tokens."""
    from complexity_dit.training.objective import training_loss

    losses = []
    for step in range(len(batches)):
        batch = send_to_device(batches[step], DEVICE)
        prediction = network(batch["x"], batch["timestep"], batch["labels"], return_dict=False)[0]
        losses.append(float(training_loss(prediction, batch["target"])))
    return sum(losses) / len(losses)


@torch.no_grad()
def states_by_depth(layers, forward):
    """Outputs of each layer, from the first to the last, (tokens, D) each."""
    states = []
    handles = [
        layer.register_forward_hook(
            lambda _, inputs, output: states.append(output[0].flatten(0, -2).cpu())
        )
        for layer in layers
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return states


def path_metrics(states):
    """Metrics of the path of a token through depth, {name: (value, unit)}, means over tokens.

    turning over depth: total curvature of the polygon of its states (`claims_measures`). largest
    jump of a layer: |h' - h| / |h| at the layer where its mean is largest.
    """
    path = torch.stack(states)
    jumps = path.diff(dim=0).norm(dim=-1) / path[:-1].norm(dim=-1)
    return {
        "turning over depth": (float(total_curvature(path).mean()), "rad"),
        "largest jump of a layer": (float(jumps.mean(1).max()), ""),
    }


def read_last_stats(path):
    """The last entry of a `dynamics.csv`, one dictionary per module; empty without dynamics."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return [
        {"layer": row["layer"]} | {name: float(row[name]) for name in (*STATS, *CLIPS)}
        for row in last
    ]
