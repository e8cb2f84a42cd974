"""Whose turn it is to paint: one at a time, the others in a line of bounded length."""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from inl_core.run.errors import UserError

AWAY_SECONDS = 60.0
"""After so long without being asked for its next frame a painting has nobody who looks."""

T = TypeVar("T")


@dataclass(eq=False)
class Ticket:
    """A place in the line.

    Attributes:
        stop: Is set when the place is lost, or by whoever asked for the painting.
        away_since: When its last frame was handed out; None while the next one is being made.
    """

    stop: threading.Event
    away_since: float | None = None


class Turns:
    """A line of paintings; the first one paints.

    Not the queue of the server: that one counts every click, so a full one would refuse the click
    that stops a painting and makes room.

    Args:
        waiting: How many may wait behind the one that paints.
    """

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._line: list[Ticket] = []
        self._lock = threading.Lock()

    def join(self, stop: threading.Event) -> Ticket:
        """Take the last place.

        Raises:
            UserError: The line is full.
        """
        with self._lock:
            self._drop_the_absent()
            if len(self._line) > self.waiting:
                raise UserError(
                    f"one painting is under way and {self.waiting} wait, which is the most "
                    "(--queue_size): try again in a moment"
                )
            self._line.append(ticket := Ticket(stop))
        return ticket

    def before(self, ticket: Ticket) -> int:
        """How many are before this one; those who have left are not counted."""
        with self._lock:
            self._drop_the_absent()
            return self._line.index(ticket) if ticket in self._line else 0

    def leave(self, ticket: Ticket) -> None:
        """Give the place free."""
        with self._lock:
            if ticket in self._line:
                self._line.remove(ticket)

    def frames(self, ticket: Ticket, made: Iterable[T]) -> Iterator[T]:
        """Hand out what is made, noting when nobody asks for more; the place is free at the end."""
        try:
            for frame in made:
                ticket.away_since = time.monotonic()
                yield frame
                ticket.away_since = None
        finally:
            self.leave(ticket)

    def _drop_the_absent(self) -> None:
        now = time.monotonic()
        for ticket in list(self._line):
            if ticket.away_since is not None and now - ticket.away_since > AWAY_SECONDS:
                ticket.stop.set()
                self._line.remove(ticket)
