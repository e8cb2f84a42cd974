"""Model cards: the README.md of a pipeline or adapter folder, from the files in the folder.

Every save writes the card again unless it was edited: only a file with the mark of this module is
replaced.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from complexity_dit.config import ADAPTER_FILE, AVERAGE_FILE, DATA_FILE, GUIDANCE, SHIPPED
from complexity_dit.labels import LabelTable
from complexity_dit.pictures import read_picture
from inl_core.run.files import atomic_file, final_path, read_text
from inl_core.run.json_files import MAX_JSON_BYTES, one_line, read_json_object
from inl_core.run.shipped import FOLDER

CARD_FILE, GRID_FILE = "README.md", "samples.png"
_MARK_START = "<!-- Written by complexity-dit;"  # also in the cards of older versions
_MARK = f"{_MARK_START} delete this line to protect your edits. -->"
_METRICS = {
    "fid": "FID", "kid_mean": "KID", "precision": "Precision", "recall": "Recall",
    "density": "Density", "coverage": "Coverage", "fd_random": "Distance of random features",
    "fd_dinov2": "FD-DINOv2",
}  # fmt: skip
_MAX_LABELS = 40
_IN_RUNS = ("pipeline", "adapter")
"""Folders of a run, whose cards have its name."""

_USE = """\
A diffusion transformer{dynamics} that generates images from {given}
([complexity-dit](https://pypi.org/project/complexity-dit/)).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name}, trust_remote_code=True)
image = pipe({arguments}).images[0]
```

`trust_remote_code` runs one-line modules in this repository that import the installed {packages}.
`complexity_dit.ComplexityDiTPipeline.from_pretrained` does not need it."""

_USE_SHIPPED = """\
The path is that in a clone of the repository. There `complexity-dit sample {title}{asked} --out
samples.png` paints a grid and `complexity-dit app {title}` opens the gallery; elsewhere both fetch
`{hub_id}` from the Hub."""

_USE_ADAPTER = """\
A LoRA adapter for the pipeline {base_text}.

```python
from complexity_dit import ComplexityDiTPipeline

pipe = ComplexityDiTPipeline.from_pretrained({base})
pipe.load_lora_weights({name})
image = pipe({arguments}).images[0]
```

It fits a base whose transformer has the sha256 {sha256}."""

_PROMPT = "a landscape with a river"

_LIMITS = """\
- Images reflect the training data: its subjects, cropping, gaps and biases.
- Labels and captions are those of the data; results for combinations that never occur in it are
  unreliable.
- A model trained on few images may memorise them. Compare samples with the nearest training images
  (`complexity-dit evaluate --memorisation true`) before you call one new.
- FID and KID measure the distance between two sets of images in the features of one network trained
  on photographs, and depend on the number of images. They do not measure whether a painting is
  good."""

_WIKIART = """\
The training images are from WikiArt. Its labels and scans are for **non-commercial research only**;
many of the paintings are in the public domain, and some are not. The same restriction applies to
these weights: use them for research, not commercially."""


def write_card(
    folder: Path,
    result: dict[str, Any] | Path | Sequence[dict[str, Any]] | None = None,
    grid: Image.Image | Path | None = None,
    name: str | None = None,
    facts: Mapping[str, str] | None = None,
    floors: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write the card of a saved pipeline or adapter from the files in its folder.

    Args:
        folder: As written by `save_pretrained` or by training.
        result: A result of `complexity-dit evaluate`, or its file: metrics and protocol. Several,
            of one protocol and different guidance, get a column each.
        grid: Samples to show, saved as `samples.png` in the folder; None shows an existing file.
        name: What a user passes to `from_pretrained`, e.g. a Hub id; by default a relative path of
            the folder, with the name of the run or the folder as the title.
        facts: What the files do not say, as rows of the table of the architecture.
        floors: Metrics of real pictures by what these are, as columns beside those of the results.

    Returns:
        The card's path. An edited card is not changed.
    """
    card = folder / CARD_FILE
    if grid is not None:
        with atomic_file(folder / GRID_FILE) as aside:
            image = read_picture(grid) if isinstance(grid, Path) else grid
            image.save(aside, format="PNG")
    if card.exists() and _MARK_START not in read_text(card, MAX_JSON_BYTES, follow_links=True):
        return card
    if isinstance(result, Path):
        result = read_json_object(result)
    results = [result] if isinstance(result, dict) else list(result or ())
    place = final_path(folder)
    title = name or (place.parent if place.name in _IN_RUNS else place).name
    is_shipped = place.parent.name == FOLDER and title in SHIPPED
    # Never a Hub id: somebody may own one of that name.
    name = name or (f"./{FOLDER}/{title}" if is_shipped else f"./{place.name}")
    data, adapter = _read(folder / DATA_FILE), _read(folder / ADAPTER_FILE)
    grid_line = f"![Samples]({GRID_FILE})" if (folder / GRID_FILE).is_file() else ""
    if adapter:
        use, labels, architecture, counts = _USE_ADAPTER, adapter["labels"], "", None
        index: dict[str, Any] = {}
        base = adapter["base"] if _is_hub_id(adapter["base"]) else f"./{Path(adapter['base']).name}"
        about = {"base": _literal(base), "base_text": _escape(base)}
        about["sha256"] = _escape(adapter["base_sha256"])
    else:
        use, index = _USE, _read(folder / "model_index.json")
        names, network = index["id2label"], _read(folder / "transformer" / "config.json")
        fields, plain = network["label_fields"], network.get("dynamics_placement") == "none"
        labels = {
            field: [names[field][str(i)] for i in range(len(names[field]))] for field in fields
        }
        counts = index.get("label_counts")
        architecture = _architecture(folder, index, facts or {})
        about = {"dynamics": "" if plain else " with INL dynamics", "given": "labels"}
        about["packages"] = "package `complexity_dit`"
    arguments, asked = _arguments(labels, counts), ""
    if reads := (index.get("text_encoder") or [None])[0] is not None:
        about["given"] = "prompts and labels" if labels else "prompts"
        if index["text_encoder"][0] != "transformers":
            about["packages"] = "packages `complexity_dit` and `complexity_lm`"
        arguments, asked = _literal(_PROMPT), f' --prompt "{_PROMPT}"'
    use = use.format(name=_literal(name), arguments=arguments, **about)
    if is_shipped:
        use += "\n\n" + _USE_SHIPPED.format(title=title, asked=asked, hub_id=SHIPPED[title])
    sections = (
        f"# {_escape(title)}", grid_line, use, _labels(labels), architecture, _data(data, counts),
        _evaluation(results, floors or {}), _prompts(results), _memorisation(results),
        f"## Limits\n\n{_LIMITS}", _licence(data), _MARK,
    )  # fmt: skip
    text = "\n\n".join(section for section in sections if section)
    with atomic_file(card) as aside:
        metadata = _metadata(title, data, adapter, results, reads)
        aside.write_text(f"---\n{metadata}\n---\n\n{text}\n")
    return card


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _metadata(
    name: str, data: dict, adapter: dict, results: list[dict], reads: bool
) -> ModelCardData:
    """The YAML header that the Hub reads."""
    scheme, _, place = str(data.get("source", "")).partition(":")
    wikiart = _is_wikiart(data)
    task = "text-to-image" if reads else "unconditional-image-generation"
    measured = []
    for result in results:
        dataset = _source_name(result["settings"]["data"])
        about = f"{result['n_generated']} samples"
        if len(results) > 1:
            about += f", {guidance_text(result['settings']['sample'])}"
        measured += [
            EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split="heldout",
                metric_type=metric,
                metric_name=f"{_METRICS[metric]} ({about})",
                metric_value=value,
            )
            for metric, value in result["metrics"].items()
            if metric in _METRICS
        ]
    base = adapter.get("base")
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        base_model=base if base and _is_hub_id(base) else None,
        tags=["complexity-dit", "diffusion-transformer", "inl-dynamics"] + ["lora"] * bool(adapter),
        datasets=[place] if scheme == "hub" and not Path(place).is_dir() else None,
        model_name=name if measured else None,
        eval_results=measured or None,
        license="other" if wikiart else "apache-2.0" if scheme == "art" else None,
        license_name="non-commercial-research" if wikiart else None,
    )


def _labels(labels: dict[str, list[str]]) -> str:
    rows = [
        f"- **{_escape(field)}** ({len(names)}): {', '.join(map(_escape, names[:_MAX_LABELS]))}"
        + (", …" if len(names) > _MAX_LABELS else "")
        for field, names in labels.items()
    ]
    return "## Labels\n\n" + "\n".join(rows) if any(labels.values()) else ""


def _arguments(labels: dict[str, list[str]], counts: dict[str, int] | None) -> str:
    """The labels of most training pictures as an argument of a call, safe for names of any text.

    Without their counts, the first name of each field.
    """
    ids = [0] * len(labels)
    if counts:
        ids = LabelTable(counts, [len(names) for names in labels.values()]).most_frequent()
    chosen = {f: names[i] for i, (f, names) in zip(ids, labels.items(), strict=True) if i >= 0}
    return f"labels={_literal(chosen)}" if chosen else ""


def _literal(value: Any) -> str:
    """Text, or a dict of texts, as Python in a block of code, which it cannot end."""
    return json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")


def _escape(text: str) -> str:
    """A name as Markdown text, without HTML, links, code or line breaks."""
    return re.sub(r"([\[\]`|\\*])", r"\\\1", html.escape(one_line(text), quote=False))


