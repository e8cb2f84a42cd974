"""Defects of earlier implementations: their formulas, and a check that detects each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inl_core import INLDynamics, ops, reference
from support.tensors import randn64

# ------------------------------------------------------------------------------------------------
# The parent's weight init overwrites the controller's start


class LinearController(nn.Module):
    """The defect: the controller's output is an ``nn.Linear`` that any parent re-initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, 2.0)


def init_of_a_parent(module: nn.Module) -> None:
    """What language and image models do to all their linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def keeps_its_start(controller: nn.Module) -> bool:
    before = [p.detach().clone() for p in controller.parameters()]
    nn.Sequential(controller).apply(init_of_a_parent)
    return all(torch.equal(a, b) for a, b in zip(before, controller.parameters(), strict=True))


def test_controller_init_is_not_overwritten_by_the_parent() -> None:
    assert not keeps_its_start(LinearController())
    for adaptive in ("token", "channel", "layer"):
        assert keeps_its_start(INLDynamics(4, adaptive=adaptive))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------
# The velocity is clipped after the position has used it


def clip_after_use(
    h: Tensor, v: Tensor, alpha: float, beta: float, gate: float, mu: Tensor, **bounds: Any
) -> tuple[Tensor, Tensor]:
    """The defect."""
    v_next = alpha * v - beta * (h - mu)
    h_next = h + bounds["dt"] * gate * v_next
    return h_next, v_next.clamp(-bounds["velocity_max"], bounds["velocity_max"])


def moves_within_the_clip(update: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """The position moves by at most dt · gate · velocity_max, however fast the state comes in."""
    h, v, mu = randn64(5, 6), 100.0 * randn64(5, 6, seed=1), torch.zeros(6, dtype=torch.float64)
    bounds = {"dt": 0.1, "velocity_max": 10.0, "mu_min": None, "mu_max": None}
    h_next, v_next = update(h, v, 0.9, 0.1, 0.5, mu, **bounds)
    assert v_next.abs().max() == 10.0
    return bool((h_next - h).abs().max() <= 0.1 * 0.5 * 10.0 + 1e-12)


def test_velocity_is_clipped_before_the_position_uses_it() -> None:
    assert not moves_within_the_clip(clip_after_use)
    assert moves_within_the_clip(reference.inl_update)
    assert moves_within_the_clip(ops.inl_update)


def test_away_from_the_clip_both_orders_agree() -> None:
    """So the check above refuses the order of the clip and nothing else."""
    h, v, mu = randn64(5, 6), randn64(5, 6, seed=1), torch.zeros(6, dtype=torch.float64)
    bounds = {"dt": 0.1, "velocity_max": 10.0, "mu_min": None, "mu_max": None}
    want = clip_after_use(h, v, 0.9, 0.1, 0.5, mu, **bounds)
    torch.testing.assert_close(reference.inl_update(h, v, 0.9, 0.1, 0.5, mu, **bounds), want)


# ------------------------------------------------------------------------------------------------
# RMSNorm backward with the weight outside the bracket


class WeightOutsideTheBracket(torch.autograd.Function):
    """The defect: dx = r · w · (dy - x · r² · mean(x · w · dy))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (dy,) = grad_outputs
        r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        mean = (x * weight * dy).mean(-1, keepdim=True)
        return r * weight * (dy - x * r.square() * mean), (dy * x * r).sum(0)


def gradient_error(norm: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Relative error of dx against the Jacobian taken by central differences."""
    x, weight, dy = randn64(3, 8), 0.5 + 2.0 * randn64(8, seed=1).abs(), randn64(3, 8, seed=2)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(norm(leaf, weight), leaf, dy)
    numeric = torch.empty_like(x)
    for index in range(x.numel()):
        nudge = torch.zeros_like(x)
        nudge.view(-1)[index] = 1e-6
        difference = norm(x + nudge, weight) - norm(x - nudge, weight)
        numeric.view(-1)[index] = (difference * dy).sum() / 2e-6
    return ((dx - numeric).norm() / numeric.norm()).item()


def test_rms_norm_backward_has_the_weight_inside_the_bracket() -> None:
    assert gradient_error(WeightOutsideTheBracket.apply) > 0.05
    assert gradient_error(reference.rms_norm) < 1e-6
    assert gradient_error(ops.rms_norm) < 1e-6
