"""Threads of a command: as many as there are cores to use, which soon sleep while they wait.

The variables are read when torch loads its OpenMP: libgomp in its wheels for Linux
(GOMP_SPINCOUNT), libomp or libiomp in others (KMP_BLOCKTIME). A thread that waits for the others of
its team by spinning takes the core that one of them needs as soon as anything else runs on the
machine; one that sleeps at once wakes too late for the next small operation
(`benchmarks/speed/bench_threads.py`).
"""

import os
import sys
from itertools import pairwise
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that set how a thread waits."""

SHORT_SPIN = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""Turns of the waiting loop (300,000 by default) or milliseconds (200) before a thread sleeps."""


def set_threads(root: Path = Path("/")) -> None:
    """Set OpenMP's variables for this process and those that it starts.

    For commands alone, before torch is loaded; later nothing would read them, and nothing is set. A
    policy or a number that is set already stays: the user's, or torchrun's.

    Args:
        root: Of the system's files.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in WAITING):
        os.environ |= SHORT_SPIN
    if "OMP_NUM_THREADS" not in os.environ:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "")
        share = int(processes) if processes.isdecimal() and int(processes) else 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores(root) // share))


def set_threads_of(program: str, module: str) -> None:
    """`set_threads` if this process is that command, for a package whose import loads torch.

    Args:
        program: Name of the command, as a script.
        module: Its module, as `python -m` has it.
    """
    names = (program, f"{program}.exe", f"{program}-script.py")
    as_module = any(pair == ("-m", module) for pair in pairwise(sys.orig_argv))
    if Path(sys.argv[0]).name in names or (sys.argv[0] == "-m" and as_module):
        set_threads()


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may run on, at most those that its cgroup pays for."""
    if hasattr(os, "sched_getaffinity"):
        processors = os.sched_getaffinity(0)
    else:
        processors = set(range(os.cpu_count() or 1))
    topology = root / "sys/devices/system/cpu"
    # Two threads of one core share its units: a second one adds nothing to a matrix product.
    cores = {
        _text(topology / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in processors
    }
    quota = cpu_quota(root)
    return len(cores) if quota is None else max(1, min(len(cores), int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the cgroups of this process may use at a time; None without a limit."""
    limits = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        controllers = names.split(",")
        if number != "0" and "cpu" not in controllers:
            continue
        mount = root / "sys/fs/cgroup" / ("" if number == "0" else "cpu")
        # In a container the path may be that of the host, and its own group is the mounted one.
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            limits.append(_quota(mount / folder))
    found = [limit for limit in limits if limit]
    return min(found) if found else None


def _quota(folder: Path) -> float | None:
    """Cores of one cgroup: of version 2 (`cpu.max`), or of version 1."""
    words = (_text(folder / "cpu.max") or "").split()
    if not words:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [_text(folder / name) or "" for name in names]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # max, or no file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
