"""Figure and rows of `inl_core.certify` on trained models and on the same networks at their start.

    python -m benchmarks.theory.stability_certificates --lm runs/demo-lm --dit runs/demo/pipeline \
        --out docs/results/stability/certificates.png --rows benchmarks/results.csv

The inputs are held-out text of the training source for a language model, and noise at five noise
levels without labels for an image model (as in `complexity-dit inspect`). The case of a row is the
name of the run, its shape the first digits of the sha256 of the weights.
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from benchmarks.common.results import append_rows, as_rows, commit
from matplotlib.ticker import MaxNLocator

from inl_core import certify

matplotlib.use("Agg")

BLOCKS = 8


def of_lm(folder):
    """(network, the same network untrained, inputs, hash of the weights)."""
    from complexity_lm.data import collate, load_split, pack, tokenize
    from complexity_lm.loading import load, weights_hash

    loaded = load(str(folder), device="cpu")
    if loaded.data is None:
        raise SystemExit(f"{folder} has no record of its training data")
    heldout = load_split(loaded.data, "heldout")
    blocks = pack(tokenize(heldout.take(min(64, len(heldout))), loaded.tokenizer), loaded.context)
    ids = collate([blocks[i] for i in range(min(BLOCKS, len(blocks)))])["input_ids"]
    torch.manual_seed(0)
    start = type(loaded.model)(loaded.model.config)
    return loaded.model, start, {"input_ids": ids, "use_cache": False}, weights_hash(loaded.model)


def of_dit(folder):
    from complexity_dit.cli.inspect import PROBE_LEVELS
    from complexity_dit.hashing import weights_sha256
    from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS
    from complexity_dit.pipelines.sampling import load_pipeline

    model = load_pipeline(str(folder)).transformer.eval()
    torch.manual_seed(0)
    start = type(model).from_config(model.config)
    count, side = len(PROBE_LEVELS), model.config.sample_size
    noise = torch.randn(count, model.config.in_channels, side, side)
    times = torch.tensor(PROBE_LEVELS) * NUM_TRAIN_TIMESTEPS
    labels = torch.full((count, len(model.config.label_fields)), -1)
    return model, start, (noise, times, labels), weights_sha256(model)


def name_of(folder):
    """The name of the run: that of the folder, or of its parent for `model` and `pipeline`."""
    folder = Path(folder).resolve()
    return folder.parent.name if folder.name in ("model", "pipeline") else folder.name


def metrics(found):
    return {
        "frozen points": (sum(layer.points for layer in found.layers), ""),
        "least stable share of a layer": (min(x.stable_share for x in found.layers), ""),
        "largest spectral radius": (max(x.spectral_radius for x in found.layers), ""),
        "reach of all layers": (found.reach, ""),
        "largest gain of a layer": (max(x.gain for x in found.layers), ""),
        "norm of the frozen product": (
            found.frozen_product if found.frozen_product is not None else "",
            "",
        ),
        "response of the network": (found.response, ""),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", nargs="*", default=[], help="run or model folders")
    parser.add_argument("--dit", nargs="*", default=[], help="pipeline folders")
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    started_from = commit()  # before the figure changes a tracked file
    opened = [(folder, of_lm) for folder in options.lm] + [(f, of_dit) for f in options.dit]
    if not opened:
        parser.error("give --lm or --dit folders")

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    rows = []
    for index, (folder, open_model) in enumerate(opened):
        name = name_of(folder)
        model, start, inputs, sha256 = open_model(folder)
        for about, network, style in (("trained", model, "o-"), ("at its start", start, "x:")):
            found = certify(network, inputs)
            print(f"{name}, {about}\n{found}\n")
            shape = f"weights {sha256[:8]}" if about == "trained" else "seed 0"
            rows += as_rows(metrics(found), f"{name}, {about}", shape=shape)
            for axis, of in zip(axes, ("spectral_radius", "reach", "gain"), strict=True):
                values = [getattr(layer, of) for layer in found.layers]
                axis.plot(values, style, color=f"C{index}", label=f"{name}, {about}", markersize=4)
    axes[0].axhline(1, color="0.7", linewidth=0.8)
    axes[2].axhline(1, color="0.7", linewidth=0.8)
    titles = ("largest spectral radius of a frozen point", "reach: dt · gate · v_max",
              "largest gain of a token's (e, v)")  # fmt: skip
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="module, in the order of depth")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Lines reach every corner, so the legend is outside.
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    if options.rows:
        command = "python -m benchmarks.theory.stability_certificates"
        for flag, folders in (("--lm", options.lm), ("--dit", options.dit)):
            command += f" {flag} {' '.join(map(name_of, folders))}" if folders else ""
        append_rows(options.rows, "certificates", rows, "cpu", command=command, commit=started_from)


if __name__ == "__main__":
    main()
