"""Three mechanical systems whose trajectories a model continues (paper §10).

Each is a function that returns, for a batch of random systems, the equation of motion in fp64 and
the observations. Constants differ between trajectories and are not observed: the model has to infer
them from the motion. Trajectories use Runge-Kutta steps much finer than the sampling interval.
"""

import math
from dataclasses import dataclass

import torch

SUBSTEPS = 10


@dataclass(frozen=True)
class System:
    """A batch of systems of one kind.

    Attributes:
        start: States at time 0, (B, S).
        change: State (B, S) -> its time derivative (B, S).
        observe: States (..., S) -> observations (..., O).
        interval: Seconds between two observations.
    """

    start: torch.Tensor
    change: object
    observe: object
    interval: float


def uniform(draw, count, low, high):
    return low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)


def oscillator(count, draw):
    """A mass on a spring with friction: q'' = -w² q - 2 z w q'; observed: (q, q')."""
    frequency, damping = uniform(draw, count, 1.0, 3.0), uniform(draw, count, 0.02, 0.3)

    def change(state):
        q, speed = state.unbind(-1)
        pull = -(frequency**2) * q - 2 * damping * frequency * speed
        return torch.stack([speed, pull], -1)

    start = torch.randn(count, 2, generator=draw, dtype=torch.float64)
    return System(start, change, lambda states: states, 0.1)


def double_pendulum(count, draw):
    """Two rods of 1 m with 1 kg at their ends, released at rest; observed: sin, cos, speeds."""
    g = 9.81

    def change(state):
        a, b, va, vb = state.unbind(-1)
        d = a - b
        bottom = 3 - torch.cos(2 * d)  # 2 m1 + m2 - m2 cos(2 d) with both masses 1
        ga = (
            -3 * g * torch.sin(a)
            - g * torch.sin(a - 2 * b)
            - 2 * torch.sin(d) * (vb**2 + va**2 * torch.cos(d))
        ) / bottom
        gb = 2 * torch.sin(d) * (2 * va**2 + 2 * g * torch.cos(a) + vb**2 * torch.cos(d)) / bottom
        return torch.stack([va, vb, ga, gb], -1)

    def observe(states):
        a, b, va, vb = states.unbind(-1)
        return torch.stack([a.sin(), a.cos(), b.sin(), b.cos(), va / 3, vb / 3], -1)

    angles = torch.stack([uniform(draw, count, -math.pi / 2, math.pi / 2) for _ in range(2)], -1)
    return System(torch.cat([angles, torch.zeros_like(angles)], -1), change, observe, 0.05)


def arm_acceleration(q, speed, torque, payload=1.0):
    """Acceleration of the two joints, (..., 2), with links of 1 m and masses of 1 and `payload` kg.

    Mass matrix [[1 + 2m + 2mc, m + mc], [m + mc, m]] with m the payload and c = cos q2, and
    Coriolis forces.
    """
    cosine, sine = payload * q[..., 1].cos(), payload * q[..., 1].sin()
    m11, m12, m22 = 1 + 2 * payload + 2 * cosine, payload + cosine, payload
    v1, v2 = speed.unbind(-1)
    left = torque[..., 0] + sine * (2 * v1 * v2 + v2**2)
    right = torque[..., 1] - sine * v1**2
    determinant = m11 * m22 - m12**2
    push = [(m22 * left - m12 * right), (m11 * right - m12 * left)]
    return torch.stack(push, -1) / determinant[..., None]


def arm(count, draw):
    """A two-link arm on a table, driven to a target by a PD controller of unknown gains.

    Links of 1 m with masses of 1 kg at their ends; torque = kp (target - q) - kd q'. Observed:
    joint angles and speeds, and the constant target.
    """
    kp, kd = uniform(draw, count, 5.0, 20.0), uniform(draw, count, 1.0, 6.0)
    target = torch.stack([uniform(draw, count, -1.5, 1.5) for _ in range(2)], -1)

    def change(state):
        q, speed = state[..., :2], state[..., 2:4]
        torque = kp[:, None] * (target - q) - kd[:, None] * speed
        return torch.cat([speed, arm_acceleration(q, speed, torque), torch.zeros_like(target)], -1)

    angles = torch.stack([uniform(draw, count, -1.5, 1.5) for _ in range(2)], -1)
    start = torch.cat([angles, torch.zeros_like(angles), target], -1)
    return System(start, change, lambda states: states, 0.05)


SYSTEMS = {"oscillator": oscillator, "double pendulum": double_pendulum, "arm": arm}


def rk4_step(change, state, dt):
    """One classical Runge-Kutta step of any equation of motion."""
    k1 = change(state)
    k2 = change(state + dt / 2 * k1)
    k3 = change(state + dt / 2 * k2)
    k4 = change(state + dt * k3)
    return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def trajectories(name, count, length, seed):
    """Observations of `count` random systems at `length` times, (count, length, O) fp32."""
    system = SYSTEMS[name](count, torch.Generator().manual_seed(seed))
    state, states = system.start, [system.start]
    for _ in range(length - 1):
        for _ in range(SUBSTEPS):
            state = rk4_step(system.change, state, system.interval / SUBSTEPS)
        states.append(state)
    return system.observe(torch.stack(states, 1)).float()
