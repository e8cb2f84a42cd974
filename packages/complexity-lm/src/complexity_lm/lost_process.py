"""A process of a run that is gone: the others say which one, and end instead of waiting for it.

Between processes on CPUs a broken connection is an error at once; on GPUs it may be ten minutes of
silence. So each process also watches the others on its own host by their process ids, in a thread
that can end a process which hangs. Those on other hosts are left to torch's timeouts.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from complexity_lm.errors import UserError

LOOK_EVERY = 2.0
"""Seconds between looks at the other processes."""

GRACE = 15.0
"""Seconds that a process has to end by itself when another one is gone."""

RESUME = "go on from the last checkpoint with --resume auto"
"""What to do about it in a training."""

_SIGNS = ("gloo", "nccl", "connection", "socket", "tcpstore", "broken pipe")
"""Words of torch's errors about a partner that does not answer, which have no type of their own."""


@dataclass(frozen=True)
class Peer:
    """A process of the run, as it introduced itself.

    Attributes:
        rank: Its number in the run.
        host: Name of its host.
        realm: Where its process id means something: the host, and there a container.
        process: The id.
    """

    rank: int
    host: str
    realm: str
    process: int

    def is_gone(self) -> bool:
        """Whether it has ended, also if nobody has asked for its exit status yet."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        try:
            # "PID (NAME) STATE …", and a name may have brackets of its own.
            state = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False  # another system than Linux, or it ended this moment: the next look tells
        return state in "ZX"


def introduce(rank: int) -> Peer:
    """This process."""
    realm = socket.gethostname()
    if Path("/proc/self/ns/pid").exists():
        realm += " " + os.readlink("/proc/self/ns/pid")
    return Peer(rank, socket.gethostname(), realm, os.getpid())


@contextmanager
def losses_told(
    rank: int, count: int, group: distributed.ProcessGroup | None = None, remedy: str = RESUME
) -> Iterator[None]:
    """While it is entered, the loss of a process is an error that names it.

    The processes leave it together: whoever ends before the others counts as lost.

    Args:
        rank: Of this process.
        count: Processes of the run; all of them enter.
        group: Over which they introduce themselves; torch's own by default.
        remedy: What the user can do then.

    Raises:
        UserError: Naming the process that is gone, one of these or one that loaded data.
    """
    others: list[Peer] = []
    if count > 1:
        everybody: list[Peer] = [introduce(rank)] * count
        distributed.all_gather_object(everybody, introduce(rank), group=group)
        others = [peer for peer in everybody if peer.rank != rank]
    with watched(neighbours(introduce(rank), others), remedy):
        try:
            yield
        except RuntimeError as error:
            told = _named(error, rank, others, remedy)
            if told is None:
                raise
            raise told from error


def neighbours(me: Peer, others: Sequence[Peer]) -> list[Peer]:
    """Those whose process ids mean something here."""
    if sys.platform == "win32":  # where os.kill(id, 0) is no question
        return []
    return [peer for peer in others if peer.realm == me.realm]


@contextmanager
def watched(peers: Sequence[Peer], remedy: str = RESUME) -> Iterator[None]:
    """End this process, with a message, if one of these is gone and it does not end by itself."""
    over = threading.Event()
    if peers:
        threading.Thread(target=_watch, args=(peers, over, remedy), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(peers: Sequence[Peer], over: threading.Event, remedy: str) -> None:
    while not over.wait(LOOK_EVERY):
        gone = [peer for peer in peers if peer.is_gone()]
        if gone and not over.wait(GRACE):
            print(f"error: {_words(gone, remedy)}", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread waits inside a library: nothing else reaches it


def _named(error: RuntimeError, rank: int, others: Sequence[Peer], remedy: str) -> UserError | None:
    """The error in the run's own words if it is about a process that is gone."""
    text = str(error)
    if "DataLoader worker" in text:
        return UserError(
            f"a process that loads data is gone ({text.splitlines()[0]}): it may have run out of "
            f"memory, give it fewer workers; {remedy}"
        )
    if not others:
        return None
    near = neighbours(introduce(rank), others)
    until = time.monotonic() + 2 * LOOK_EVERY
    while not (gone := [peer for peer in near if peer.is_gone()]) and time.monotonic() < until:
        time.sleep(0.1)
    if gone:
        return UserError(_words(gone, remedy))
    if any(sign in text.lower() for sign in _SIGNS):
        return UserError(
            f"a process of this run does not answer any more ({text.splitlines()[0]}): its own "
            f"messages say why; {remedy}"
        )
    return None


def _words(gone: Sequence[Peer], remedy: str) -> str:
    named = ", ".join(f"{peer.rank} ({peer.process} on {peer.host})" for peer in gone)
    return (
        f"process {named} of this run is gone: its own messages say why, or it was killed, "
        f"as a system does that is out of memory; {remedy}"
    )
