"""The folder of a run: one run at a time writes in it, and where that run goes on from."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from complexity_dit.distributed import Processes
from complexity_dit.state import STATE_FILE
from inl_core.run.checkpoints import checkpoint_to_resume, run_lock
from inl_core.run.errors import UserError
from inl_core.run.files import recover


@contextmanager
def claimed_folder(out: Path, resume: str, processes: Processes) -> Iterator[Path | None]:
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
            for folder in (out, out / "checkpoints", out / "samples"):
                recover(folder)
            return checkpoint_to_resume(out, resume, STATE_FILE)

        yield processes.on_main(claim)
