"""Threads of a command sleep soon when they wait and are as many as there are cores to use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inl_core.run import threads
from inl_core.run.threads import WAITING, cpu_quota, usable_cores

NAMES = (*WAITING, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def started(code: str, *words: str, **environment: str) -> list[str]:
    """What a fresh process prints of its variables and of torch's threads."""
    own = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=own | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


PRINT = """
import os, sys
{start}
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
print(*(os.environ.get(name, "-") for name in names))
import torch
print(torch.get_num_threads())
"""
# What a console script does, up to the work of the command.
SCRIPT = """
sys.argv = ["/usr/bin/{program}", "--help"]
from {package}.__main__ import main
try:
    main()
except SystemExit:
    pass
"""


@pytest.mark.parametrize("package", ["complexity_dit", "complexity_lm"])
@pytest.mark.parametrize(
    ("environment", "policy", "count"),
    [
        ({}, ["-", "20000", "1"], None),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "-", "-"], None),
        ({"OMP_NUM_THREADS": "1"}, ["-", "20000", "1"], 1),  # as torchrun sets it
        ({"LOCAL_WORLD_SIZE": "4096"}, ["-", "20000", "1"], 1),
    ],
    ids=["by default", "a policy", "a number", "processes"],
)
def test_a_command_sets_what_is_not_set(package, environment, policy, count):
    start = SCRIPT.format(program=package.replace("_", "-"), package=package)
    *_, waiting, spins, blocktime, threads, found = started(
        PRINT.format(start=start), **environment
    )
    wanted = str(count or usable_cores())
    assert [waiting, spins, blocktime] == policy
    assert threads == found == wanted


@pytest.mark.parametrize("package", ["complexity_dit", "complexity_lm"])
def test_python_m_is_the_command_too(package, tmp_path):
    """The variables of the process, seen by one that it starts: an optional package's import."""
    write(tmp_path / "sitecustomize.py", "import atexit, os\natexit.register(lambda: print(*(\n"
          "    'seen', os.environ.get('GOMP_SPINCOUNT'))))")  # fmt: skip
    own = {name: value for name, value in os.environ.items() if name not in NAMES}
    own["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{own.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", package, "--version"],
        env=own, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "seen 20000" in done.stdout


@pytest.mark.parametrize("package", ["complexity_dit", "complexity_lm", "inl_core"])
def test_a_process_that_imports_the_library_is_not_touched(package):
    found = started(PRINT.format(start=f"import {package}"))
    assert found[:3] == ["-", "-", "-"]


def test_nothing_is_set_after_torch_is_loaded():
    start = "import torch\nfrom inl_core.run.threads import set_threads\nset_threads()"
    assert started(PRINT.format(start=start))[:3] == ["-", "-", "-"]


def test_help_loads_no_torch():
    start = SCRIPT.format(program="complexity-dit", package="complexity_dit")
    assert started(f"import sys\n{start}\nprint('torch' in sys.modules)")[-1] == "False"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3.0),
        (
            {
                "proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            3.0,
        ),
        # In a container the path is the host's, and the group of the container is mounted.
        ({"proc/self/cgroup": "0::/host/x", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/c",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_quota_of_a_cgroup_is_read(files, quota, tmp_path, monkeypatch):
    for name, text in files.items():
        write(tmp_path / name, text)
    assert cpu_quota(tmp_path) == quota
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert usable_cores(tmp_path) == (4 if quota is None else max(1, int(quota)))


def test_two_threads_of_one_core_count_once_and_only_where_the_process_may_run(
    tmp_path, monkeypatch
):
    for n in range(8):
        write(
            tmp_path / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list",
            f"{n % 4},{n % 4 + 4}",
        )
    for allowed, cores in ((set(range(8)), 4), ({0, 1, 4, 5}, 2), ({3}, 1)):
        monkeypatch.setattr(
            threads.os, "sched_getaffinity", lambda pid, allowed=allowed: allowed, raising=False
        )
        assert usable_cores(tmp_path) == cores
