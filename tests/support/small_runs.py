"""Runs of seconds of both packages, for tests that damage, starve, kill and keep them."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import complexity_dit.config as dit_config
import complexity_dit.data.dataset as dit_data
import complexity_lm.config as lm_config
from inl_core.run import checkpoints

STEPS, EVERY = 8, 4


def dit_run(out: Path, **fields) -> dit_config.TrainConfig:
    """A run on the embedded art set, with two checkpoints."""
    return dit_config.TrainConfig(
        **{
            "out": str(out), "steps": STEPS, "batch_size": 4, "log_every": 1,
            "checkpoint_every": EVERY, "report_to": "none", "mixed_precision": "no",
            "data": dit_data.DataConfig(resolution=8, num_images=32),
            "model": dit_config.ModelConfig(
                dynamics_placement="branch",
                overrides={"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2},
            ),
            "optim": dit_config.OptimConfig(warmup_steps=2),
        } | fields
    )  # fmt: skip


AUTOENCODER = {
    "latent_channels": 4, "patch_size": 2, "block_out_channels": [8, 8], "layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
}  # fmt: skip


def autoencoder_run(out, **fields) -> dit_config.AutoencoderConfig:
    """A run of seconds on the embedded art set, half of it with the critic."""
    defaults = {
        "out": str(out), "steps": 8, "batch_size": 4, "log_every": 1, "checkpoint_every": 4,
        "heldout_every": 4, "heldout_num_images": 4, "evaluate_num_images": 4,
        "evaluate_weights": "random", "report_to": "none", "mixed_precision": "no",
        "crop_size": 12, "adversarial_start": 0.5, "critic_channels": 4, "critic_layers": 2,
        "data": dit_data.DataConfig(resolution=16, num_images=64, label_fields=[], holdout=0.2),
        "optim": dit_config.OptimConfig(warmup_steps=2),
        "model": dit_config.AutoencoderModelConfig(**AUTOENCODER),
    }  # fmt: skip
    return dit_config.AutoencoderConfig(**defaults | fields)


def lm_run(out: Path, texts: str | Path, **fields) -> lm_config.TrainConfig:
    """A run on a few hundred words, with two checkpoints."""
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "dynamics_controller_hidden": 8,
    }  # fmt: skip
    return lm_config.TrainConfig(
        **{
            "out": str(out), "steps": STEPS, "batch_size": 4, "log_every": 1,
            "eval_every": 4, "eval_blocks": 4, "checkpoint_every": EVERY, "dynamics_every": 4,
            "report_to": "none", "mixed_precision": "no",
            "data": lm_config.DataConfig(source=f"text:{texts}", context=16),
            "tokenizer": lm_config.TokenizerConfig(vocab_size=280),
            "model": lm_config.ModelConfig(overrides=sizes),
            "optim": lm_config.OptimConfig(warmup_steps=2, lr=1e-2),
        } | fields
    )  # fmt: skip


def write_texts(folder: Path) -> None:
    """Sixteen files of 120 words of four letters."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("aeioklmnrst"), 4)) for _ in range(30)]
    for i in range(16):
        lines = [" ".join(draw.choice(words, 8)) + ".\n" for _ in range(15)]
        (folder / f"{i:02}.txt").write_text("".join(lines))


def package_of(package: str, texts: Path) -> SimpleNamespace:
    """One of the two packages: `run(out, **fields)` makes a config, `train(config)` trains,
    `use(checkpoint)` loads it for sampling, `load(folder)` its pipeline or model,
    `STATE_FILE` is in every checkpoint, `outcome(out)` has
    the bytes of a finished run by path."""
    name = f"complexity_{package}"
    module: Callable = lambda part: import_module(f"{name}.{part}")  # noqa: E731
    train = module("training.train" if package == "dit" else "train").train
    if package == "dit":
        state_file, run = module("training.state").STATE_FILE, dit_run

        def use(checkpoint):
            return load(checkpoint / "pipeline")

        def load(folder):
            return module("pipelines.sampling").load_pipeline(str(folder))
    else:
        state_file = module("train").STATE_FILE

        def run(out, **fields):
            return lm_run(out, texts, **fields)

        def use(checkpoint):
            return module("loading").load(str(checkpoint))

        def load(folder):
            return use(folder).model

    def outcome(out: Path) -> dict[str, bytes]:
        last = checkpoints.latest_checkpoint(Path(out) / "checkpoints")
        # Not optimizer.pt: a zip with times in it.
        files = [*last.rglob("*.safetensors"), Path(out) / "train_log.csv"]
        return {str(path.relative_to(out)): path.read_bytes() for path in files}

    return SimpleNamespace(
        name=package, run=run, use=use, load=load, train=train, outcome=outcome,
        STATE_FILE=state_file,
    )  # fmt: skip
