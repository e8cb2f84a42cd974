"""The folder of a run: one run at a time writes in it, and where that run goes on from."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState

from inl_core.run.checkpoints import checkpoint_to_resume, run_lock
from inl_core.run.errors import UserError
from inl_core.run.files import recover
from inl_core.run.workers import on_main

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

        yield on_main(claim, processes.is_main_process, processes.num_processes)
