"""Looking at a model's dynamics changes nothing in it and reads what the modules did."""

import pytest
import torch
from torch import nn

from inl_core import DYNAMICS_COLUMNS, INLDynamics, INLDynamicsLite, dynamics_modules, read_dynamics


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = INLDynamics(4), nn.ModuleList([INLDynamicsLite(4, alpha=0.7)])

    def forward(self, h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.second[0](*self.first(h * scale))[0]


def test_every_module_is_reported_by_name() -> None:
    model = Deep()
    assert model.training
    assert [*dynamics_modules(model)] == ["first", "second.0"]
    found = read_dynamics(model, [torch.full((1, 4), -3.0)])
    assert model.training
    assert [tuple(sorted(stats)) for stats in found.values()] == [
        tuple(sorted(DYNAMICS_COLUMNS))
    ] * 2
    assert found["first"]["velocity_abs_max"] == pytest.approx(0.3)  # beta times 3
    assert found["second.0"]["alpha_mean"] == pytest.approx(0.7)
    # Of [[1 - dt g b, dt g a], [-b, a]]: its determinant is alpha, its eigenvalues are complex or
    # real with that product, so the largest is at least sqrt(alpha).
    assert found["second.0"]["spectral_radius"] >= 0.7**0.5


def test_keyword_inputs_and_a_model_without_dynamics() -> None:
    found = read_dynamics(Deep(), {"h": torch.full((1, 4), -3.0), "scale": 2.0})
    assert found["first"]["velocity_abs_max"] == pytest.approx(0.6)
    assert read_dynamics(nn.Linear(2, 2), [torch.zeros(1, 2)]) == {}
