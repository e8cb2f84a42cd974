"""PSNR, rFID and latents of autoencoders on the same held-out pictures.

    python -m benchmarks.recipe.autoencoder_table TAEF2=FOLDER own=FOLDER --source imagefolder:PATH

`--strip FILE` writes a PNG of pictures with their reconstructions. Whether an autoencoder has seen
the pictures is for the caller to know: one trained by `complexity-dit autoencoder` has not seen
those that its own `data.holdout` holds out.
"""

import argparse
from pathlib import Path

from benchmarks.common.memory import parameters
from benchmarks.common.results import append_rows, as_rows, commit, format_values

from complexity_dit.config import DataConfig, EvalConfig
from complexity_dit.evaluation.autoencoder import evaluate_autoencoder, save_strip
from complexity_dit.models.vae import load_vae, scale_factor


def measured(vae, data, config):
    """The shape of a latent, and {metric: (value, unit)} of one autoencoder."""
    result = evaluate_autoencoder(vae, data, config)
    latents, side = result["latents"], data.resolution // scale_factor(vae)
    spectrum = latents["spectrum"]
    return f"{latents['channels']}x{side}x{side}", {
        "parameters": (parameters(vae), ""),
        "n": (result["n_generated"], ""),
        **{name: (value, "dB" * (name == "psnr")) for name, value in result["metrics"].items()},
        "effective rank": (latents["effective_rank"], "channels"),
        "power at 0": (spectrum[0], "of the variance"),
        "power at 1/2": (spectrum[side // 2], "of the variance"),
        "power at the highest frequency": (spectrum[-1], "of the variance"),
    }


def main():
    """Measure all and print them; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("autoencoders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--source", required=True)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--holdout", type=float, default=0.1)
    parser.add_argument("--num_images", type=int, default=1024)
    parser.add_argument("--weights", default="auto", help="of the feature network")
    parser.add_argument("--strip", type=Path, help="PNG of reconstructions")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from = commit()
    data = DataConfig(
        source=options.source, resolution=options.resolution, holdout=options.holdout,
        label_fields=[],
    )  # fmt: skip
    config = EvalConfig.brief(num_images=options.num_images, weights=options.weights)
    named = dict(one.split("=", 1) for one in options.autoencoders)
    vaes = {name: load_vae(folder) for name, folder in named.items()}
    rows = []
    for name, vae in vaes.items():
        shape, values = measured(vae, data, config)
        print(f"{name}: {format_values(values)}", flush=True)
        rows += as_rows(values, name, shape=f"{options.resolution} px as {shape}")
    if options.strip:
        save_strip(vaes, data, options.strip)
    if options.rows:
        names = " ".join(f"{name}=FOLDER" for name in named)
        append_rows(
            options.rows,
            "autoencoder",
            rows,
            command=f"python -m benchmarks.recipe.autoencoder_table {names} --source PICTURES "
            f"--resolution {options.resolution} --holdout {options.holdout} "
            f"--num_images {options.num_images}",
            commit=started_from,
        )


if __name__ == "__main__":
    main()
