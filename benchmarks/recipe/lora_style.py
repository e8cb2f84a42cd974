"""A style from 20 paintings: an adapter for a base model that was trained without the style.

    python -m benchmarks.recipe.lora_style --data FOLDER --out runs/lora-ukiyo-e

The folder has `metadata.csv` with file_name, style and genre. The base trains on all other styles
(configs/dit/wikiart-cpu.yaml; `--base` takes an existing one), the adapter on 20 paintings of the
style (configs/dit/lora-style.yaml). The remaining paintings of the style are the reference: KID to
them is measured of samples of the base (without a style), of the adapter (with the new label) and
of paintings from the base's data. Writes result.json and samples.png: the paintings, and samples of
the base and of the adapter from the same noise. A stopped training resumes.
"""

import argparse
import csv
import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from benchmarks.common.results import commit

from complexity_dit.__main__ import PROGRAM
from complexity_dit.config import DataConfig, EvalConfig, SampleConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.evaluation.evaluate import evaluate_images
from complexity_dit.grids import save_grid
from complexity_dit.pipelines.sampling import iter_samples, load_pipeline
from complexity_dit.training.train import train
from inl_core.run.files import atomic_file

CONFIGS = Path(__file__).parents[2] / "configs" / "dit"


def link_paintings(data, rows, folder):
    """Make `folder` a data set of links to the paintings of some rows of `data`/metadata.csv."""
    if (folder / "metadata.csv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        link = folder / Path(row["file_name"]).name
        if not link.exists():
            link.symlink_to((data / row["file_name"]).resolve())
    with atomic_file(folder / "metadata.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "style", "genre"])
        writer.writeheader()
        for row in rows:
            values = {"file_name": Path(row["file_name"]).name}
            writer.writerow(values | {k: row[k] for k in ("style", "genre")})


def split(options):
    """Three folders of links: all other styles, some paintings of the style, the rest of it."""
    with (options.data / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    style = [row for row in rows if row["style"] == options.style]
    if len(style) <= options.paintings:
        names = ", ".join(sorted({row["style"] for row in rows}))
        raise SystemExit(f"{options.style} has {len(style)} paintings; the styles are {names}")
    random.Random(options.seed).shuffle(style)
    parts = {
        "others": [row for row in rows if row["style"] != options.style],
        "paintings": style[: options.paintings],
        "rest": style[options.paintings :],
    }
    folders = {name: options.out / "data" / name for name in parts}
    for name, folder in folders.items():
        link_paintings(options.data, parts[name], folder)
    return folders


def config_of(name, **changes):
    """A committed config with changes."""
    _, (config,), _ = PROGRAM.parse(["train", "--config", str(CONFIGS / name)])
    return dataclasses.replace(config, **changes)


def trained(config):
    """The folder of the run's pipeline or adapter, which is trained if it does not exist."""
    folder = Path(config.out) / ("adapter" if config.lora.rank else "pipeline")
    return folder if folder.is_dir() else train(config)


def pixels(source, resolution, count=None):
    data = load_data(DataConfig(f"imagefolder:{source}", resolution=resolution, holdout=0.0), "all")
    count = min(len(data), count or len(data))
    return data.pixels(range(count)).permute(0, 2, 3, 1).contiguous().numpy()


def samples(pipe, style, options):
    labels = pipe.get_label_ids(style=style).repeat(options.num_images, 1)
    batches = iter_samples(pipe, labels, SampleConfig(guidance_scale=options.guidance_scale))
    return np.concatenate([images for _, images in batches])


def main():
    """Train what is missing, sample and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--style", default="Ukiyo_e")
    parser.add_argument("--paintings", type=int, default=20)
    parser.add_argument("--base", help="a pipeline that was trained without the style")
    parser.add_argument("--base_steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--num_images", type=int, default=1024)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--weights", default="auto", help="as for complexity-dit evaluate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folders, minutes = split(options), {}

    start = time.process_time()
    base = options.base
    if base is None:
        run = config_of("wikiart-cpu.yaml", out=str(options.out / "base"), resume="auto")
        data = dataclasses.replace(run.data, source=f"imagefolder:{folders['others']}")
        run = dataclasses.replace(run, data=data, steps=options.base_steps or run.steps)
        base = str(trained(run))
        minutes["base"] = (time.process_time() - start) / 60
    before = load_pipeline(base)
    if options.style in before.label_names["style"]:
        raise SystemExit(f"{base} was trained with {options.style}: choose a base without it")

    start = time.process_time()
    run = config_of("lora-style.yaml", out=str(options.out / "lora"), resume="auto", init_from=base)
    run = dataclasses.replace(
        run,
        steps=options.steps or run.steps,
        data=dataclasses.replace(
            run.data,
            source=f"imagefolder:{folders['paintings']}",
            resolution=before.sample_size,
        ),
        lora=dataclasses.replace(
            run.lora, rank=options.rank or run.lora.rank, labels={"style": options.style}
        ),
    )
    adapter = trained(run)
    minutes["adapter"] = (time.process_time() - start) / 60
    after = load_pipeline(str(adapter))

    start = time.process_time()
    size = before.sample_size
    reference, few = pixels(folders["rest"], size), pixels(folders["paintings"], size)
    sets = {
        "base": samples(before, None, options),
        "adapter": samples(after, options.style, options),
        "other_paintings": pixels(folders["others"], size, options.num_images),
    }
    measures = EvalConfig(
        weights=options.weights, measures=["kid"], kid_subset_size=min(500, len(reference)),
        bootstrap=0, curve=False, device="cpu", quiet=True,
    )  # fmt: skip
    kid = {name: evaluate_images(images, reference, measures).metrics
           for name, images in sets.items()}  # fmt: skip
    minutes["painting and measuring"] = (time.process_time() - start) / 60

    columns = 10
    rows = [few[:columns], *(sets[name][:columns] for name in ("base", "adapter"))]
    captions = [f"{len(few)} paintings", "base", "adapter"]
    save_grid(np.concatenate(rows), columns, captions, options.out / "samples.png")
    result = {
        "style": options.style,
        "metrics": kid,
        "n_reference": len(reference),
        "n_generated": options.num_images,
        "adapter_bytes": (adapter / "pytorch_lora_weights.safetensors").stat().st_size,
        "base_parameters": sum(p.numel() for p in before.transformer.parameters()),
        "settings": {
            "train": dataclasses.asdict(run), "evaluation": dataclasses.asdict(measures),
            "guidance_scale": options.guidance_scale, "paintings": options.paintings,
            "seed": options.seed,
        },
        "core_minutes": {name: round(value, 1) for name, value in minutes.items()},
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }  # fmt: skip
    with atomic_file(options.out / "result.json") as part:
        part.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(json.dumps({"metrics": kid, "core_minutes": result["core_minutes"]}, indent=2))


if __name__ == "__main__":
    main()
