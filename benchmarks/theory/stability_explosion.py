"""Divergence of training with the bounds of the dynamics, without them, and without dynamics.

    python -m benchmarks.theory.stability_explosion --out docs/results/stability/explosion.png \
        --rows benchmarks/results.csv

A small language model on the bytes of Python's standard library, with the dynamics on the stream
(paper §3.2): without bounds, as the README warns against (beta = softplus, no clip of the
velocity), with the bounds, and without dynamics. Training is made harder in one way at a time
(`SETTINGS`): learning rates up to a hundred times the usual; weights, gradients and optimizer in
bf16; and frequent bytes, either in *bursts*, where every tenth batch repeats one byte, or
*everywhere*, where half of the bytes of every batch are one of four. A run has diverged when its
loss is not finite, or is not below that of guessing among all bytes (ln 256) for 20 steps after its
first 50. Frozen-point theory puts the edge at beta = 2 (1 + alpha) / (dt gate): 76 at the initial
coefficients, 38 at gate 1.
"""

import argparse
import math
import statistics
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from benchmarks.common.results import append_rows, as_rows, commit
from matplotlib.lines import Line2D

from complexity_lm import DeepConfig, DeepForCausalLM
from inl_core import INLDynamics, collect_dynamics_stats

matplotlib.use("Agg")

BYTES, CONTEXT, BATCH = 256, 64, 8
SHAPE = {
    "vocab_size": BYTES,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 0,
    "dynamics_placement": "stream",
    "dynamics_adaptive": "token",
}
UNBOUNDED = {
    "dynamics_beta_max": None,
    "dynamics_velocity_max": None,
    "dynamics_mu_min": None,
    "dynamics_mu_max": None,
}
CASES = {"none": {"dynamics_placement": "none"}, "bounded": {}, "unbounded": UNBOUNDED}
COLOURS = dict(zip(CASES, ("0.45", "tab:blue", "tab:red"), strict=True))
FREQUENT = b" e\nt"
SHOCK_EVERY, SHARE = 10, 0.5
PATIENCE, WARM_UP = 20, 50
EDGES = {0.5: 76, 1.0: 38}


@dataclass(frozen=True)
class Setting:
    """One setting of the study.

    Attributes:
        lr: Learning rate, reached after 20 steps.
        shocks: Frequent bytes: "no shocks", "bursts" or "everywhere".
        dtype: Type of weights, gradients and optimizer state.
    """

    lr: float
    shocks: str
    dtype: str = "float32"

    def __str__(self):
        return f"lr {self.lr:g}, {self.shocks}"


SETTINGS = (
    Setting(0.01, "bursts"),
    Setting(0.01, "bursts", "bfloat16"),
    Setting(0.1, "no shocks"),
    Setting(0.1, "bursts"),
    Setting(0.1, "everywhere"),
    Setting(0.1, "bursts", "bfloat16"),
)


