"""SIGTERM and SIGINT as a request: finish the step, save, leave."""

import logging
import signal
import threading
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is entered, a first signal is noted and nothing more.

    A second Ctrl-C interrupts at once, for whoever does not want to wait. A second SIGTERM does
    not: a cluster sends it to a launcher and to what it launched, and the launcher passes it on.

    Attributes:
        number: The signal that came first, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals; a training in another one is its
        # caller's to stop.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            logger.warning("%s: saving after this step", signal.Signals(number).name)
