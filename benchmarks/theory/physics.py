"""Rollout error of a transformer on second-order systems with dynamics and without (paper §10).

    python -m benchmarks.theory.physics --rows benchmarks/results.csv

A small causal transformer (that of the language model, on continuous states) learns to predict the
next state of three systems of `physics_systems`, then continues held-out trajectories: 32 true
states, then 64 steps on its own output. The error of a rollout is the root mean square over
trajectories, channels and steps, in standard deviations of the data. Each placement, with the
paper's controller or, if its name ends in `channel`, with one coefficient per channel, is compared
with the plain network of equal parameters (a wider MLP), paired by seed: the geometric mean of the
ratios with a 95 % t-interval. `force, no-carry` is the control: the same layer with its velocity
reset at every step. Runs with rows are not repeated; the table of all requested runs is printed.
"""

import argparse
import time

import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import append_rows, as_rows, commit, format_values, read_rows
from benchmarks.study.variants import SWAPS
from benchmarks.theory.physics_report import BASELINES, STEPS, known_of, table
from benchmarks.theory.physics_systems import SYSTEMS, trajectories
from torch import nn

from complexity_lm import DeepConfig, DeepModel

PRIMER, HORIZON = 32, 64
# The plain networks, each with the network whose number of parameters it has.
EQUALS = {"none": "branch", "none, wider": "force", "none, narrower": "force_mlp, channel"}
NETWORKS = (*EQUALS, *BASELINES)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 0,
    "vocab_size": 8,
}


class Forecaster(nn.Module):
    """States (B, N, O) -> the next state at every position, as the last state plus a change.

    Args:
        channels: O.
        network: A placement, optionally with a comma and the kind of coefficients (default: the
            paper's `token`) or a swap (`variants.SWAPS`).
        wider: Units that the MLP has in addition.
    """

    def __init__(self, channels, network, wider=0):
        super().__init__()
        placement, _, other = network.partition(", ")
        swap = SWAPS.get(other)
        kind = "token" if swap else other or "token"
        shape = SHAPE | {"intermediate_size": SHAPE["intermediate_size"] + wider}
        self.enter = nn.Linear(channels, shape["hidden_size"])
        self.body = DeepModel(
            DeepConfig(dynamics_placement=placement, dynamics_adaptive=kind, **shape)
        )
        if swap:
            swap(self.body.layers)
        self.leave = nn.Linear(shape["hidden_size"], channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, states):
        hidden = self.body(inputs_embeds=self.enter(states), use_cache=False).last_hidden_state
        return states + self.leave(hidden)


def width_for_equal_parameters(channels, network="branch"):
    """Units that the MLP of `none` needs in addition for the parameters of a network."""
    plain, wanted = (parameters(Forecaster(channels, name)) for name in ("none", network))
    return round((wanted - plain) / (parameters(Forecaster(channels, "none", 1)) - plain))


def trained(model, data, steps, batch_size, seed):
    """Train with AdamW on one-step errors; the seed fixes the order of the data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (batch_size,), generator=draw)]
        loss = nn.functional.mse_loss(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def rollout_errors(model, truth):
    """Error after 1 to HORIZON steps of the model's own, (HORIZON,)."""
    states = truth[:, :PRIMER]
    for _ in range(HORIZON):
        states = torch.cat([states, model(states)[:, -1:]], 1)
    wrong = states[:, PRIMER:] - truth[:, PRIMER:]
    return wrong.square().mean((0, 2)).sqrt()


def run(task, network, seed, options, data, truth):
    """Train one model and return its metrics."""
    channels = data.shape[-1]
    if network in EQUALS:
        wider = width_for_equal_parameters(channels, EQUALS[network])
        torch.manual_seed(seed)
        model = Forecaster(channels, "none", wider)
    else:
        torch.manual_seed(seed)
        model = Forecaster(channels, network)
    start = time.perf_counter()
    trained(model, data, options.steps, options.batch_size, seed)
    seconds = time.perf_counter() - start
    errors = rollout_errors(model, truth)
    result = {f"rollout error, {k} steps": (float(errors[:k].mean()), "sd") for k in STEPS}
    result["parameters"] = (parameters(model), "")
    result["training"] = (seconds, "s")
    print(f"{task} / {network} / seed {seed}: {format_values(result)}", flush=True)
    return result


def main():
    """Run what has no rows yet and print the paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--trajectories", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2 for an interval")
    parser.add_argument("--tasks", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--rows", help="CSV to add the rows to; runs that it has are skipped")
    options = parser.parse_args()
    amount = f"{options.steps} steps of {options.batch_size}"
    shape = f"{options.trajectories} x {PRIMER + HORIZON}, {amount}"

    started_from = commit()
    known = known_of(
        row
        for row in (read_rows(options.rows) if options.rows else [])
        if row["bench"] == "physics" and row["shape"] == shape
    )
    for task in options.tasks:
        data = trajectories(task, options.trajectories, PRIMER + HORIZON, seed=1)
        truth = trajectories(task, 256, PRIMER + HORIZON, seed=2)
        mean, spread = data.mean((0, 1)), data.std((0, 1))
        data, truth = (data - mean) / spread, (truth - mean) / spread
        for seed in range(options.seeds):
            for network in NETWORKS:
                case = f"{task} / {network} / seed {seed}"
                if case in known:
                    continue
                result = run(task, network, seed, options, data, truth)
                known[case] = {metric: value for metric, (value, _) in result.items()}
                if options.rows:
                    rows = as_rows(result, case, shape=shape)
                    append_rows(options.rows, "physics", rows, "cpu", commit=started_from)
    print("\n".join(table(known, options.tasks, range(options.seeds))))


if __name__ == "__main__":
    main()