def _architecture(folder: Path, index: dict, facts: Mapping[str, str]) -> str:
    network = _read(folder / "transformer" / "config.json")
    vae = (index.get("vae") or [None, None])[1]
    size = network["sample_size"]
    rows = {
        "network": f"{network['num_layers']} layers, {network['hidden_size']} wide, "
        f"{network['num_attention_heads']} heads, patch {network['patch_size']}",
        "input": f"{network['in_channels']} channels of {size} x {size}, "
        + (f"latents of {vae}" if vae else "pixels"),
        "text encoder": (index.get("text_encoder") or [None, None])[1],
        "length of a prompt": (n := index.get("prompt_length")) and f"{n} tokens at most",
        "scheduler": _read(folder / "scheduler" / "scheduler_config.json").get("_class_name"),
    }
    if guidance := index.get("guidance"):
        rows["recommended guidance"] = guidance_text(GUIDANCE | guidance)
    placement = network.get("dynamics_placement")  # None: a denoiser of another class
    if placement is not None:
        adaptive = "" if placement == "none" else f", {network['dynamics_adaptive']}"
        rows["dynamics"] = placement + adaptive
    if early := network.get("auxiliary_layer"):
        rows["auxiliary output"] = f"after layer {early}, for internal guidance"
    if average := _read(folder / AVERAGE_FILE):
        rows["weights"] = (
            f"power-function average of length {average['length']:g} at step {average['step']}"
        )
    rows |= facts
    lines = [f"| {_escape(key)} | {_escape(str(value))} |" for key, value in rows.items() if value]
    return "\n".join(["## Architecture", "", "| | |", "|---|---|", *lines])


