"""FID of training paintings against held-out ones, the lower limit of the rows of the recipe.

    python -m benchmarks.recipe.recipe_floor PIPELINE --reference PICTURES \
        --rows benchmarks/results.csv

Compares as many training paintings as a row has samples, original and reconstructed by the
pipeline's autoencoder, with the held-out paintings of the recipe table. A network of latents that
had memorised the training set would give the second.
"""

import argparse
from pathlib import Path

from benchmarks.common.results import append_rows, as_rows, commit, format_values

from complexity_dit.config import EvalConfig
from complexity_dit.distributed import pick_device
from complexity_dit.evaluation.breakdown import vae_reconstruction
from complexity_dit.evaluation.evaluate import measure
from complexity_dit.evaluation.features import draw, set_features
from complexity_dit.evaluation.image_sets import open_reference, trained_on
from complexity_dit.evaluation.networks import load_extractor
from complexity_dit.pipelines.sampling import load_pipeline


def floors(pipeline, reference, num_images, weights):
    """{case: {metric: value}} of training paintings against held-out ones."""
    pipe = load_pipeline(str(pipeline))
    side = pipe.sample_size
    known = open_reference(str(reference), (side, side), trained_on(pipeline))
    config = EvalConfig.brief(num_images=num_images, weights=weights)
    extractor = load_extractor(weights, config.resize, config.dtype, pick_device(config.device))
    train = known.train()
    rows, real = (draw(len(images), num_images, config.seed) for images in (train, known.images))
    true = set_features(known.images, real, extractor, config.cache)
    transforms = {"training paintings": ()}
    if pipe.vae is not None:
        transforms["training paintings through the autoencoder"] = vae_reconstruction(pipe.vae)
    for case, transform in transforms.items():
        seen = set_features(train, rows, extractor, config.cache, *transform)
        yield case, {"n": len(seen)} | measure(seen, true, extractor, config).metrics


def main():
    """Print both cases; `--rows` adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path, help="pipeline of a row of the recipe")
    parser.add_argument("--reference", required=True, help="the source it was trained on")
    parser.add_argument("--num_images", type=int, default=2048)
    parser.add_argument("--weights", default="auto", help="of the feature network")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from = commit()
    rows = []
    found = floors(options.pipeline, options.reference, options.num_images, options.weights)
    for case, metrics in found:
        values = {name: (value, "") for name, value in metrics.items()}
        print(f"{case}: {format_values(values)}", flush=True)
        rows += as_rows(values, case)
    if options.rows:
        command = (
            "python -m benchmarks.recipe.recipe_floor PIPELINE --reference PICTURES "
            f"--num_images {options.num_images}"
        )
        append_rows(options.rows, "recipe_floor", rows, command=command, commit=started_from)


if __name__ == "__main__":
    main()
