"""The layer as a residual PD controller in a closed loop: a two-link arm with an unknown payload.

    python -m benchmarks.theory.closed_loop --rows benchmarks/results.csv

Joint angles q should reach a target. A fixed controller applies kp (target - q) - kd q'; a learned
policy adds a torque every 0.05 s. With `INLDynamics` as the policy, position h is the error q -
target, velocity v the measured joint speed and mu is 0: equation (2) gives a desired speed v', and
the torque is K (v' - q') = -K beta (q - target) - K (1 - alpha) q', a PD controller whose gains the
token controller chooses from the state and whose signs the bounds fix. It is compared with a
perceptron of as many parameters on the same inputs, with any torque as output. Both learn through
the simulation on payloads of 0.5 to 1.5 kg and are evaluated on other targets, with those payloads
and with 3 to 5 kg.
"""

import argparse
import statistics

import torch
from benchmarks.common.results import append_rows, as_rows, commit
from benchmarks.theory.physics_systems import arm_acceleration
from torch import nn

from inl_core import INLDynamics

KP, KD, RESIDUAL = 10.0, 2.0, 10.0
INTERVAL, SUBSTEPS, STEPS = 0.05, 5, 60
PAYLOADS = {"payloads as trained": (0.5, 1.5), "heavier payloads": (3.0, 5.0)}
EFFORT = 1e-3
SETTLED, LOST = 0.05, 10.0


class INLPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = INLDynamics(2, mu_min=0.0, mu_max=0.0, dt=INTERVAL, controller_hidden=16)

    def forward(self, error, speed):
        return RESIDUAL * (self.layer(error, speed)[1] - speed)


class Perceptron(nn.Module):
    def __init__(self, hidden=26):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, hidden), nn.Linear(hidden, 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, error, speed):
        hidden = nn.functional.silu(self.inner(torch.cat([error, speed], -1)))
        return RESIDUAL * self.outer(hidden)


def no_policy(error, speed):
    return torch.zeros_like(error)


POLICIES = {"INL": INLPolicy, "perceptron": Perceptron}


def tasks(count, payloads, draw):
    """Start angles, targets (count, 2) and payloads (count,)."""
    low, high = payloads
    angles = 3 * torch.rand(2, count, 2, generator=draw) - 1.5
    return *angles, low + (high - low) * torch.rand(count, generator=draw)


def errors_of(policy, task):
    """Errors and added torques at every control step, (STEPS, count, 2) each."""
    q, target, payload = task
    speed = torch.zeros_like(q)
    errors, torques = [], []
    for _ in range(STEPS):
        error = q - target
        added = policy(error, speed)
        torque = added - KP * error - KD * speed
        for _ in range(SUBSTEPS):
            dt = INTERVAL / SUBSTEPS
            speed = speed + dt * arm_acceleration(q, speed, torque, payload)
            q = q + dt * speed
        errors.append(q - target)
        torques.append(added)
    return torch.stack(errors), torch.stack(torques)


def cost(errors, torques):
    return errors.square().mean() + EFFORT * torques.square().mean()


def trained(policy, steps, seed, count=128):
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = cost(*errors_of(policy, tasks(count, PAYLOADS["payloads as trained"], draw)))
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return policy


@torch.no_grad()
def tried(policy, payloads):
    """Metrics of a policy on 512 tasks that are not in the training."""
    draw = torch.Generator().manual_seed(1_000_003)
    errors, _ = errors_of(policy, tasks(512, payloads, draw))
    size = errors.norm(dim=-1)
    last = size[-10:].amax(0)
    return {
        "mean squared error": (float(errors.square().mean()), "rad²"),
        "settled within 0.05 rad": (float((last < SETTLED).double().mean()), ""),
        "lost (beyond 10 rad)": (float((~(size.amax(0) < LOST)).double().mean()), ""),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    started_from = commit()
    found = {("PD alone", 0): no_policy}
    for name, kind in POLICIES.items():
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            found[name, seed] = trained(kind(), options.steps, seed)
    rows = []
    for (name, seed), policy in found.items():
        for about, payloads in PAYLOADS.items():
            shape = f"seed {seed}, {options.steps} steps"
            rows += as_rows(tried(policy, payloads), f"{name}, {about}", shape=shape)
    for case, metric in dict.fromkeys((row["case"], row["metric"]) for row in rows):
        values = [r["value"] for r in rows if (r["case"], r["metric"]) == (case, metric)]
        print(
            f"{case}: {metric} median {statistics.median(values):.4g}, "
            f"of {len(values)} in [{min(values):.4g}, {max(values):.4g}]"
        )
    if options.rows:
        append_rows(options.rows, "closed_loop", rows, "cpu", commit=started_from)


if __name__ == "__main__":
    main()
