"""The distances as torchmetrics metrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from complexity_dit.evaluation.distances import (
    FeatureMetric,
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    fid_from_features,
    kid_from_features,
    manifold_overlap,
)
from inl_core.run.errors import UserError
from support.processes import torchrun

KID = {"subsets": 5, "subset_size": 12, "seed": 3}


def features(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture(params=[FrechetDistance, lambda: KernelDistance(**KID), PrecisionRecall])
def metric(request: pytest.FixtureRequest) -> FeatureMetric:
    return request.param()


def values(metric: FeatureMetric) -> list[float]:
    result = metric.compute()
    if isinstance(result, dict):
        return [float(v) for v in result.values()]
    return [float(v) for v in (result if isinstance(result, tuple) else [result])]


def functional(metric: FeatureMetric, generated: Tensor, real: Tensor) -> list[float]:
    x, y = generated.numpy(), real.numpy()
    if isinstance(metric, FrechetDistance):
        return [fid_from_features(x, y)]
    if isinstance(metric, KernelDistance):
        return list(kid_from_features(x, y, **KID)[:2])
    return list(manifold_overlap(x, y))


def test_updates_in_parts_equal_the_functions(metric: FeatureMetric) -> None:
    generated, real = features(30, 0, 0.3), features(25, 1)
    for part, is_real in ((generated[:7], False), (real, True), (generated[7:], False)):
        metric.update(part, real=is_real)
    assert values(metric) == functional(metric, generated, real)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # after load_state_dict
def test_metrics_can_be_reset_cloned_and_restored(metric: FeatureMetric) -> None:
    generated, real = features(30, 0, 0.3), features(25, 1)
    empty = metric.clone()
    metric.persistent(True)
    empty.persistent(True)
    metric.update(generated, real=False)
    metric.update(real, real=True)
    expected = values(metric)
    assert values(metric.clone()) == expected
    empty.load_state_dict(metric.state_dict())
    assert values(empty) == expected
    metric.reset()
    metric.update(generated, real=True)
    metric.update(real, real=False)
    assert values(metric) == functional(metric, real, generated)


def test_errors_name_the_missing_side_and_the_shape() -> None:
    metric = FrechetDistance()
    metric.update(features(9, 0), real=True)
    with pytest.raises(UserError, match=r"no generated features; call update\(features, real=Fals"):
        metric.compute()
    with pytest.raises(UserError, match=r"shape \(9,\); expected \(n, D\)"):
        metric.update(torch.zeros(9), real=True)


def test_bfloat16_features_are_accepted() -> None:
    metric = FrechetDistance()
    generated, real = features(30, 0, 0.3).bfloat16(), features(25, 1).bfloat16()
    metric.update(generated, real=False)
    metric.update(real, real=True)
    assert values(metric) == functional(metric, generated.float(), real.float())


WORKER = """
import sys
import numpy as np
import torch
from torch import distributed
from complexity_dit.evaluation.distances import FrechetDistance, KernelDistance, PrecisionRecall

distributed.init_process_group("gloo")
rank = distributed.get_rank()
with np.load(sys.argv[1]) as file:
    sides = {name: torch.from_numpy(file[name]) for name in ("generated", "real")}
out = []
for metric in (FrechetDistance(), KernelDistance(5, 12, 3), PrecisionRecall()):
    for name, x in sides.items():
        metric.update(x[:11] if rank == 0 else x[11:], real=name == "real")
    result = metric.compute()
    out += list(result.values()) if isinstance(result, dict) else torch.atleast_1d(
        torch.stack(result) if isinstance(result, tuple) else result
    ).tolist()
np.save(f"{sys.argv[2]}-{rank}.npy", np.array([float(v) for v in out]))
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_compute_the_distances_of_all_features(tmp_path: Path) -> None:
    generated, real = features(30, 0, 0.3), features(25, 1)
    np.savez(tmp_path / "sides.npz", generated=generated.numpy(), real=real.numpy())
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(2, tmp_path / "worker.py", tmp_path / "sides.npz", tmp_path / "out")
    metrics = (FrechetDistance(), KernelDistance(**KID), PrecisionRecall())
    expected = [value for metric in metrics for value in functional(metric, generated, real)]
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"out-{rank}.npy"), expected)
