"""The charts of a report, as SVG text to put into a page."""

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from complexity_dit.memorisation import Memorisation
from inl_core.run.json_files import one_line

matplotlib.use("Agg")  # no screen is needed or wanted
import matplotlib.pyplot as plt


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
