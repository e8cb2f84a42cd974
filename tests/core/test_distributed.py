"""Gradients of two gloo processes under DDP equal those of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import os
import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from inl_core import INLDynamics, RMSNorm, TokenRoutedMLP, make_routing_plan

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
"""

DYNAMICS = """
class Block(nn.Module):
    def __init__(self, adaptive):
        super().__init__()
        self.norm = RMSNorm(6)
        self.dynamics = INLDynamics(6, adaptive=adaptive, controller_hidden=4)
        for index, parameter in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(index)
            nn.init.normal_(parameter, mean=0.5, std=0.2, generator=generator)

    def forward(self, x):
        h, v = self.dynamics(self.norm(x))
        h, v = self.dynamics(h, v)
        return h.square().mean() + v.square().mean()

x = torch.randn(4, 3, 6)
for adaptive in ("token", "channel", "layer"):
    alone, shared = Block(adaptive), DistributedDataParallel(Block(adaptive))
    alone(x).backward()
    shared(x[2 * rank : 2 * rank + 2]).backward()
    for (name, a), b in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert a.grad.abs().max() > 0, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=name)
"""

FIRST_LAYER = """
from inl_core import LoopedDynamics, branch_epilogue

class Block(nn.Module):
    def __init__(self, dynamics):
        super().__init__()
        self.dynamics = dynamics

    def forward(self, x):
        if isinstance(self.dynamics, LoopedDynamics):
            return self.dynamics.loop(torch.tanh, x, 1)[0]
        return self.dynamics(x)[0]

class Fused(nn.Module):
    def __init__(self, dynamics):
        super().__init__()
        self.dynamics = dynamics

    def forward(self, x):
        return branch_epilogue(self.dynamics, x, None, x)[0]

def made():
    for adaptive in ("token", "channel", "layer"):
        yield Block(INLDynamics(6, adaptive=adaptive))
        yield Fused(INLDynamics(6, adaptive=adaptive))
    yield Block(LoopedDynamics(6))

for block in made():
    shared = DistributedDataParallel(block)
    for _ in range(3):  # the second step finds what the first has not filled
        shared(torch.randn(4, 3, 6)).square().mean().backward()
        assert all(p.grad is not None for p in shared.parameters())
"""

ROUTED = """
model = TokenRoutedMLP(12, 20, 4)
ids = torch.tensor([[0, 0, 1, 0], [1, 3, 3, 3]])  # 3 in only one process, 2 in none
x = torch.randn(2, 4, 12)
model(x, make_routing_plan(ids, 4)).square().mean().backward()
expected = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
shared = DistributedDataParallel(model)
shared(x[rank], make_routing_plan(ids[rank], 4)).square().mean().backward()
torch.testing.assert_close([p.grad for p in model.parameters()], expected)
"""

# DDP keeps the process group alive: its threads would still run while the interpreter shuts down,
# which on a busy machine ends in "terminate called without an active exception".
END = """
distributed.barrier()
distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    "body", [DYNAMICS, FIRST_LAYER, ROUTED], ids=["dynamics", "first-layer", "routed"]
)
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, body: str) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", START + body + END, str(rank), str(tmp_path / "store")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
