"""Processes of one run: work done once by the main process, and errors about dead processes."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

from inl_core.run.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

MAIN_TIMEOUT = timedelta(days=1)
"""Longest wait for the main process, which may decode a data set or measure FID."""

RESUME_HINT = "resume from the last checkpoint with --resume auto"

# torch has no exception type for a lost connection, only messages with these words.
_CONNECTION_WORDS = ("gloo", "nccl", "connection", "socket", "tcpstore", "broken pipe")


# The group itself belongs to torch, which ends its threads with `destroy_process_group`: one that
# lived until the interpreter ends would abort the process.
_message_groups: WeakKeyDictionary[ProcessGroup, ReferenceType[ProcessGroup]] = WeakKeyDictionary()


def message_group() -> ProcessGroup | None:
    """A gloo group of all processes, made on the first call, which all of them make together.

    The default group will not do on GPUs: it makes the host wait for the device, and gives up after
    ten minutes. None where torch.distributed is not initialised: there is one process.
    """
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return None
    default = distributed.group.WORLD
    assert default is not None
    known = _message_groups.get(default)
    group = known and known()
    if group is None:
        group = distributed.new_group(backend="gloo", timeout=MAIN_TIMEOUT)
        assert isinstance(group, distributed.ProcessGroup)  # this process is in it
        _message_groups[default] = ref(group)
    return group


def largest(number: int) -> int:
    """The largest of the numbers that the processes call this with."""
    if (group := message_group()) is None:
        return number
    import torch
    from torch import distributed

    shared = torch.tensor([number])
    distributed.all_reduce(shared, distributed.ReduceOp.MAX, group=group)
    return int(shared)


def on_main(
    work: Callable[[], T], is_main: bool, count: int, group: ProcessGroup | None = None
) -> T:
    """Call a function in the main process only; all processes wait and get its result.

    Args:
        work: Called in the main process. The result is pickled for the others.
        is_main: Whether this process is the main one (rank 0).
        count: Number of processes.
        group: Process group for the exchange; the default group if None.

    Returns:
        What `work` returned, in every process.

    Raises:
        UserError: In every process, if `work` raised it.
        RuntimeError: In the other processes, if `work` raised anything else.
    """
    result: T | None = None
    error: Exception | None = None
    if is_main:
        try:
            result = work()
        except Exception as raised:
            error = raised
    if count > 1:
        from torch.distributed import broadcast_object_list

        shared = [(result, error and (type(error).__name__, str(error)))]
        broadcast_object_list(shared, src=0, group=group)
        result, message = shared[0]
        if error is None and message is not None:
            name, text = message
            is_user_error = name == UserError.__name__
            error = UserError(text) if is_user_error else RuntimeError(f"{name} in rank 0: {text}")
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType] (None only where T is)


_FILES, _FILES_PER_LOADER = 64, 32
"""Open files of a process, and of its share in a data loader worker: pipes, and a file for every
tensor of the batches that are prepared ahead."""


def allow_open_files(loaders: int) -> None:
    """Raise the limit of open files of this process to what its data loader workers need.

    A worker that cannot open another file loses its batch, and the run would wait for it for ever.

    Args:
        loaders: Number of data loader workers.

    Raises:
        UserError: The system's limit is lower.
    """
    if sys.platform == "win32":
        return
    import resource

    needed = _FILES + _FILES_PER_LOADER * loaders
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise UserError(
            f"a process may open {hard} files here, and {loaders} loader workers need {needed}: "
            f"raise the limit (ulimit -n {needed}), or use fewer loader workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def _dying_workers() -> Iterator[None]:
    """Give a worker that dies while it hands over a batch torch's words for a dead worker."""
    try:
        yield
    except (OSError, EOFError) as error:
        frames = traceback.walk_tb(error.__traceback__)
        modules = {frame.f_globals.get("__name__") for frame, _ in frames}
        if "multiprocessing.connection" not in modules:
            raise
        raise RuntimeError(f"DataLoader worker closed its connection, {error!r}") from error


def _release_frames(error: BaseException | None) -> None:
    """Drop what the finished frames of an error hold, its loader with a dead worker above all.

    While that loader lives, torch's handler raises for its worker again, anywhere in the program,
    whenever a child process of any kind ends.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


@contextmanager
def report_dead_workers(hint: str = RESUME_HINT) -> Iterator[None]:
    """Translate torch's errors about a dead data loader worker or process of the run.

    Args:
        hint: What the user can do, to complete the message.

    Raises:
        UserError: Naming what died, as far as torch reports it.
    """
    try:
        with _dying_workers():
            yield
    except RuntimeError as error:
        text = str(error)
        first_line = text.partition("\n")[0]
        if "DataLoader worker" in text:
            _release_frames(error)
            raise UserError(
                f"a data loader worker died ({first_line}): it may have run out of memory, use "
                f"fewer loader workers; {hint}"
            ) from error
        if any(word in text.lower() for word in _CONNECTION_WORDS):
            raise UserError(
                f"another process of this run no longer responds ({first_line}): see its own "
                f"messages, or it was killed, for instance for lack of memory; {hint}"
            ) from error
        raise
