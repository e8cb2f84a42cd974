"""One evaluation on several processes: who does what, and how the parts come together.

Started by torchrun or accelerate, every process takes its blocks of images; features are gathered
and the main process alone measures and writes. In one process nothing here imports accelerate.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from inl_core.run import workers
from inl_core.run.workers import report_dead_workers

if TYPE_CHECKING:
    from accelerate import PartialState

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


def dead_workers_reported() -> AbstractContextManager[None]:
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
