"""Lines of a log in place of a progress bar."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class ProgressLog:
    """A line for each tenth of some work, for where standard error is a file and a bar is off.

    Args:
        name: What is done, e.g. "sampling".
        total: Number of items.
        unit: Name of an item.
        shown: Whether to write lines at all: where there is a bar, and in the other processes, not.
    """

    def __init__(self, name: str, total: int, unit: str, shown: bool) -> None:
        self.name, self.total, self.unit, self.shown = name, total, unit, shown
        self.done = 0

    def update(self, n: int = 1) -> None:
        """Count `n` items that are done."""
        before, self.done = self.done, self.done + n
        if self.shown and self.total and before * 10 // self.total < self.done * 10 // self.total:
            logger.info("%s: %d of %d %ss", self.name, self.done, self.total, self.unit)
