"""A finished run as a folder of `checkpoints/`: weights of 16 bits, the autoencoder, a model card.

    python -m benchmarks.recipe.paintings_checkpoint RUN --out checkpoints/wikiart-128 \
        --results EVALUATION … --floors benchmarks/results.csv --grid FILE.png \
        --vae_name TAEF2 --vae_licence FILE

The weights are those of the run, or of `--weights`, such as a folder of `complexity-dit average`:
in bfloat16, those of a text encoder too, the autoencoder in float16, as TAEF2 is published. Loading
widens all to float32.

`--results` are folders of `complexity-dit evaluate`, of these weights before or after the rounding
and of one protocol: a column of the card for each guidance, and a section about copies from those
with `--memorisation true`. The guidance of the best one becomes that of the pipeline. `--floors` is
a CSV with rows of `recipe_floor` for the same pictures: a column for each of its cases.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import yaml
from benchmarks.common.memory import parameters
from benchmarks.common.results import read_rows

from complexity_dit.config import AVERAGE_FILE, DATA_FILE, GUIDANCE
from complexity_dit.data.clusters import CLUSTERS_FILE
from complexity_dit.evaluation.evaluate import SAMPLES_FOLDER
from complexity_dit.evaluation.report import read_result
from complexity_dit.pipelines.model_card import write_card
from complexity_dit.pipelines.sample_folders import SETTINGS_FILE
from complexity_dit.pipelines.sampling import find_pipeline, load_pipeline, pipeline_hash
from inl_core.run.checkpoints import latest_checkpoint, step_of
from inl_core.run.errors import UserError
from inl_core.run.folders import new_folder
from inl_core.run.json_files import read_json_object

MAX_BYTES = 40_000_000
"""Most of a folder, which every clone of the repository downloads."""
LICENCE_FILE = "LICENSE"


def ship(options):
    """Write the folder; its size in bytes.

    Raises:
        UserError: It exists or would be too large, there is no pipeline, or a result is of other
            weights or another protocol than the others, or a floor of another number of pictures.
    """
    place = options.weights or options.run
    pipe, source = load_pipeline(str(place)), find_pipeline(place)
    trained = pipeline_hash(pipe)
    for network in filter(None, (pipe.transformer, pipe.text_encoder)):
        network.to(torch.bfloat16)
    if pipe.vae is not None:
        pipe.vae.to(torch.float16)
    with new_folder(options.out) as folder:
        for name in (CLUSTERS_FILE, AVERAGE_FILE):
            if (source / name).is_file():
                shutil.copy(source / name, folder)
        (folder / DATA_FILE).write_text(json.dumps(portable(source / DATA_FILE), indent=2) + "\n")
        pipe.save_pretrained(folder)
        rounded = pipeline_hash(load_pipeline(str(folder)))
        results, weights = read_results(options.results, {trained, rounded})
        alone = [one for one in results if not one["settings"]["sample"]["autoguidance"]]
        if alone:
            best = alone[0]["settings"]["sample"]
            pipe.guidance = {name: best[name] for name in GUIDANCE}
            pipe.save_pretrained(folder)
        facts = training_of(options.run, source) | sizes_of(pipe, options)
        if options.vae_licence:
            shutil.copy(options.vae_licence, folder / "vae" / LICENCE_FILE)
        if results:
            exact = weights == {rounded}
            facts["evaluated weights"] = "as stored" if exact else "before the rounding to 16 bits"
        floors = read_floors(options.floors, results[0]) if options.floors and results else {}
        write_card(folder, results, options.grid, facts=facts, floors=floors)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise UserError(f"{options.out} would have {size:,} bytes; at most {MAX_BYTES:,} fit")
    return size


def portable(path):
    """The settings of the training data without paths of this machine."""
    data = read_json_object(path) | {"vae": None}
    scheme, _, place = data["source"].partition(":")
    if scheme == "imagefolder":
        data["source"] = f"imagefolder:{Path(place).name}"
    return data


def read_results(folders, known):
    """The results of evaluations, the best first, and the hashes of the weights they are of."""
    results, weights, protocols = [], set(), set()
    for folder in folders:
        result, settings = read_result(folder), Path(folder, SAMPLES_FOLDER, SETTINGS_FILE)
        found = read_json_object(settings)["pipeline_sha256"] if settings.is_file() else None
        if found not in known:
            raise UserError(f"{folder} is no evaluation of these weights, with its samples kept")
        sample, scheduler = (result["settings"][name] for name in ("sample", "scheduler"))
        protocol = [result[name] for name in ("n_generated", "reference_fingerprint")]
        protocol += [result["settings"].get(name) for name in ("extractor", "prompts")]
        protocol += [sample["seed"], sample["num_inference_steps"]]
        protocol += [scheduler.get(name) for name in ("class", "shift", "flow_shift")]
        results.append(result)
        weights.add(found)
        protocols.add(json.dumps(protocol))
    if len(protocols) > 1:
        raise UserError(f"the protocols of {', '.join(folders)} differ: evaluate them alike")
    return sorted(results, key=lambda one: next(iter(one["metrics"].values()))), weights


def read_floors(path, result):
    """{real pictures: metrics} of the newest rows of `recipe_floor`."""
    cases = {}
    for row in read_rows(path):
        if row["bench"] == "recipe_floor":
            cases.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    n = result["n_generated"]
    if not cases or any(values["n"] != n for values in cases.values()):
        raise UserError(f"{path} has no rows of recipe_floor for {n} pictures")
    return {
        case: {name: values[name] for name in result["metrics"] if name in values}
        for case, values in cases.items()
    }


def training_of(run, source):
    """How long the weights were trained, for the card."""
    average = source / AVERAGE_FILE
    if average.is_file():
        step = read_json_object(average)["step"]
    else:
        step = step_of(latest_checkpoint(run / "checkpoints"))
    batch = yaml.safe_load((run / "config.yaml").read_text())["batch_size"]
    return {"training": f"{step:,} steps of {batch} images, {step * batch:,} in all"}


def sizes_of(pipe, options):
    """Parameters and types of the networks, for the card."""
    facts = {"parameters": f"{parameters(pipe.transformer):,}, stored in bfloat16"}
    if pipe.text_encoder is not None:
        size = f"{parameters(pipe.text_encoder):,}"
        facts["parameters of the text encoder"] = f"{size}, stored in bfloat16"
    if pipe.vae is not None:
        name = options.vae_name or type(pipe.vae).__name__
        facts["autoencoder"] = f"{name}, {parameters(pipe.vae):,} parameters, stored in float16"
        if options.vae_licence:
            title = options.vae_licence.read_text().split("\n", 1)[0]
            facts["licence of the autoencoder"] = f"{title}, see vae/{LICENCE_FILE}"
    return facts


def main():
    """Write the folder and print its size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("--weights", type=Path, help="pipeline folder; by default the run's")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--results", nargs="*", default=[], help="folders of evaluations")
    parser.add_argument("--floors", type=Path, help="CSV with rows of recipe_floor")
    parser.add_argument("--grid", type=Path, help="picture of samples for the card")
    parser.add_argument("--vae_name", help="what the autoencoder is called")
    parser.add_argument("--vae_licence", type=Path, help="file of its licence, which is copied")
    options = parser.parse_args()
    try:
        print(f"{options.out} has {ship(options) / 1e6:.1f} MB")
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
