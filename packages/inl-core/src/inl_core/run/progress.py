"""How far some work is: a bar on a terminal, lines of the log elsewhere."""

import logging
from typing import Self

logger = logging.getLogger(__name__)


class Progress:
    """A progress bar, or a line for each tenth where standard error is a file; a context manager.

    Args:
        name: What is done, e.g. "sampling".
        total: Number of items; None if unknown, and then there are no lines.
        unit: Name of an item.
        shown: Whether to show anything: not in the other processes.
    """

    def __init__(self, name: str, total: int | None, unit: str, shown: bool = True) -> None:
        from tqdm.auto import tqdm  # of the packages that use this; inl_core needs only torch

        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self._bar = tqdm(total=total, desc=name, unit=unit, disable=None if shown else True)
        self._logs = shown and bool(self._bar.disable)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n: int = 1) -> None:
        """Count `n` items that are done."""
        before, self.done = self.done, self.done + n
        self._bar.update(n)
        if self._logs and self.total and before * 10 // self.total < self.done * 10 // self.total:
            logger.info("%s: %d of %d %ss", self.name, self.done, self.total, self.unit)
