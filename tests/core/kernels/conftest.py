"""Run every kernel test module in a process of its own, in Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before triton is imported and must not leak into other tests, so
in an ordinary pytest run each module here is one item, which starts pytest again on that module.
With the variable already set (``TRITON_INTERPRET=1 pytest tests/core/kernels/test_x.py -k name``)
its tests run right here; with ``INL_TEST_DEVICE=cuda`` they run here too, compiled, on the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The modules share checks.py and are imported under importlib mode, which adds no folder.
sys.path.insert(0, str(Path(__file__).parent))

PLAIN = {"test_ops_switch.py"}
"""Modules that need no interpreter."""

TIME_LIMIT = 280


class InterpretedModule(pytest.File):
    """One item in the place of all tests of a module."""

    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedRun.from_parent(self, name="interpreted")


class InterpretedRun(pytest.Item):
    """Pytest on one module, with the interpreter on."""

    def runtest(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        # A worker of xdist must not look like one to the child.
        environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        if marks := self.config.getoption("markexpr", ""):
            command += ["-m", marks]
        done = subprocess.run(
            command,
            env=environment,
            cwd=self.config.rootpath,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
        # Status 5: the module has no test under this -m.
        if done.returncode not in (0, 5):
            pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} in Triton's interpreter"


def _patch_the_language_once() -> None:
    """Spare the interpreter a search through all of ``triton.language`` at every helper's call.

    It looks for builtins to replace when a kernel is launched, and again at each call of a helper,
    where it undoes nothing afterwards: once a helper is as good, and several times as fast.
    """
    from triton.runtime import interpreter

    patched: set[object] = set()
    call = interpreter.InterpretedFunction.__call__

    def call_patched(self, *args, **kwargs):
        if self.fn in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn)
        return call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_patched


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_the_language_once()
elif device := os.environ.get("INL_TEST_DEVICE"):
    import torch

    torch.set_default_device(device)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Collector | None:
    here = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("INL_TEST_DEVICE") == "cuda"
    if here or module_path.name in PLAIN:
        return None
    return InterpretedModule.from_parent(parent, path=module_path)
