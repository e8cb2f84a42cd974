"""SIGTERM and Ctrl-C as a request to save and stop, shared by all processes of a run."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """Turns SIGTERM and SIGINT into a request: finish the step, save, stop.

    A second Ctrl-C interrupts at once. A second SIGTERM does not: a cluster sends it to a launcher
    and to its children, and the launcher passes it on. `number` is the first signal, 0 for none;
    `workers.largest(number)` is what any process of the run got.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals; in another thread the caller has to.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            logger.warning("%s: saving after this step", signal.Signals(number).name)