def _data(data: dict, counts: dict[str, int] | None) -> str:
    if not data:
        return "## Training data\n\nNot recorded in this folder."
    number = f"{sum(counts.values()):,} images of " if counts else ""
    template = data.get("caption_template")
    return (
        f"## Training data\n\n{number}{_escape(_source_name(data))} at {data['resolution']} px, "
        f"{data['holdout']:.0%} of the images held out by the hash of their files"
        + (", half of the images mirrored at random." if data["flip"] else ".")
        + (f' Captions are composed as "{_escape(template)}".' if template else "")
    )


def _evaluation(results: list[dict], floors: Mapping[str, Mapping[str, float]]) -> str:
    if not results:
        return "## Evaluation\n\nNo result was given when this card was written."
    result = results[0]
    settings, sample = result["settings"], result["settings"]["sample"]
    extractor, source = settings["extractor"], _escape(_source_name(settings["data"]))
    columns, guided = {"value": result["metrics"]}, f", {guidance_text(sample)}"
    if len(results) > 1 or floors:
        columns, guided = {}, ""
        for other in results:
            evaluations = {"network evaluations": other["settings"]["network_evaluations"]}
            column = columns.setdefault(guidance_text(other["settings"]["sample"]), {})
            column |= other["metrics"] | evaluations
        columns |= floors
    metrics = list(dict.fromkeys(metric for column in columns.values() for metric in column))
    lines = [
        "## Evaluation",
        "",
        f"| metric | {' | '.join(columns)} |",
        "|---" * len(columns) + "|---|",
    ]
    for metric in metrics:
        values = [
            f"{column[metric]:.4g}" if metric in column else "" for column in columns.values()
        ]
        lines.append(f"| {_METRICS.get(metric) or _escape(metric)} | {' | '.join(values)} |")
    asked = ", their captions as prompts" if settings.get("prompts") else ""
    protocol = (
        f"{result['n_generated']} samples against {result['n_reference']} held-out images of "
        f"{source}{asked}; {sample['num_inference_steps']} steps{guided}, "
        f"seed {sample['seed']}; "
        f"features of {_escape(extractor['name'])} "
        f"(weights {extractor['weights_sha256'][:16]}), resize {extractor['resize']}, "
        f"{extractor['dtype']}; reference {result['reference_fingerprint'][:16]}."
    )
    if "fd_random" in result["metrics"]:
        protocol += (
            " Distances in the features of a random network are **not** FID and cannot be compared "
            "with other metrics."
        )
    if by_length := result.get("average", {}).get("by_length"):
        metric = result["average"]["metric"]
        values = ", ".join(f"{_escape(k)} {value:.4g}" for k, value in by_length.items())
        protocol += (
            f" The average was chosen by {_METRICS.get(metric) or _escape(metric)} from these "
            f"lengths: {values}."
        )
    return "\n".join([*lines, "", protocol])


