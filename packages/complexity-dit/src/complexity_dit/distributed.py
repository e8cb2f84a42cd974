"""The processes of one run: messages between them, their shares of the work, and the device.

In a single process every function here returns at once, and accelerate is not imported.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from inl_core.run import workers
from inl_core.run.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device that a setting names; ``auto`` is the GPU of this process if there is one.

    Raises:
        UserError: There is no such device, or no GPU can be used.
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


def process_state() -> "PartialState | None":
    """The state of accelerate if there are several processes, else None."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not started and not distributed.is_initialized():
        return None
    from accelerate import PartialState

    # Without cpu=True accelerate silently treats a machine without a GPU as a single process.
    state = PartialState(cpu=not torch.cuda.is_available())
    return state if state.num_processes > 1 else None


@contextmanager
def own_process_group() -> Iterator[None]:
    """End the group of the processes, if this block began it.

    A gloo group that lives until the interpreter ends may abort the process there.
    """
    joined = distributed.is_initialized()
    try:
        yield
    finally:
        if not joined and distributed.is_initialized():
            distributed.destroy_process_group()


def process_count() -> int:
    """Number of processes."""
    state = process_state()
    return state.num_processes if state else 1


def is_main() -> bool:
    """Whether this process prints and writes."""
    state = process_state()
    return state is None or state.is_main_process


def on_main(work: Callable[[], T]) -> T:
    """Call a function in the main process; all processes wait for it and get its result.

    Args:
        work: Called in the main process. The result is pickled for the others.

    Raises:
        UserError: In every process, if `work` raised it.
        RuntimeError: In the other processes, if `work` raised anything else.
    """
    state = process_state()
    if state is None:
        return work()
    return workers.on_main(
        work, state.is_main_process, state.num_processes, workers.message_group()
    )


def main_first(work: Callable[[], T]) -> T:
    """Call a function in every process, in the main one before the others: it fills a cache."""
    results: list[T] = []
    on_main(lambda: results.append(work()))
    return results[0] if results else work()


def largest(number: int) -> int:
    """The largest of the numbers that the processes call this with."""
    return number if process_state() is None else workers.largest(number)


def all_agree(value: bool) -> bool:
    """Whether ``value`` is true in every process."""
    return not largest(not value)


def own_blocks(count: int, block: int) -> list[list[int]]:
    """The share of this process in ``range(count)``, which is dealt in blocks of ``block``."""
    state = process_state()
    first, step = (state.process_index, state.num_processes) if state else (0, 1)
    blocks = [list(range(start, min(start + block, count))) for start in range(0, count, block)]
    return blocks[first::step]


def gather_rows(rows: NDArray[np.float32], numbers: list[int], count: int) -> NDArray[np.float32]:
    """Put the rows of all processes together.

    Args:
        rows: float32 (n, D), those of this process; n may be 0.
        numbers: Their n positions among all rows.
        count: Number of rows over all processes.

    Returns:
        float32 (count, D) in every process, with the bits that a single process would have made.
    """
    state = process_state()
    shares: list[tuple[NDArray[np.float32], list[int]]] = [(rows, numbers)]
    if state is not None:
        shares *= state.num_processes
        distributed.all_gather_object(shares, (rows, numbers), group=workers.message_group())
    gathered = np.empty((count, max(share.shape[1] for share, _ in shares)), np.float32)
    for share, positions in shares:
        if positions:  # an empty share may not know the width
            gathered[positions] = share
    return gathered
