"""One training on all processor cores: a process each, as torchrun would start them.

A small network keeps one core busy and hardly a second one with threads: on two cores, two
processes of 8 pictures do 1.6 times the steps of one process of 16 with two threads. On a GPU, and
for more than one machine, `accelerate launch -m complexity_dit train` is the way.
"""

import logging
import multiprocessing
import os
import socket
import sys
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessException, spawn

from complexity_dit.config import TrainConfig
from complexity_dit.errors import UserError
from complexity_dit.train import train

MAX_PROCESSES = 4
"""Beyond this the parts of a small batch are too small to be worth a process."""


def train_on_all_cores(config: TrainConfig, processes: int | None = None) -> Path:
    """Do what `train` does, in several processes where there is no GPU.

    The batch is shared out, so it must be divisible by the number of processes; by default that is
    the largest number that divides it, at most the cores there are and at most `MAX_PROCESSES`.

    Args:
        config: The whole run.
        processes: How many; None for the default.

    Returns:
        The folder of the finished pipeline.

    Raises:
        UserError: For what `train` raises it for.
    """
    processes = processes or _default_processes(config.batch_size)
    if processes == 1:
        return train(config)
    threads = max(1, usable_cores() // processes)
    complaints = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (processes, _free_port(), threads, config, complaints)
    try:
        spawn(_worker, arguments, nprocs=processes)
    except ProcessException:
        if complaints.empty():
            raise
        raise UserError(complaints.get()) from None
    return Path(config.out) / "pipeline"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _default_processes(batch_size: int) -> int:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return 1
    most = min(usable_cores(), MAX_PROCESSES)
    return max(n for n in range(1, most + 1) if batch_size % n == 0)


def _worker(
    rank: int,
    processes: int,
    port: int,
    threads: int,
    config: TrainConfig,
    complaints: "SimpleQueue[str]",
) -> None:
    """One process of the training, told by torchrun's variables who it is."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": str(threads),
    }
    torch.set_num_threads(threads)
    level = logging.INFO if rank == 0 else logging.ERROR  # the others would only say it again
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    try:
        train(config)
    except UserError as error:
        complaints.put(str(error))
        sys.exit(2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
