"""A child process that is killed between its file operations, and one step before which to act."""

import math
import os
import signal
import sys
import traceback
from collections.abc import Callable

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}


def operations_until(kill: float, work: Callable[[], object]) -> int | None:
    """Do `work` in a child that is killed right before its file operation of this number, from 0.

    Returns the number of operations of the whole work, None if it was killed; never, if `kill` is
    infinite. Operations are those that Python tells its audit hooks of.
    """
    mine, others = os.pipe()
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal done
            if event in OPERATIONS:
                if done == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        try:
            sys.addaudithook(count)
            work()
            os.write(others, str(done).encode())
            os._exit(0)
        except BaseException:
            kill = math.inf
            traceback.print_exc()
            os._exit(1)
    os.close(others)
    with os.fdopen(mine) as pipe:
        total = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child ended with status {status}"
    return int(total) if status == 0 else None


def before_step(
    package: str, step: int, act: Callable[[], object], patch: Callable[..., None] = setattr
) -> None:
    """Call `act` in a training step of a package, `"dit"` or `"lm"`, counted from 1.

    `patch` sets the method, for good by default; a test gives `monkeypatch.setattr`.
    """
    if package == "dit":
        from complexity_dit.training.batches import StepBatches

        item = StepBatches.__getitem__

        def read(self, index):
            if index == step - 1:
                act()
            return item(self, index)

        patch(StepBatches, "__getitem__", read)
    else:
        from complexity_lm.trainer import LMTrainer

        training_step = LMTrainer.training_step

        def train(self, *arguments, **named):
            if self.state.global_step == step - 1:
                act()
            return training_step(self, *arguments, **named)

        patch(LMTrainer, "training_step", train)