def corpus():
    """Bytes of the top-level modules of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:2_000_000]), dtype=torch.uint8)


def batch_of(text, step, shocks, draw):
    """Ids (BATCH, CONTEXT) of a step, with the shocks of a setting."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=draw)
    rows = torch.stack([text[s : s + CONTEXT] for s in starts.tolist()]).long()
    frequent = torch.tensor(list(FREQUENT))
    if shocks == "bursts" and step % SHOCK_EVERY == SHOCK_EVERY - 1:
        burst = frequent[torch.randint(len(FREQUENT), (BATCH, 1), generator=draw)]
        cut = torch.randint(CONTEXT // 4, (BATCH, 1), generator=draw)
        rows = torch.where(torch.arange(CONTEXT) >= cut, burst.expand(BATCH, CONTEXT), rows)
    if shocks == "everywhere":
        small = frequent[torch.randint(len(FREQUENT), (BATCH, CONTEXT), generator=draw)]
        rows = torch.where(torch.rand(BATCH, CONTEXT, generator=draw) < SHARE, small, rows)
    return rows


def largest_beta(model):
    """The largest beta of any token and layer in the last forward pass; 0 without dynamics."""
    stats = [m.get_dynamics_stats() for m in model.modules() if isinstance(m, INLDynamics)]
    return max((s["beta_max"] for s in stats), default=0.0)


def run(case, setting, seed, steps, text):
    """Losses, largest betas, and the step at which the run diverged (None if it did not)."""
    torch.manual_seed(seed)
    model = DeepForCausalLM(DeepConfig(**(SHAPE | CASES[case]))).to(getattr(torch, setting.dtype))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    draw = torch.Generator().manual_seed(seed)
    losses, betas, above = [], [], 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * min(1.0, (step + 1) / 20)
        ids = batch_of(text, step, setting.shocks, draw)
        with collect_dynamics_stats(model):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        betas.append(largest_beta(model))
        above = above + 1 if losses[-1] > math.log(BYTES) - 0.01 and step >= WARM_UP else 0
        if not math.isfinite(losses[-1]):
            return losses, betas, step
        if above >= PATIENCE:
            return losses, betas, step - PATIENCE + 1
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, betas, None


def rows_of(case, setting, steps, runs):
    """Rows of a case: number and steps of divergences, largest beta, last loss."""
    ends = [end for _, _, end in runs if end is not None]
    finals = [statistics.fmean(losses[-20:]) for losses, _, _ in runs]
    values = {
        "diverged": (len(ends), "runs"),
        "runs": (len(runs), ""),
        "first divergence": (min(ends, default=""), "step"),
        "last divergence": (max(ends, default=""), "step"),
        "largest beta": (max(max(b) for _, b, _ in runs) if case != "none" else "", ""),
        # NaN sorts above every other loss.
        "last loss, median": (
            sorted(finals, key=lambda x: math.inf if math.isnan(x) else x)[len(finals) // 2],
            "nats",
        ),
    }
    return as_rows(values, f"{case}, {setting}", shape=f"{steps} steps", dtype=setting.dtype)


def draw_setting(upper, lower, setting, runs):
    """Draw two panels, loss and largest beta, of all runs {case: [(losses, betas, end)]}."""
    counts = []
    for case, found in runs.items():
        colour = COLOURS[case]
        for losses, betas, end in found:
            upper.plot(losses, color=colour, alpha=0.55, linewidth=0.8)
            if case != "none":
                lower.plot(betas, color=colour, alpha=0.6, linewidth=0.8)
            if end is not None:
                # A loss that is not finite is drawn at the last finite one.
                seen = next(x for x in reversed(losses[: end + 1]) if math.isfinite(x))
                upper.plot(end, min(seen, 11.5), "x", color=colour, markersize=5)
        counts.append(f"{case} {sum(end is not None for *_, end in found)}")
    number = len(next(iter(runs.values())))
    upper.set_title(
        f"{setting}, {'bf16' if setting.dtype == 'bfloat16' else 'fp32'}\n"
        f"diverged, of {number}: {', '.join(counts)}",
        fontsize=9,
    )
    upper.axhline(math.log(BYTES), color="0.7", linewidth=0.8)
    upper.set(ylim=(0, 12))
    for edge, style in zip(EDGES.values(), ("--", ":"), strict=True):
        lower.axhline(edge, color="0.3", linestyle=style, linewidth=0.9)
    lower.set(yscale="log", ylim=(0.05, 1e12))


def legend(figure):
    lines = [Line2D([], [], color=COLOURS[case], label=case) for case in CASES]
    lines.append(Line2D([], [], color="k", marker="x", linestyle="", label="diverged"))
    lines.append(Line2D([], [], color="0.7", label="guessing, ln 256"))
    lines += [
        Line2D([], [], color="0.3", linestyle=style, label=f"frozen-point edge, gate {gate:g}")
        for gate, style in zip(EDGES, ("--", ":"), strict=True)
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=7, fontsize=8)


def main():
    """Run all seeds of all cases in every setting; draw and print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    parser.add_argument("--rows", help="CSV to add the rows to")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 1:
        parser.error(f"--seeds {options.seeds} and --steps {options.steps} must be at least 1")
    started_from = commit()  # before the figure changes a tracked file
    text, rows = corpus(), []
    figure, axes = plt.subplots(
        4, 3, figsize=(12, 10), sharex=True, sharey="row", constrained_layout=True
    )
    for index, setting in enumerate(SETTINGS):
        block, column = divmod(index, 3)
        runs = {
            case: [run(case, setting, seed, options.steps, text) for seed in range(options.seeds)]
            for case in CASES
        }
        draw_setting(axes[2 * block, column], axes[2 * block + 1, column], setting, runs)
        for case, found in runs.items():
            rows += rows_of(case, setting, options.steps, found)
            about = ", ".join(f"{r['metric']} {r['value']}" for r in rows[-6:])
            print(f"{case}, {setting}, {setting.dtype}: {about}", flush=True)
    for row, name in enumerate(("loss [nats]", "largest beta of a token") * 2):
        axes[row, 0].set_ylabel(name)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    legend(figure)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    if options.rows:
        append_rows(options.rows, "explosion", rows, "cpu", commit=started_from)


if __name__ == "__main__":
    main()
