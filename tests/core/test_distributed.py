"""Gradients of two gloo processes under DDP equal those of one process with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = """
import os
import sys
import torch
from torch import distributed, nn

from inl_core import INLDynamics, RMSNorm

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

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(9))
for adaptive in ("token", "channel", "layer"):
    alone, shared = Block(adaptive), nn.parallel.DistributedDataParallel(Block(adaptive))
    alone(x).backward()
    shared(x[2 * rank : 2 * rank + 2]).backward()
    for (name, a), b in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert a.grad.abs().max() > 0, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=name)
distributed.barrier()
distributed.destroy_process_group()
# DDP keeps the process group alive: its threads would still run while the interpreter shuts down,
# which on a busy machine ends in "terminate called without an active exception".
sys.stdout.flush()
os._exit(0)
"""


def test_ddp_with_two_processes(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
