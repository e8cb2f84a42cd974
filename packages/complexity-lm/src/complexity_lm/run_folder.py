"""The folder of a run: one run at a time writes in it, and where that run goes on from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import PartialState

from complexity_lm.checkpoint_folders import checkpoint_to_resume
from complexity_lm.errors import UserError
from complexity_lm.files import recover
from complexity_lm.run_lock import run_lock

STATE_FILE = "trainer_state.json"
"""What Trainer writes into every checkpoint."""


@contextmanager
def claimed_folder(out: Path, resume: str, processes: PartialState) -> Iterator[Path | None]:
    """Hold a run's folder for this run, cleared of what a killed one left half-written.

    Args:
        out: The folder; made if it is not there.
        resume: auto, none, or a checkpoint folder.
        processes: Of the run; the main one holds the folder.

    Yields:
        The checkpoint to go on from, its checksums compared; None for a fresh start.

    Raises:
        UserError: Another run writes there, the folder is not free, there is no such checkpoint, or
            it is damaged.
    """
    with ExitStack() as held:

        def claim() -> Path | None:
            if resume not in ("auto", "none") and not (Path(resume) / STATE_FILE).is_file():
                raise UserError(
                    f"--resume {resume} is no checkpoint folder (no {STATE_FILE} in it)"
                )
            held.enter_context(run_lock(out))
            for folder in (out, out / "checkpoints"):
                recover(folder)
            return checkpoint_to_resume(out, resume, STATE_FILE)

        yield _on_main(claim, processes)


def _on_main(work: Callable[[], Path | None], processes: PartialState) -> Path | None:
    """What the main process finds, or the `UserError` that it meets, in every process."""
    answer, error = None, None
    if processes.is_main_process:
        try:
            answer = work()
        except UserError as raised:
            error = raised
    if processes.num_processes > 1:
        shared = [(answer and str(answer), error and str(error))]
        torch.distributed.broadcast_object_list(shared, src=0)
        found, message = shared[0]
        answer = Path(found) if found else None
        error = error or (UserError(message) if message else None)
    if error is not None:
        raise error
    return answer
