"""The fused epilogue of a branch equals its separate steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inl_core import (
    INLDynamics,
    INLDynamicsLite,
    branch_epilogue,
    collect_dynamics_stats,
    reference,
)
from support.tensors import randn64

KINDS = ("token", "channel", "layer", "lite")


def build(kind: str) -> INLDynamics | INLDynamicsLite:
    if kind == "lite":
        module = INLDynamicsLite(6)
    else:
        module = INLDynamics(6, adaptive=kind, controller_hidden=4)  # type: ignore[arg-type]
    for index, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(index))
    return module.double()


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, first: bool, conditioned: bool, noted: bool) -> None:
    module, x, residual = build(kind), randn64(2, 3, 6), randn64(2, 3, 6, seed=1)
    v = None if first else randn64(2, 3, 6, seed=2)
    rows = (randn64(2, 6, seed=3), randn64(2, 6, seed=4), randn64(2, 6, seed=5))
    weight = randn64(6, seed=6)
    inputs = [t.requires_grad_() for t in (x, residual, v, *rows, weight) if t is not None]
    inputs += list(module.parameters())

    moved, want_v = module(x, v)
    if conditioned:
        total = reference.gated_residual(residual, moved, rows[0])
        want = reference.modulated_rms_norm(total, *rows[1:], weight, 1e-3)
    else:
        total = residual + moved
        want = reference.rms_norm(total, weight, 1e-3)
    results = [[want, total, want_v]]
    conditions = rows if conditioned else None
    if noted:
        with collect_dynamics_stats(module):
            got = branch_epilogue(module, x, v, residual, conditions, weight, 1e-3)
        assert "velocity_rms" in module.get_dynamics_stats()
    else:
        got = branch_epilogue(module, x, v, residual, conditions, weight, 1e-3)
    results.append(list(got))
    for outputs in results:
        loss = sum((y.square().sum() for y in outputs[:]), torch.zeros((), dtype=torch.float64))
        outputs += torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(*results)


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"h has shape \(2, 5\), expected \(\.\.\., 6\)"):
        branch_epilogue(build("layer"), randn64(2, 5), None, randn64(2, 5))


def test_a_subclass_is_called_as_a_module() -> None:
    """Its step may be another: going by its coefficients would silently undo the override."""

    class Still(INLDynamics):
        def forward(
            self, h: Tensor, v: Tensor | None = None, force: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            return h, torch.zeros_like(h)

    module = Still(6, adaptive="channel").double()
    x, residual = randn64(2, 3, 6), randn64(2, 3, 6, seed=1)
    _, total, v = branch_epilogue(module, x, None, residual)
    torch.testing.assert_close(total, residual + x)
    assert not v.any()
