"""report.html: a result as one page that opens anywhere, with its pictures and curves inside."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from complexity_dit.image_sets import ImageSet
from complexity_dit.memorisation import Memorisation
from complexity_dit.report_charts import curve_chart, label_chart, nearest_chart
from inl_core.run.files import file_aside

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
    with file_aside(path) as aside:
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
