"""Model cards: the README.md of a pipeline or adapter folder, from what is in the folder.

A card is written again by every save, unless someone has edited it: only a file that ends with our
mark is replaced.
"""

import html
import json
import re
from keyword import iskeyword
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from complexity_dit.config import ADAPTER_FILE, DATA_FILE
from inl_core.run.files import atomic_file
from inl_core.run.json_files import one_line

CARD_FILE, GRID_FILE = "README.md", "samples.png"
_MARK = "<!-- Written by complexity-dit; it is kept as it is once this line is gone. -->"
_METRICS = {
    "fid": "FID", "kid_mean": "KID", "precision": "Precision", "recall": "Recall",
    "density": "Density", "coverage": "Coverage", "fd_random": "Distance of random features",
    "fd_dinov2": "FD-DINOv2",
}  # fmt: skip
_SHOWN = 40

_LIMITS = """\
- Pictures look like the training data: its subjects, its cropping, its gaps and its prejudices.
- Labels are those of the data; a combination that was never seen together is a guess.
- A small set of pictures seen many times can be remembered. Compare samples with the nearest
  training pictures (`complexity-dit evaluate --memorisation true`) before you call one new.
- FID and KID say how far sets of pictures are apart, by one network that was trained on
  photographs, and depend on their number. They do not say whether a painting is good."""

_WIKIART = """\
The pictures are from WikiArt, whose labels and scans are offered for **non-commercial research
only**; many of the paintings are in the public domain and some are not. These weights carry the
same restriction: use them for research, not for trade."""


def write_card(
    folder: Path,
    result: dict[str, Any] | Path | None = None,
    grid: Image.Image | Path | None = None,
    name: str | None = None,
) -> Path:
    """Write the card of a saved pipeline, or of an adapter, from the files in its folder.

    Args:
        folder: As `save_pretrained` or a training wrote it.
        result: What `complexity-dit evaluate` wrote, or its file: metrics and protocol.
        grid: Samples to show; kept as `samples.png` in the folder. None shows those that are there.
        name: How a user calls it, e.g. a Hub id; the folder's name by default.

    Returns:
        The card's path. A card that was edited is left alone.

    Raises:
        OSError: If a file cannot be read or written.
    """
    card = folder / CARD_FILE
    if grid is not None:
        with atomic_file(folder / GRID_FILE) as aside:
            if isinstance(grid, Path):
                with Image.open(grid) as picture:
                    picture.save(aside, format="PNG")
            else:
                grid.save(aside, format="PNG")
    if card.exists() and _MARK not in card.read_text():
        return card
    if isinstance(result, Path):
        result = json.loads(result.read_text())
    name = name or folder.resolve().name
    data = _read(folder / DATA_FILE)
    about = _read(folder / ADAPTER_FILE)
    index = _read(folder / "model_index.json")
    parts = [f"# {name}"]
    if (folder / GRID_FILE).is_file():
        parts.append(f"![Samples]({GRID_FILE})")
    if about:
        parts += [_adapter_use(name, about), _labels(about["labels"])]
    else:
        known = {f: [names[i] for i in names] for f, names in index["id2label"].items()}
        parts += [_use(name, known), _labels(known), _made(folder, index)]
    parts += [_data(data), _evaluation(result), f"## Limits\n\n{_LIMITS}", _licence(data), _MARK]
    text = "\n\n".join(part for part in parts if part)
    with atomic_file(card) as aside:
        aside.write_text(f"---\n{_front(name, data, about, result)}\n---\n\n{text}\n")
    return card


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _front(name: str, data: dict, about: dict, result: dict | None) -> ModelCardData:
    source = str(data.get("source", ""))
    scheme, _, place = source.partition(":")
    licence: dict[str, Any] = {}
    if _is_wikiart(data):
        licence = {"license": "other", "license_name": "non-commercial-research"}
    elif source == "art":
        licence = {"license": "apache-2.0"}
    metrics = {k: v for k, v in (result or {}).get("metrics", {}).items() if k in _METRICS}
    shown = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=_source_name(result["settings"]["data"]),
            dataset_name=_source_name(result["settings"]["data"]),
            dataset_split="heldout",
            metric_type=metric,
            metric_name=f"{_METRICS[metric]} ({result['n_generated']} samples)",
            metric_value=value,
        )
        for metric, value in metrics.items()
        if result is not None
    ]
    base = about.get("base")
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        base_model=base if base and _on_the_hub(base) else None,
        tags=["complexity-dit", "diffusion-transformer", "inl-dynamics"] + ["lora"] * bool(about),
        datasets=[place] if scheme == "hub" and not Path(place).is_dir() else None,
        model_name=name if shown else None,
        eval_results=shown or None,
        **licence,
    )  # fmt: skip


def _use(name: str, labels: dict[str, list[str]]) -> str:
    asked = _asked(labels)
    return f"""\
Pictures from labels by a diffusion transformer with INL dynamics
([complexity-dit](https://pypi.org/project/complexity-dit/)).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
image = pipe({asked}).images[0]
```

`trust_remote_code` runs two one-line modules of the folder that import the installed package
`complexity_dit`; `complexity_dit.ComplexityDiTPipeline.from_pretrained` needs no such trust."""


