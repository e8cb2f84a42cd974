"""report.html: a result as one page that opens anywhere, with its pictures and curves inside."""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from complexity_dit.evaluation.breakdown import Memorisation
from complexity_dit.evaluation.image_sets import ImageSet
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.json_files import fits, one_line, read_json_object

# The charts of a report, as SVG text to put into a page.

matplotlib.use("Agg")  # no screen is needed or wanted


def curve_chart(curve: dict[str, Any], name: str) -> str:
    """The distance over 1 / n with the line to infinite n and its interval."""
    figure, axes = plt.subplots(figsize=(6.5, 3.2), constrained_layout=True)
    inverse = 1 / np.asarray(curve["sizes"], float)
    axes.plot(inverse, curve["values"], "o", color="C0", label="measured")
    # The line of `fid_curve` again: the same weights, through the same points.
    slope = np.polyfit(inverse, curve["values"], 1, w=np.sqrt(1 / inverse))
    ends = np.array([0, inverse.max()])
    axes.plot(ends, np.polyval(slope, ends), "--", color="0.6", label="line in 1/n")
    half = (curve["high"] - curve["low"]) / 2
    axes.errorbar([0], [curve["infinity"]], [half], fmt="s", color="C1", capsize=4, label="n → ∞")
    axes.set_xticks([0, *inverse], ["∞", *(f"{n:,}" for n in curve["sizes"])])
    axes.set(xlabel="n (spaced as 1/n)", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def label_chart(labels: dict[str, dict[str, Any]]) -> str:
    """A bar for each label's Frechet distance, with its floor as a mark."""
    rows = {name: row for name, row in labels.items() if "n" in row}
    if not rows:
        return ""
    key = next(k for k in next(iter(rows.values())) if k == "fid" or k.startswith("fd_"))
    figure, axes = plt.subplots(figsize=(6.5, 0.6 + 0.32 * len(rows)), constrained_layout=True)
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
    axes.set_yticks(places, names, parse_math=False)  # a "$" in a name is a dollar
    axes.invert_yaxis()
    axes.set(xlabel="FID, each label at its own n (in brackets)" if key == "fid" else key)
    axes.grid(alpha=0.3, axis="x")
    return _svg(figure)


def nearest_chart(copies: Memorisation) -> str:
    """Distances to the nearest training image, of samples and of held-out images."""
    figure, axes = plt.subplots(figsize=(6.5, 2.8), constrained_layout=True)
    edges = np.histogram_bin_edges(np.concatenate([copies.samples, copies.heldout]), 50)
    for distances, label in ((copies.heldout, "held-out images"), (copies.samples, "samples")):
        axes.hist(distances, edges, density=True, alpha=0.55, label=label)
    axes.set(xlabel="distance to the nearest training image", ylabel="density", xlim=(0, None))
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The SVG element alone: no prologue, no date, text as text, and ids that do not change."""
    with plt.rc_context({"svg.hashsalt": "complexity-dit", "svg.fonttype": "none"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # The metadata block names vocabularies by their address; a page of its own needs none.
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


# The table that ends an evaluation on the terminal.


def format_result(result: dict[str, Any]) -> str:
    """The table that ends an evaluation on the terminal."""
    extractor, n = result["settings"]["extractor"], result["n_reference"]
    lines = [
        f"n = {result['n_generated']} generated, {'an unknown number of' if n is None else n} "
        "reference images",
        f"features: {extractor['name']} ({extractor['weights_source']}), "
        f"resize {extractor['resize']}, {extractor['dtype']}",
    ]
    if "fd_random" in result["metrics"]:
        lines.append("fd_random comes from a random network: it is NOT FID and compares with none")
    elif extractor["name"].partition("-")[0] not in ("inception", "random"):
        lines.append("the distance is named after its network: it is NOT FID")
    width = max(map(len, result["metrics"]), default=0)
    lines += [f"  {name:<{width}}  {value:.6g}" for name, value in result["metrics"].items()]
    lines += [f"  {name}: absent, {why}" for name, why in result["absent"].items()]
    if labels := result["per_label"].get("labels"):
        width = max(map(len, labels))
        lines.append(f"by {result['per_label']['field']}:")
        lines += [f"  {name:<{width}}  {_label_line(row)}" for name, row in labels.items()]
    return "\n".join(lines)


def _label_line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return row["skipped"]
    numbers = [f"{k} {v:.5g}" for k, v in row.items() if k.startswith(("fid", "fd", "kid_m", "kd"))]
    return f"n {row['n']}  " + "  ".join(n for n in numbers if "_std" not in n)


# Two results side by side, when they were measured alike.

# What a number does not depend on: names, speed, output, and extras beside it.
_FREE = (
    "target",
    "reference",
    "vae",
    "eval.weights",
    "eval.label_field",
    "eval.label_min",
    "eval.floors",
    "eval.memorisation",
    "eval.memorisation_images",
    "eval.keep_images",
    "eval.report",
    "eval.save_statistics",
    "eval.cache",
    "eval.overwrite",
    "eval.quiet",
    "eval.num_images",  # what was reached counts: n_generated and n_reference
    "eval.measures",
    "eval.curve",
    "eval.device",
    "n_train",
    "shrunk",
    "extractor.weights_source",
    "data",  # reference_fingerprint says whether it is the same data
    "sample.batch_size",
)
_TOP = ("n_generated", "n_reference", "weights_sha256", "reference_fingerprint")


def compare(first: str | Path, second: str | Path, allow: Sequence[str] = ()) -> str:
    """A table of two results.

    Args:
        first: A ``result.json``.
        second: Another.
        allow: Fields that may differ, such as ``sample.guidance_scale``; a prefix (``sample``)
            allows all below it. They are shown above the table.

    Returns:
        The table as text.

    Raises:
        UserError: A file is no result, or settings differ that are not allowed to; it names them.
    """
    a, b = read_result(first), read_result(second)
    differing = different_settings(a, b)
    allowed = {name: pair for name, pair in differing.items() if _covered(name, allow)}
    refused = {name: pair for name, pair in differing.items() if name not in allowed}
    if refused:
        lines = [f"{name}: {_shown(x)} and {_shown(y)}" for name, (x, y) in refused.items()]
        raise UserError(
            f"{first} and {second} were measured under different settings:\n  "
            + "\n  ".join(lines)
            + "\nMeasure both alike, or name what may differ with --allow"
        )
    lines = [
        f"A = {first} ({a['settings'].get('target')})",
        f"B = {second} ({b['settings'].get('target')})",
    ]
    lines += [
        f"different by --allow: {name}: {_shown(x)} and {_shown(y)}"
        for name, (x, y) in allowed.items()
    ]
    rows = [("", "A", "B", "B - A")]
    for name in dict.fromkeys([*a["metrics"], *b["metrics"]]):
        x, y = a["metrics"].get(name), b["metrics"].get(name)
        gap = f"{y - x:+.4g}" if x is not None and y is not None else ""
        rows.append((name, _number(x), _number(y), gap))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def different_settings(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that numbers depend on and that differ: name -> both values, in order."""
    flat_a, flat_b = (
        {name: result.get(name) for name in _TOP} | _flat(result["settings"]) for result in (a, b)
    )
    names = [n for n in dict.fromkeys([*flat_a, *flat_b]) if not _covered(n, _FREE)]
    return {n: (flat_a.get(n), flat_b.get(n)) for n in names if flat_a.get(n) != flat_b.get(n)}


def read_result(path: str | Path) -> dict[str, Any]:
    """A result.json, or the one in a folder.

    Raises:
        UserError: No such file, or it is no result.
    """
    file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
    try:
        result = read_json_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a result ({error})") from error
    metrics, settings = result.get("metrics"), result.get("settings")
    if not fits(metrics, dict[str, float | None]) or not fits(settings, dict[str, Any]):
        raise UserError(
            f"{file} is no result.json of complexity-dit evaluate: it has numbers under `metrics` "
            "and what they were measured with under `settings`"
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
    return any(name == known or name.startswith(known + ".") for known in names)


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


GRID_IMAGES = 64
GRID_COLUMNS = 16
LARGEST_SIDE = 96
"""Pixels of an image in the report; larger ones are scaled down."""

_STYLE = """
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
"""

_MEANINGS = {
    "fid": "Fréchet Inception distance at this n; lower is better, compare at equal n only",
    "fd": "Fréchet distance in the features of this network; it is not FID",
    "kid_mean": "kernel Inception distance, unbiased at any n",
    "kd_mean": "kernel distance in the features of this network; it is not KID",
    "_std": "spread over subsets",
    "_stderr": "standard error",
    "_infinity": "continued to infinite n",
    "_infinity_low": "lower end of its 95 % interval",
    "_infinity_high": "upper end of its 95 % interval",
    "_train": "floor: as many training images instead of samples",
    "_vae": "floor: held-out images through the VAE",
    "_shrunk": "held-out images shrunk to 8 px and back: colours without structure",
    "precision": "share of samples within the reference's manifold",
    "recall": "share of reference images within the samples' manifold",
    "density": "how crowded the reference is where samples are",
    "coverage": "share of reference images with a sample near",
    "sfid": "Fréchet distance of spatial features",
    "inception_score_mean": "Inception score",
    "inception_score_std": "its spread over splits",
    "label_accuracy": "samples whose asked label the nearest class mean names",
    "label_accuracy_real": "the same of reference images",
    "closer_than_1_percent": "samples nearer to training images than 99 % of held-out ones; "
    "0.01 when alike",
}


@dataclass
class Pictures:
    """What the report shows: uint8 images (n, H, W, 3), and pairs of sample and training image."""

    samples: NDArray[np.uint8]
    reference: NDArray[np.uint8] | None = None
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        generated: ImageSet,
        picked: NDArray[np.int64],
        reference: ImageSet | None,
        rows: NDArray[np.int64],
        train: ImageSet | None,
        pairs: Sequence[dict[str, Any]],
    ) -> "Pictures":
        """Read the first images of both sides, and the closest pairs."""
        shown = []
        if train is not None:
            for pair in pairs:
                i, j, distance = pair["sample"], pair["training_image"], pair["distance"]
                caption = f"sample {i}, training image {j}: {distance:.3g}"
                shown.append((generated.read([i])[0], train.read([j])[0], caption))
        return cls(
            generated.read(picked[:GRID_IMAGES].tolist()),
            reference.read(rows[:GRID_IMAGES].tolist()) if reference else None,
            shown,
        )


def write_report(
    path: Path, result: dict[str, Any], pictures: Pictures, copies: Memorisation | None = None
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: Where to.
        result: As `evaluate` returns it.
        pictures: What to show.
        copies: Nearest training images, where they were looked for.
    """
    with atomic_file(path) as aside:
        aside.write_text(render(result, pictures, copies), encoding="utf-8")


def render(result: dict[str, Any], pictures: Pictures, copies: Memorisation | None = None) -> str:
    """The page as text; it refers to nothing outside itself."""
    settings, extractor = result["settings"], result["settings"]["extractor"]
    n = result["n_reference"]
    about = (
        f"{settings['target']} against {settings['reference']}: n = {result['n_generated']} "
        f"generated, {'an unknown number of' if n is None else n} reference images. Features: "
        f"{extractor['name']}, resize {extractor['resize']}, {extractor['dtype']}."
    )
    parts = ["<h1>Evaluation</h1>", f'<p class="about">{html.escape(about)}</p>']
    if not extractor["name"].startswith("inception"):
        parts.append(
            '<p class="warning">These distances are named after their network. They are not FID, '
            "and compare only with distances of the same network.</p>"
        )
    parts += ["<h2>Numbers</h2>", _numbers(result["metrics"]), _absent(result["absent"])]
    name = next((m for m in result["metrics"] if m in ("fid",) or m.startswith("fd_")), "fid")
    if result["fid_over_n"]:
        parts += [
            "<h2>Distance over n</h2>",
            curve_chart(result["fid_over_n"], "FID" if name == "fid" else name),
            '<p class="note">Both sides in disjoint parts of n images, and the weighted straight '
            "line over 1/n; the bar is the 95 % interval at infinite n.</p>",
        ]
    if result["per_label"]:
        parts += [
            f"<h2>By {html.escape(result['per_label']['field'])}</h2>",
            label_chart(result["per_label"]["labels"]),
            _labels(result["per_label"]["labels"]),
        ]
    parts += ["<h2>Samples</h2>", _grid(pictures.samples)]
    if pictures.reference is not None:
        parts += ["<h2>Reference</h2>", _grid(pictures.reference)]
    if copies is not None:
        parts += [
            "<h2>Nearest training images</h2>",
            nearest_chart(copies),
            f'<p class="note">A sample is nearer than a held-out image with probability '
            f"{copies.probability_closer:.3f} (0.5 when alike); "
            f"{100 * copies.closer_than_1_percent:.2f} % of samples are nearer than 99 % of "
            "held-out images (1 % when alike). Below, the closest pairs: sample left, training "
            "image right, and their distance.</p>",
            '<div class="pairs">' + "".join(_pair(*pair) for pair in pictures.pairs) + "</div>",
        ]
    parts += ["<h2>Settings</h2>", _settings(result)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _numbers(metrics: dict[str, float]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td class=number>{value:.6g}</td>"
        f'<td class="note">{_meaning(name)}</td></tr>'
        for name, value in metrics.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _meaning(name: str) -> str:
    if name in _MEANINGS:
        return _MEANINGS[name]
    if name.startswith("kd_") and name.endswith("_mean"):
        return _MEANINGS["kd_mean"]
    ends = [end for end in _MEANINGS if end.startswith("_") and name.endswith(end)]
    return _MEANINGS[max(ends, key=len)] if ends else _MEANINGS["fd"]


def _absent(absent: dict[str, str]) -> str:
    lines = [f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in absent.items()]
    return (
        f'<p class="note">Not measured:</p><ul class="note">{"".join(lines)}</ul>' if lines else ""
    )


def _labels(labels: dict[str, dict[str, Any]]) -> str:
    rows = ["<tr><th>label<th>n<th>distance<th>kernel distance<th>floor<th></tr>"]
    for name, row in labels.items():
        cells = [html.escape(name)]
        if "skipped" in row:
            cells += ["", "", "", "", html.escape(row["skipped"])]
        else:
            distance, kernel, error = (_value(row, end) for end in ("", "_mean", "_stderr"))
            floor = _value(row["floor"], "") if "n" in row.get("floor", {}) else None
            cells += [str(row["n"]), f"{distance:.5g}", f"{kernel:.4g} ± {error:.2g}"]
            cells += [f"{floor:.5g} (n {row['floor']['n']})" if floor is not None else "", ""]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _value(row: dict[str, Any], end: str) -> float:
    """The Frechet distance of a label's row (no end), or its kernel distance's part."""
    starts = ("fid", "fd_") if not end else ("kid", "kd_")
    return next(v for k, v in row.items() if k.startswith(starts) and k.endswith(end))


def _pair(sample: NDArray[np.uint8], other: NDArray[np.uint8], caption: str) -> str:
    both = f"{_picture(_scaled(sample))} {_picture(_scaled(other))}"
    return f"<figure>{both}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _grid(images: NDArray[np.uint8]) -> str:
    small = [_scaled(image) for image in images]
    width, height = small[0].size
    rows = -(-len(small) // GRID_COLUMNS)
    sheet = Image.new("RGB", (GRID_COLUMNS * (width + 2), rows * (height + 2)), "white")
    for i, image in enumerate(small):
        row, column = divmod(i, GRID_COLUMNS)
        sheet.paste(image, (column * (width + 2), row * (height + 2)))
    return _picture(sheet, cell=width)


def _scaled(image: NDArray[np.uint8]) -> Image.Image:
    picture = Image.fromarray(image)
    if max(picture.size) > LARGEST_SIDE:
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def _picture(image: Image.Image, cell: int | None = None) -> str:
    """An <img>, small ones enlarged by a whole factor; ``cell`` is the width of one in a sheet."""
    scale = max(1, LARGEST_SIDE // 2 // (cell or image.width))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img alt="" width="{scale * image.width}" height="{scale * image.height}" '
        f'src="data:image/png;base64,{data}">'
    )


def _settings(result: dict[str, Any]) -> str:
    kept = ("settings", "versions", "weights_sha256", "reference_fingerprint", "target_fingerprint")
    text = json.dumps({key: result[key] for key in kept}, indent=2)
    return f"<details><summary>All of them</summary><pre>{html.escape(text)}</pre></details>"
