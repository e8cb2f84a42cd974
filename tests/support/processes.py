"""Commands run by several processes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # As in this process: modules of tests that a script imports find `support` too.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
}


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` offline on one CPU thread; fails with what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def torchrun(
    processes: int, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun ARGUMENTS` with gloo.

    Not `accelerate launch --cpu --num_processes 2`: without mpirun that starts one process.
    """
    return python(
        "-m", "torch.distributed.run", "--nproc_per_node", processes,
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *arguments, **environment,
    )  # fmt: skip