def _adapter_use(name: str, about: dict) -> str:
    asked = _asked(about["labels"])
    base = about["base"] if _on_the_hub(about["base"]) else Path(about["base"]).name
    return f"""\
An adapter (LoRA) of the pipeline `{base}`.

```python
from complexity_dit import ComplexityDiTPipeline

pipe = ComplexityDiTPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{name}")
image = pipe({asked}).images[0]
```

It fits the base whose transformer has the sha256 `{about["base_sha256"]}`."""


def _labels(labels: dict[str, list[str]]) -> str:
    if not any(labels.values()):
        return ""
    rows = [
        f"- **{_plain(field)}** ({len(names)}): {', '.join(map(_plain, names[:_SHOWN]))}"
        + (", …" if len(names) > _SHOWN else "")
        for field, names in labels.items()
    ]
    return "## Labels\n\n" + "\n".join(rows)


def _asked(labels: dict[str, list[str]]) -> str:
    """The first name of each field as arguments of a call; names can be any text."""
    quoted = {
        field: json.dumps(names[0], ensure_ascii=False).replace("`", "\\u0060")
        for field, names in labels.items()
    }
    if all(field.isidentifier() and not iskeyword(field) for field in quoted):
        return ", ".join(f"{field}={name}" for field, name in quoted.items())
    pairs = (f"{json.dumps(field)}: {name}" for field, name in quoted.items())
    return "**{" + ", ".join(pairs).replace("`", "\\u0060") + "}"


def _plain(text: str) -> str:
    """A name within Markdown: no HTML, link, code or line end of its own."""
    return re.sub(r"([\[\]`|\\*])", r"\\\1", html.escape(one_line(text), quote=False))


def _made(folder: Path, index: dict) -> str:
    network = _read(folder / "transformer" / "config.json")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    vae = index.get("vae") or [None, None]
    rows = {
        "network": f"{network['num_layers']} layers, {network['hidden_size']} wide, "
        f"{network['num_attention_heads']} heads, patch {network['patch_size']}",
        **_dynamics(network),
        "input": f"{network['in_channels']} channels of {network['sample_size']} x "
        f"{network['sample_size']}, " + (f"latents of {vae[1]}" if vae[1] else "pixels"),
        "scheduler": scheduler,
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["## How it is made", "", "| | |", "|---|---|", *lines])


def _dynamics(network: dict) -> dict[str, str]:
    """Nothing for another denoiser that was trained in our loop."""
    placement = network.get("dynamics_placement")
    if placement is None:
        return {}
    adaptive = "" if placement == "none" else f", {network['dynamics_adaptive']}"
    return {"dynamics": placement + adaptive}


def _data(data: dict) -> str:
    if not data:
        return "## Data\n\nNot recorded in this folder."
    return (
        f"## Data\n\n{_source_name(data)} at {data['resolution']} px, {data['holdout']:.0%} of the "
        "pictures held out by the hash of their files"
        + (", mirrored half of the time." if data["flip"] else ".")
    )


def _evaluation(result: dict | None) -> str:
    if result is None:
        return "## Evaluation\n\nNo result was given when this card was written."
    settings, sample = result["settings"], result["settings"]["sample"]
    extractor = settings["extractor"]
    lines = ["## Evaluation", "", "| metric | value |", "|---|---|"]
    lines += [
        f"| {_METRICS.get(name, name)} | {value:.4g} |" for name, value in result["metrics"].items()
    ]
    protocol = (
        f"{result['n_generated']} samples against {result['n_reference']} held-out pictures of "
        f"{_source_name(settings['data'])}; {sample['num_inference_steps']} steps, guidance "
        f"{sample['guidance_scale']:g}, seed {sample['seed']}; features of {extractor['name']} "
        f"(weights {extractor['weights_sha256'][:16]}), resize {extractor['resize']}, "
        f"{extractor['dtype']}; reference {result['reference_fingerprint'][:16]}."
    )
    if "fd_random" in result["metrics"]:
        protocol += " Features of a random network are **not** FID and compare with nothing else."
    return "\n".join([*lines, "", protocol])


def _licence(data: dict) -> str:
    if _is_wikiart(data):
        text = _WIKIART
    elif data.get("source") == "art":
        text = "Apache-2.0; the training pictures are drawn by the package itself."
    else:
        text = "Not stated: it depends on the training pictures. State it before you publish."
    return f"## Licence\n\n{text}"


def _on_the_hub(base: str) -> bool:
    """Whether an adapter's base is a Hub id; a folder is written as a path from the adapter's."""
    return base.count("/") == 1 and not base.startswith((".", "/"))


def _is_wikiart(data: dict) -> bool:
    return "wikiart" in str(data.get("source", "")).casefold()


def _source_name(data: dict | None) -> str:
    """What the pictures are, without the paths of the machine that read them."""
    if not data:
        return "unknown pictures"
    scheme, _, place = str(data["source"]).partition(":")
    if scheme == "art":
        return "the embedded art set"
    return Path(place).name if scheme != "hub" or Path(place).is_dir() else place
