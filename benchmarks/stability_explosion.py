"""Does training explode without the bounds? The story of the 400,000th step, in minutes (README).

    python benchmarks/stability_explosion.py --out docs/results/stability/explosion.png \
        --rows benchmarks/results.csv

A small language model on this Python's own source, byte by byte, with the dynamics on the stream
(paper §3.2) as the README warns of it: beta = softplus without a bound, velocity without a clip,
against the same with the bounds, and the same without dynamics. Everything is made worse on
purpose: learning rates up to a hundred times the usual, bf16 on request, and shocks: every tenth
batch is bursts of one very frequent byte. A run has diverged when its loss is not finite, or for 20
steps after its first 50 no better than guessing among all bytes (ln 256). Frozen-point theory puts
the edge at beta = 2 (1 + alpha) / (dt gate): 76 at the initial coefficients, 38 at gate 1.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from results import append_rows, commit

from complexity_lm import DeepConfig, DeepForCausalLM
from inl_core import INLDynamics, collect_dynamics_stats

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
}
UNBOUNDED = {
    "dynamics_beta_max": None,
    "dynamics_velocity_max": None,
    "dynamics_mu_min": None,
    "dynamics_mu_max": None,
}
CASES = {"none": {"dynamics_placement": "none"}, "bounded": {}, "unbounded": UNBOUNDED}
COLOURS = ("0.5", "tab:blue", "tab:red")
SHOCK_EVERY, FREQUENT = 10, b" e\nt"
PATIENCE, WARM_UP = 20, 50


def corpus():
    """Bytes of the standard library's top-level modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:2_000_000]), dtype=torch.uint8)


def batch_of(text, step, draw):
    """Ids (BATCH, CONTEXT) of step `step`; every tenth is bursts of one frequent byte a row."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=draw)
    rows = torch.stack([text[s : s + CONTEXT] for s in starts.tolist()]).long()
    if step % SHOCK_EVERY == SHOCK_EVERY - 1:
        chosen = torch.randint(len(FREQUENT), (BATCH, 1), generator=draw)
        burst = torch.tensor(list(FREQUENT))[chosen].expand(BATCH, CONTEXT)
        cut = torch.randint(CONTEXT // 4, (BATCH, 1), generator=draw)
        rows = torch.where(torch.arange(CONTEXT) >= cut, burst, rows)
    return rows


def largest_beta(model):
    """The largest beta that any token of the last forward met, over layers; 0 without dynamics."""
    stats = [m.get_dynamics_stats() for m in model.modules() if isinstance(m, INLDynamics)]
    return max((s["beta_max"] for s in stats), default=0.0)


def run(case, lr, seed, steps, text, dtype):
    """Losses, largest betas, and the step at which the run diverged (None if it did not)."""
    torch.manual_seed(seed)
    model = DeepForCausalLM(DeepConfig(**(SHAPE | CASES[case]))).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    losses, betas, above = [], [], 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        ids = batch_of(text, step, draw)
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


def main():
    """Run all seeds of both cases at every learning rate; draw, print and keep how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    parser.add_argument("--rows", help="CSV to add the rows to")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    started_from = commit()  # the figure changes a file that may be in it
    text, dtype = corpus(), getattr(torch, options.dtype)

    figure, axes = plt.subplots(
        2, len(options.lrs), figsize=(4 * len(options.lrs), 6),
        sharex=True, squeeze=False, constrained_layout=True,
    )  # fmt: skip
    rows = []
    for (upper, lower), lr in zip(axes.T, options.lrs, strict=True):
        for case, colour in zip(CASES, COLOURS, strict=True):
            ends, peaks, finals = [], [], []
            for seed in range(options.seeds):
                losses, betas, end = run(case, lr, seed, options.steps, text, dtype)
                upper.plot(losses, color=colour, alpha=0.5, linewidth=0.8)
                if case != "none":
                    lower.plot(betas, color=colour, alpha=0.6, linewidth=0.8)
                finals.append(sum(losses[-20:]) / len(losses[-20:]))
                peaks.append(max(betas))
                if end is not None:
                    ends.append(end)
                    upper.plot(end, losses[end], "x", color=colour)
            upper.plot(
                [], [], color=colour, label=f"{case}: {len(ends)} of {options.seeds} diverged"
            )
            last = ", ".join(f"{loss:.2f}" for loss in finals)
            print(
                f"lr {lr:g} {case}: {len(ends)} of {options.seeds} diverged, at {ends or '-'}; "
                f"largest beta {max(peaks):.3g}; last losses {last}",
                flush=True,
            )
            values = {
                "diverged": (len(ends), "runs"),
                "runs": (options.seeds, ""),
                "first divergence": (min(ends) if ends else "", "step"),
                "largest beta": (max(peaks) if case != "none" else "", ""),
                "last loss, median": (sorted(finals)[len(finals) // 2], "nats"),
            }
            rows += [
                {
                    "case": f"{case}, lr {lr:g}", "shape": f"{options.steps} steps",
                    "dtype": options.dtype, "metric": metric, "value": value, "unit": unit,
                }
                for metric, (value, unit) in values.items()
            ]  # fmt: skip
        upper.axhline(math.log(BYTES), color="0.7", linewidth=0.8)
        upper.set(
            title=f"learning rate {lr:g}, {options.dtype}", ylabel="loss [nats]", ylim=(0, 12)
        )
        upper.legend(fontsize=7)
        for edge, gate in ((76, 0.5), (38, 1)):
            lower.axhline(
                edge, color="0.5", linestyle=":", label=f"frozen-point edge, gate {gate:g}"
            )
        lower.set(xlabel="step", ylabel="largest beta of a token", yscale="log")
        lower.legend(fontsize=7)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    if options.rows:
        append_rows(options.rows, "explosion", rows, "cpu", commit=started_from)


if __name__ == "__main__":
    main()
