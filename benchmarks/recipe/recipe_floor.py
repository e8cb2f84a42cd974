"""The FID that the recipe's rows cannot go below: the training paintings themselves.

    python -m benchmarks.recipe.recipe_floor PIPELINE --reference PICTURES --rows \
        benchmarks/results.csv

As many training paintings as a row paints, as they are and as the pipeline's autoencoder gives them
back, beside the held-out paintings of the recipe table. A network of its latents that had learned
the training set by heart would paint the second.
"""

import argparse
from pathlib import Path

from benchmarks.common.results import append_rows, commit

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
        transforms["training paintings through the autoencoder"] = vae_reconstruction(pipe)
    for case, transform in transforms.items():
        seen = set_features(train, rows, extractor, config.cache, *transform)
        yield case, {"n": len(seen)} | measure(seen, true, extractor, config).metrics


def main():
    """Print both and, if asked, add them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path, help="of a row of recipe.py")
    parser.add_argument("--reference", required=True, help="the source it was trained on")
    parser.add_argument("--num_images", type=int, default=2048)
    parser.add_argument("--weights", default="auto", help="of the feature network")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()

    started_from = commit()
    rows = []
    found = floors(options.pipeline, options.reference, options.num_images, options.weights)
    for case, metrics in found:
        print(f"{case}: " + ", ".join(f"{k} {v:.5g}" for k, v in metrics.items()), flush=True)
        rows += [
            {"case": case, "dtype": "float32", "metric": m, "value": v, "unit": ""}
            for m, v in metrics.items()
        ]
    if options.rows:
        command = (
            "python -m benchmarks.recipe.recipe_floor PIPELINE --reference PICTURES "
            f"--num_images {options.num_images}"
        )
        append_rows(options.rows, "recipe_floor", rows, command=command, commit=started_from)


if __name__ == "__main__":
    main()
