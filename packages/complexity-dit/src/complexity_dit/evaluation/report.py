"""Results for people: the table on the terminal, report.html, and the comparison of two results."""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import make_grid

from inl_core.run.errors import UserError
from inl_core.run.json_files import fits, one_line, read_json_object

if TYPE_CHECKING:  # `compare` does not need the pipeline
    from complexity_dit.evaluation.breakdown import Memorisation


def format_result(result: dict[str, Any]) -> str:
    """Table of a result for the terminal."""
    extractor, n = result["settings"]["extractor"], result["n_reference"]
    lines = [
        f"n = {result['n_generated']} generated, {'an unknown number of' if n is None else n} "
        "reference images",
        f"features: {extractor['name']} ({extractor['weights_source']}), "
        f"resize {extractor['resize']}, {extractor['dtype']}",
    ]
    if "fd_random" in result["metrics"]:
        lines.append("fd_random comes from a random network: it is NOT FID, nor comparable with it")
    elif extractor["name"].partition("-")[0] not in ("inception", "random"):
        lines.append("the distance is named after its network: it is NOT FID")
    width = max(map(len, result["metrics"]), default=0)
    lines += [f"  {name:<{width}}  {value:.6g}" for name, value in result["metrics"].items()]
    lines += [f"  {name}: absent, {why}" for name, why in result["absent"].items()]
    if labels := result["per_label"].get("labels"):
        width = max(map(len, labels))
        lines.append(f"by {result['per_label']['field']}:")
        lines += [f"  {name:<{width}}  {_label_line(row)}" for name, row in labels.items()]
    if prompts := result.get("prompts"):
        lines.append(f"prompts, by probes fitted on {prompts['n_train']:,} training images:")
        rows = [("", *_PROMPT_SIDES), *_prompt_rows(prompts)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for name, *cells in rows:
            numbers = (f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([f"  {name:<{widths[0]}}", *numbers]).rstrip())
    return "\n".join(lines)


_PROMPT_SIDES = ("n", "painted", "real", "ratio", "shuffled")


def _prompt_rows(prompts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the measures of prompts, with the columns `_PROMPT_SIDES` after their name."""
    rows = dict(prompts["fields"])
    if words := prompts.get("words"):
        rows["words (AUC)"] = words
    table = [
        (name, *("" if row.get(k) is None else f"{row[k]:.4g}" for k in _PROMPT_SIDES))
        for name, row in rows.items()
    ]
    for name, key in (("similar", "similar_caption"), ("other", "other_caption")):
        row = prompts.get("copies", {}).get(key, {})
        if row.get("n"):
            label = f"near copies, {name} caption"
            table.append((label, str(row["n"]), f"{row['near_copies']:.4g}", "", "", ""))
    return table


def _label_line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return row["skipped"]
    numbers = [f"{k} {v:.5g}" for k, v in row.items() if k.startswith(("fid", "fd", "kid_m", "kd"))]
    return f"n {row['n']}  " + "  ".join(n for n in numbers if "_std" not in n)


# Comparison of two results

# Settings on which the compared numbers do not depend: names, speed, output, additional measures.
# n_generated and n_reference are compared in place of num_images, reference_fingerprint in place of
# data.
IGNORED_SETTINGS = (
    "target", "reference", "data", "vae", "shrunk", "n_train", "extractor.weights_source",
    "sample.batch_size", "eval.num_images", "eval.weights", "eval.device", "eval.measures",
    "eval.curve", "eval.label_field", "eval.label_min", "eval.floors", "eval.memorisation",
    "eval.memorisation_images", "eval.prompts", "eval.keep_images", "eval.report",
    "eval.save_statistics", "eval.cache", "eval.overwrite", "eval.quiet",
)  # fmt: skip
# Settings that older results lack, with the value they had.
_LATER_SETTINGS = {"sample.internal_guidance_scale": 1.0}
_TOP = ("n_generated", "n_reference", "weights_sha256", "reference_fingerprint")


def compare(first: str | Path, second: str | Path, allow: Sequence[str] = ()) -> str:
    """Table of two results.

    Args:
        first: A ``result.json`` or its folder.
        second: Another.
        allow: Settings that may differ, such as ``sample.guidance_scale``; a prefix (``sample``)
            allows all settings below it. They are listed above the table.

    Returns:
        The table as text.

    Raises:
        UserError: A file is not a result, or settings differ that are not allowed to (they are
            named).
    """
    a, b = read_result(first), read_result(second)
    differing = {
        name: f"{name}: " + " and ".join("nothing" if v is None else str(v) for v in pair)
        for name, pair in different_settings(a, b).items()
    }
    refused = [line for name, line in differing.items() if not _covered(name, allow)]
    if refused:
        raise UserError(
            f"{first} and {second} were measured under different settings:\n  "
            + "\n  ".join(refused)
            + "\nMeasure both under the same settings, or allow a difference with --allow"
        )
    lines = [
        f"A = {first} ({a['settings'].get('target')})",
        f"B = {second} ({b['settings'].get('target')})",
        *(f"different by --allow: {line}" for line in differing.values()),
    ]
    rows = [("", "A", "B", "B - A")]
    for name in dict.fromkeys([*a["metrics"], *b["metrics"]]):
        x, y = a["metrics"].get(name), b["metrics"].get(name)
        gap = f"{y - x:+.4g}" if x is not None and y is not None else ""
        rows.append((name, *("" if v is None else f"{v:.6g}" for v in (x, y)), gap))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def different_settings(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Differing settings on which the numbers depend: name -> both values, in order."""
    flat_a, flat_b = (
        {name: result.get(name) for name in _TOP} | _LATER_SETTINGS | _flat(result["settings"])
        for result in (a, b)
    )
    names = [n for n in dict.fromkeys([*flat_a, *flat_b]) if not _covered(n, IGNORED_SETTINGS)]
    return {n: (flat_a.get(n), flat_b.get(n)) for n in names if flat_a.get(n) != flat_b.get(n)}


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result.json, or the one in a folder.

    Raises:
        UserError: There is no such file, or it is not a result.
    """
    file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
    try:
        result = read_json_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a result ({error})") from error
    metrics, settings = result.get("metrics"), result.get("settings")
    if not fits(metrics, dict[str, float | None]) or not fits(settings, dict[str, Any]):
        raise UserError(
            f"{file} is not a result.json of complexity-dit evaluate, which has numbers under "
            "`metrics` and their settings under `settings`"
        )
    return result


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _covered(name: str, names: Sequence[str]) -> bool:
    return any(name == covering or name.startswith(covering + ".") for covering in names)


# Charts, as SVG elements


def curve_chart(curve: dict[str, Any], name: str) -> str:
    """Distance over 1 / n, with the line to infinite n and its interval."""
    figure, axes = _figure(3.2)
    inverse = 1 / np.asarray(curve["sizes"], float)
    axes.plot(inverse, curve["values"], "o", color="C0", label="measured")
    # The line of `fid_curve`: the same weights, through the same points.
    line = np.polyfit(inverse, curve["values"], 1, w=np.sqrt(1 / inverse))
    ends = np.array([0, inverse.max()])
    axes.plot(ends, np.polyval(line, ends), "--", color="0.6", label="line in 1/n")
    half = (curve["high"] - curve["low"]) / 2
    axes.errorbar([0], [curve["infinity"]], [half], fmt="s", color="C1", capsize=4, label="n → ∞")
    axes.set_xticks([0, *inverse], ["∞", *(f"{n:,}" for n in curve["sizes"])])
    axes.set(xlabel="n (spaced as 1/n)", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def label_chart(labels: dict[str, dict[str, Any]]) -> str:
    """Frechet distance of each label as a bar, with its floor as a mark."""
    rows = {name: row for name, row in labels.items() if "n" in row}
    if not rows:
        return ""
    key = next(k for k in next(iter(rows.values())) if k == "fid" or k.startswith("fd_"))
    figure, axes = _figure(0.6 + 0.32 * len(rows))
    places = np.arange(len(rows))
    axes.barh(places, [row[key] for row in rows.values()], height=0.6, color="C0")
    floors = [
        (place, row["floor"][key])
        for place, row in zip(places, rows.values(), strict=True)
        if "n" in row.get("floor", {})
    ]
    if floors:
        at, values = zip(*floors, strict=True)
        axes.plot(values, at, "|", color="black", markersize=14, label="training images")
        axes.legend(frameon=False)
    names = [f"{one_line(name)} ({row['n']})" for name, row in rows.items()]
    axes.set_yticks(places, names, parse_math=False)  # "$" in a name is not mathematics
    axes.invert_yaxis()
    axes.set(xlabel="FID, each label at its own n (in brackets)" if key == "fid" else key)
    axes.grid(alpha=0.3, axis="x")
    return _svg(figure)


def nearest_chart(copies: "Memorisation") -> str:
    """Distances to the nearest training image, of samples and of held-out images."""
    figure, axes = _figure(2.8)
    edges = np.histogram_bin_edges(np.concatenate([copies.samples, copies.heldout]), 50)
    for distances, label in ((copies.heldout, "held-out images"), (copies.samples, "samples")):
        axes.hist(distances, edges, density=True, alpha=0.55, label=label)
    axes.set(xlabel="distance to the nearest training image", ylabel="density", xlim=(0, None))
    axes.legend(frameon=False)
    return _svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.5, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    """The SVG element alone: no prologue, no date, text as text, and reproducible ids."""
    with rc_context({"svg.hashsalt": "complexity-dit", "svg.fonttype": "none"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # The metadata element refers to vocabularies by URL, and the page refers to nothing outside.
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


# The page

GRID_IMAGES = 64
GRID_COLUMNS = 16
LARGEST_SIDE = 96
"""Side in pixels to which larger images are reduced in the report."""

_MEANINGS = {
    "fid": "Fréchet Inception distance at this n; lower is better, compare at equal n only",
    "fd": "Fréchet distance in the features of this network; it is not FID",
    "kid_mean": "kernel Inception distance, unbiased at any n",
    "kd_mean": "kernel distance in the features of this network; it is not KID",
    "_std": "standard deviation over subsets",
    "_stderr": "standard error over new images",
    "_infinity": "extrapolated to infinite n",
    "_infinity_low": "lower end of its 95 % interval",
    "_infinity_high": "upper end of its 95 % interval",
    "_train": "floor: as many training images instead of samples",
    "_vae": "floor: held-out images encoded and decoded by the VAE",
    "_shrunk": "held-out images reduced to 8 px and enlarged: colours without structure",
    "precision": "fraction of samples within the manifold of the reference",
    "recall": "fraction of reference images within the manifold of the samples",
    "density": "density of reference images around samples",
    "coverage": "fraction of reference images with a sample nearby",
    "inception_score_mean": "Inception score",
    "inception_score_std": "its standard deviation over splits",
    "label_accuracy": "fraction of samples whose nearest class mean is that of their label",
    "label_accuracy_real": "the same for reference images",
    "closer_than_1_percent": "fraction of samples nearer to training images than 99 % of held-out "
    "images; 0.01 if samples resemble them",
}

_PAGE = """\
{%- macro picture(image) -%}
<img alt="" width="{{ image.width }}" height="{{ image.height }}" src="{{ image.source }}">
{%- endmacro -%}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.about { color: #555; margin-top: .3rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem .25rem 0; text-align: left;
        vertical-align: top; border-bottom: 1px solid #e4e4e4; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: #555; font-size: .9rem; } .warning { background: #fff3cd; padding: .5rem .8rem; }
img, svg { max-width: 100%; height: auto; } img { image-rendering: pixelated; }
figure { margin: 0; } .pairs { display: flex; flex-wrap: wrap; gap: .8rem; }
.pairs figcaption { font-size: .8rem; color: #555; } pre { overflow-x: auto; font-size: .8rem; }
</style></head>
<body>
<h1>Evaluation</h1>
<p class="about">{{ settings.target }} against {{ settings.reference }}: n = {{ n_generated }}
generated, {{ "an unknown number of" if n_reference is none else n_reference }} reference images.
Features: {{ extractor.name }}, resize {{ extractor.resize }}, {{ extractor.dtype }}.</p>
{% if not extractor.name.startswith("inception") %}
<p class="warning">These distances are named after their network. They are not FID, and are
comparable only with distances of the same network.</p>
{% endif %}
<h2>Numbers</h2>
<table>{% for name, value in metrics.items() %}
<tr><td>{{ name }}</td><td class="number">{{ "%.6g" % value }}</td>
<td class="note">{{ meaning(name) }}</td></tr>{% endfor %}</table>
{% if absent %}
<p class="note">Not measured:</p><ul class="note">{% for name, why in absent.items() %}
<li>{{ name }}: {{ why }}</li>{% endfor %}</ul>
{% endif %}
{% if curve %}
<h2>Distance over n</h2>{{ curve|safe }}
<p class="note">Both sides in disjoint parts of n images, and the weighted straight line over 1/n;
the bar is the 95 % interval at infinite n.</p>
{% endif %}
{% if per_label %}
<h2>By {{ per_label.field }}</h2>{{ label_bars|safe }}
<table>
<tr><th>label</th><th>n</th><th>distance</th><th>kernel distance</th><th>floor</th><th></th></tr>
{% for name, row in per_label.labels.items() %}<tr><td>{{ name }}</td>
{%- if row.skipped %}<td></td><td></td><td></td><td></td><td>{{ row.skipped }}</td>
{%- else %}<td>{{ row.n }}</td><td>{{ "%.5g" % number(row, "") }}</td>
<td>{{ "%.4g" % number(row, "_mean") -}}
{% if number(row, "_stderr") is not none %} ± {{ "%.2g" % number(row, "_stderr") }}{% endif %}</td>
<td>{% if row.floor and "n" in row.floor -%}
{{ "%.5g (n %d)" % (number(row.floor, ""), row.floor.n) }}{% endif %}</td><td></td>
{%- endif %}</tr>
{% endfor %}</table>
{% endif %}
<h2>Samples</h2>{{ picture(samples) }}
{% if reference %}<h2>Reference</h2>{{ picture(reference) }}{% endif %}
{% if copies %}
<h2>Nearest training images</h2>{{ nearest|safe }}
<p class="note">A sample is nearer than a held-out image with probability
{{ "%.3f" % copies.probability_closer }} (0.5 if samples resemble held-out images);
{{ "%.2f" % (100 * copies.closer_than_1_percent) }} % of samples are nearer than 99 % of held-out
images (1 % if they resemble them). Below, the closest pairs: sample (left), training image (right)
and their distance.</p>
<div class="pairs">{% for sample, other, caption in pairs %}
<figure>{{ picture(sample) }} {{ picture(other) }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>
{% endif %}
{% if prompts %}
<h2>Prompts</h2>
<table><tr><th></th>{% for side in prompt_sides %}<th>{{ side }}</th>{% endfor %}</tr>
{% for row in prompt_rows %}<tr><td>{{ row[0] }}</td>
{%- for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p class="note">Share of samples (painted) and of real images that a linear probe assigns to what
the prompt says, and for words the mean AUC of theirs; shuffled: the same samples and permuted
prompts. A near copy is nearer to a training image than 99 % of held-out images. prompts.csv has a
line for each sample.</p>
{% endif %}
<h2>Settings</h2>
<details><summary>All settings</summary><pre>{{ all_settings }}</pre></details>
</body></html>
"""


@dataclass
class Pictures:
    """Images of a report, uint8 (n, H, W, 3), and pairs of a sample and a training image."""

    samples: NDArray[np.uint8]
    reference: NDArray[np.uint8] | None = None
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]] = field(default_factory=list)


def render(result: dict[str, Any], pictures: Pictures, copies: "Memorisation | None" = None) -> str:
    """The page as text, which refers to nothing outside itself."""
    metrics, curve = result["metrics"], result["fid_over_n"]
    labels = result["per_label"].get("labels", {})
    name = next((m for m in metrics if m == "fid" or m.startswith("fd_")), "fid")
    kept = ("settings", "versions", "weights_sha256", "reference_fingerprint", "target_fingerprint")
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_PAGE).render(
        result,
        extractor=result["settings"]["extractor"],
        meaning=_meaning,
        number=_number,
        # Charts are inserted as SVG, in which matplotlib has escaped all text.
        curve=curve_chart(curve, "FID" if name == "fid" else name) if curve else "",
        label_bars=label_chart(labels),
        nearest=nearest_chart(copies) if copies else "",
        copies=copies,
        prompt_sides=_PROMPT_SIDES,
        prompt_rows=_prompt_rows(result["prompts"]) if result.get("prompts") else [],
        samples=_picture(pictures.samples),
        reference=None if pictures.reference is None else _picture(pictures.reference),
        pairs=[(_picture(a[None]), _picture(b[None]), text) for a, b, text in pictures.pairs],
        all_settings=json.dumps({key: result[key] for key in kept}, indent=2),
    )


def _meaning(name: str) -> str:
    if name in _MEANINGS:
        return _MEANINGS[name]
    if name.startswith("kd_") and name.endswith("_mean"):
        return _MEANINGS["kd_mean"]
    ends = [end for end in _MEANINGS if end.startswith("_") and name.endswith(end)]
    return _MEANINGS[max(ends, key=len)] if ends else _MEANINGS["fd"]


def _number(row: dict[str, Any], end: str) -> float | None:
    """The Frechet distance in a label's row (end ""), or a number of its kernel distance."""
    starts = ("kid", "kd_") if end else ("fid", "fd_")
    return next((v for k, v in row.items() if k.startswith(starts) and k.endswith(end)), None)


def _picture(images: NDArray[np.uint8]) -> dict[str, Any]:
    """A grid of images (n, H, W, 3) as attributes of an <img>; small ones are enlarged."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    height, width = x.shape[2:]
    if max(height, width) > LARGEST_SIDE:
        factor = LARGEST_SIDE / max(height, width)
        x = resize(x, [max(1, round(height * factor)), max(1, round(width * factor))])
    scale = max(1, LARGEST_SIDE // 2 // x.shape[3])
    sheet = make_grid(x, GRID_COLUMNS, padding=2 * (len(x) > 1), pad_value=255)
    file = io.BytesIO()
    to_pil_image(sheet).save(file, "PNG")
    return {
        "width": scale * sheet.shape[2],
        "height": scale * sheet.shape[1],
        "source": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    }
