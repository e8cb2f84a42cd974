"""Two processes with sharded weights (`fully_shard` on a CPU mesh) train like one process."""

import json
from pathlib import Path

import pytest
import torch

from complexity_lm import DeepForCausalLM
from inl_core import apply_bounds, defer_bounds
from support.processes import torchrun

STEPS, ROWS, WORLD = 20, 4, 2
SETTINGS = [
    {"dynamics_placement": "branch"},
    {"dynamics_placement": "force", "num_experts": 3},
    {"num_hidden_layers": 3, "num_loops": 2},
]

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from complexity_lm import DeepForCausalLM

sys.path.insert(0, sys.argv[1])
from test_sharding import SETTINGS, ROWS, batches, train

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
losses = []
for number in range(len(SETTINGS)):
    model = DeepForCausalLM.from_pretrained(f"{sys.argv[2]}/{number}", dtype=torch.float64)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    share = ROWS // world
    mine = [ids[rank * share : (rank + 1) * share] for ids in batches()]
    total = torch.tensor(train(model, mine), dtype=torch.float64)
    dist.all_reduce(total)
    losses.append((total / world).tolist())
if rank == 0:
    with open(f"{sys.argv[2]}/losses.json", "w") as file:
        json.dump(losses, file)
dist.barrier()
dist.destroy_process_group()
"""


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 64, (ROWS, 9), generator=generator) for _ in range(STEPS)]


def train(model: DeepForCausalLM, data: list[torch.Tensor]) -> list[float]:
    model.train()
    defer_bounds(model)  # a process has a part of the batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for step, ids in enumerate(data):
        count = 1 + step % 3 if model.config.num_loops > 1 else None
        loss = model(ids, labels=ids, use_cache=False, num_loops=count).loss
        loss.backward()
        apply_bounds(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_two_sharded_processes_train_like_one(lively, tmp_path: Path) -> None:
    alone = []
    for number, settings in enumerate(SETTINGS):
        model = lively(**settings).double()
        model.save_pretrained(tmp_path / str(number))
        alone.append(train(model, batches()))
        assert alone[-1][-1] != pytest.approx(alone[-1][0], rel=0.01)  # the model did learn

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun(WORLD, script, Path(__file__).parent, tmp_path)
    sharded = json.loads((tmp_path / "losses.json").read_text())
    for one, two in zip(alone, sharded, strict=True):
        assert len(one) == len(two) == STEPS
        assert two == pytest.approx(one, rel=1e-9)
