"""What the processes of one run settle among themselves, host to host: no device waits for it."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from inl_core.run.workers import on_main

T = TypeVar("T")

MAIN_TIMEOUT = timedelta(days=1)
"""How long the others wait for the main process, which may decode a data set or measure FID."""


class Processes:
    """The processes of a run; a single one talks to nobody.

    Messages go through a gloo group of their own: on GPUs the training's own group would make the
    host wait for the device, and gives up after ten minutes.

    Args:
        accelerator: Of the run.

    Attributes:
        count: How many there are.
        index: Which of them this is.
        is_main: Whether it is the one that writes.
        group: Their gloo group; None for a single one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.count, self.index = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self.group = None
        if self.count > 1:
            self.group = distributed.new_group(backend="gloo", timeout=MAIN_TIMEOUT)

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes call this with."""
        if self.group is None:
            return number
        shared = torch.tensor([number])
        distributed.all_reduce(shared, distributed.ReduceOp.MAX, group=self.group)
        return int(shared)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process; all wait for it.

        Args:
            work: What the main process does; what it returns is pickled for the others.

        Returns:
            What `work` returned, in every process.

        Raises:
            UserError: In every process, if `work` raised it.
        """
        return on_main(work, self.is_main, self.count, self.group)

    def main_first(self, work: Callable[[], T]) -> T:
        """Do something in every process, in the main one before the others: it fills a cache."""
        mine: list[T] = []
        self.on_main(lambda: mine.append(work()))
        return mine[0] if self.is_main else work()
