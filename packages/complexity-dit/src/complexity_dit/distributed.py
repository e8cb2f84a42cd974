"""Processes of one run: what they agree on, which share of the work each does, where it runs.

In a single process nothing here imports accelerate.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from inl_core.run import workers
from inl_core.run.errors import UserError
from inl_core.run.workers import report_dead_workers

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


def pick_device(name: str) -> torch.device:
    """The device of a setting; ``auto`` is the process's GPU where there is one.

    Raises:
        UserError: No such device, or no GPU can be used.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")

        state = process_state()
        return (state and state.device) or torch.device("cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, and no GPU can be used here; take auto or cpu")
    return device


T = TypeVar("T")


def process_state() -> "PartialState | None":
    """accelerate's state where there are several processes, else None."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not started and not torch.distributed.is_initialized():
        return None
    from accelerate import PartialState

    # Without cpu=True accelerate takes a machine without a GPU for one process, silently.
    state = PartialState(cpu=not torch.cuda.is_available())
    return state if state.num_processes > 1 else None


def report_dead_evaluation_workers() -> AbstractContextManager[None]:
    """Translate errors about processes of the evaluation that died."""
    return report_dead_workers("start the same command again")


def own_blocks(count: int, block: int) -> list[list[int]]:
    """The runs of at most ``block`` numbers below ``count`` that this process does, in turn."""
    state = process_state()
    first, step = (state.process_index, state.num_processes) if state else (0, 1)
    runs = [list(range(start, min(start + block, count))) for start in range(0, count, block)]
    return runs[first::step]


def gather_rows(rows: NDArray[np.float32], numbers: list[int], count: int) -> NDArray[np.float32]:
    """Put the rows of all processes together.

    Args:
        rows: float32 (n, D), this process's; n may be 0.
        numbers: Their places among all rows, n of them.
        count: How many rows there are over all processes.

    Returns:
        float32 (count, D) on every process: the bits that one process would have made.
    """
    state = process_state()
    if state is None:
        whole = np.empty((count, rows.shape[1]), np.float32)
        whole[numbers] = rows
        return whole
    from accelerate.utils import gather

    # Equal shapes are gathered: rows are padded, and a place of -1 marks what is padding.
    width = int(gather(torch.tensor([rows.shape[1]], device=state.device)).max())
    most = int(gather(torch.tensor([len(numbers)], device=state.device)).max())
    padded = torch.zeros(most, width)
    places = torch.full((most,), -1)
    if numbers:
        padded[: len(numbers)] = torch.from_numpy(rows)
        places[: len(numbers)] = torch.tensor(numbers)
    all_rows = gather(padded.to(state.device)).cpu().numpy()
    all_places = gather(places.to(state.device)).cpu().numpy()
    whole = np.empty((count, width), np.float32)
    whole[all_places[all_places >= 0]] = all_rows[all_places >= 0]
    return whole


def all_agree(value: bool) -> bool:
    """Whether ``value`` is true on every process."""
    state = process_state()
    if state is None:
        return value
    from accelerate.utils import gather

    return bool(gather(torch.tensor([int(value)], device=state.device)).min())


def on_main(function: Callable[[], T]) -> T:
    """Call on the main process alone; all processes get what it returned or raised."""
    state = process_state()
    if state is None:
        return function()
    return workers.on_main(function, state.is_main_process, state.num_processes)


def is_main() -> bool:
    """Whether this process prints and writes."""
    state = process_state()
    return state is None or state.is_main_process


def main_first(function: Callable[[], T]) -> T:
    """Call on the main process, then on the others, which find in caches what it left there."""
    state = process_state()
    if state is None:
        return function()
    with state.main_process_first():
        return function()


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

    def __init__(self, accelerator: "Accelerator") -> None:
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
        return workers.on_main(work, self.is_main, self.count, self.group)

    def main_first(self, work: Callable[[], T]) -> T:
        """Do something in every process, in the main one before the others: it fills a cache."""
        mine: list[T] = []
        self.on_main(lambda: mine.append(work()))
        return mine[0] if self.is_main else work()
