"""Commands run by several processes on this machine."""

import os
import subprocess
import sys


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` offline on one CPU thread; fails with what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ
        | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        | environment,
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