def _prompts(results: list[dict]) -> str:
    """What probes recognise of the prompts in samples, of the results that measured it."""
    columns: list[str] = []
    rows: dict[str, dict[str, float]] = {}
    for result in results:
        if not (found := result.get("prompts")):
            continue
        guided = guidance_text(result["settings"]["sample"])
        columns.append(guided)
        measured = {
            f"{_escape(field)}, {row['classes']} names: share recognised": row
            for field, row in found["fields"].items()
        }
        if words := found.get("words"):
            measured[f"mean AUC of {words['n']} words"] = words
        for name, row in measured.items():
            # The same images for all results, and hardly another number when permuted: the first.
            others = {"held-out images": row["real"], "permuted prompts": row["shuffled"]}
            rows[name] = others | rows.get(name, {}) | {guided: row["painted"]}
    if not rows:
        return ""
    columns += ["held-out images", "permuted prompts"]
    lines = [
        "## Prompts",
        "",
        "Probes that were fitted on the features of training images read the samples. Only names "
        "and words that a prompt has are counted.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * len(columns) + "|---|",
    ]
    for name, row in rows.items():
        values = [f"{row[column]:.3g}" if column in row else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def _memorisation(results: list[dict]) -> str:
    """The distances to the nearest training images, of the results that have them."""
    lines = []
    for result in results:
        if found := result.get("memorisation"):
            settings = result["settings"]
            lines.append(
                f"- With {guidance_text(settings['sample'])}, "
                f"{found['closer_than_1_percent']:.2%} of {result['n_generated']} samples are "
                f"nearer to one of {settings['n_searched']} training images than 99 % of "
                f"{result['n_reference']} held-out images are; of these, 1 % are. A sample is "
                "nearer than a held-out image with a probability of "
                f"{found['probability_closer']:.0%}."
            )
    return "\n".join(["## Copies of training images", "", *lines]) if lines else ""


def guidance_text(sample: dict) -> str:
    """Guidance in words. Results of older versions have no internal guidance."""
    scale, internal = sample["guidance_scale"], sample.get("internal_guidance_scale", 1)
    low, high = sample["guidance_interval"]
    text = f"{'autoguidance' if sample.get('autoguidance') else 'guidance'} {scale:g}"
    if internal != 1:
        text += f", internal guidance {internal:g}"
    if (scale, internal) != (1, 1) and (low, high) != (0, 1):
        text += f" at noise levels {low:g} to {high:g}"
    return text


def _licence(data: dict) -> str:
    if _is_wikiart(data):
        text = _WIKIART
    elif data.get("source") == "art":
        text = "Apache-2.0; the training images are drawn by the package itself."
    else:
        text = "Not stated: it depends on the training images. State it before you publish."
    return f"## Licence\n\n{text}"


def _is_hub_id(base: str) -> bool:
    """Whether an adapter's base is a Hub id; otherwise it is a path relative to the adapter."""
    return base.count("/") == 1 and not base.startswith((".", "/"))


def _is_wikiart(data: dict) -> bool:
    return "wikiart" in str(data.get("source", "")).casefold()


def _source_name(data: dict | None) -> str:
    """The name of a data source, without local paths."""
    if not data:
        return "unknown images"
    scheme, _, place = str(data["source"]).partition(":")
    if scheme == "art":
        return "the embedded art set"
    return Path(place).name if scheme != "hub" or Path(place).is_dir() else place
