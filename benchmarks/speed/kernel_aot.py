"""Ahead-of-time compilation without a GPU: registers, shared memory and spills of a kernel.

``python -m benchmarks.speed.kernel_aot [--arch 80 90] [--match inl_step] [--json]`` prints the
table of
every specification that the kernel files export as ``AOT``. The interpreter must be off: it
replaces the kernels by Python functions, which have nothing to compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import inl_core.kernels
from inl_core.kernels._common import INTERPRETED, AotSpec

ARCHITECTURES = (80, 90)
"""A100 and H100/H200."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SPILL = re.compile(r"\b(STL|LDL)(?:\.\w+)*\b")
_BITS = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stop what runs in the block, child processes of `subprocess.run` included."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("compile_report keeps its time limit by a signal: use the main thread")
    expired = False

    def stop(*_: Any) -> None:
        nonlocal expired
        expired = True
        raise TimeoutError

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    pending, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        if expired:  # the compiler wraps whatever is raised inside it
            raise TimeoutError(f"the compilation took longer than {seconds:g} s") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if pending:  # a limit around ours, such as a test runner's, goes on with what is left of it
            left = max(pending - (time.monotonic() - start), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _cuobjdump(flag: str, cubin: Path, timeout: float) -> str:
    command = [str(_TOOLS / "cuobjdump"), flag, str(cubin)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=timeout
    ).stdout


def compile_report(spec: AotSpec, arch: int, timeout: float = 120.0) -> dict[str, int]:
    """Compile one kernel for one architecture and say what it uses.

    Args:
        spec: (kernel, signature, constexprs, attrs, num_warps), as `aot_spec` makes it.
        arch: Compute capability times ten: 80 or 90.
        timeout: Seconds for the compilation (ptxas may take minutes on a kernel that spills).

    Returns:
        ``registers`` a thread, ``shared`` bytes a program, ``stack`` bytes a thread, and
        ``spills_store`` / ``spills_load``: bytes moved to and from local memory by the
        instructions of the machine code, each counted once.

    Raises:
        RuntimeError: In the interpreter, and outside the main thread.
        TimeoutError: If the compilation takes longer than `timeout`.
    """
    if INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    kernel, signature, constexprs, attrs, num_warps = spec
    source = ASTSource(kernel, signature, constexprs, attrs)
    with _time_limit(timeout):
        compiled = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps}
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin, timeout)
        code = _cuobjdump("--dump-sass", cubin, timeout)
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    moved = {"STL": 0, "LDL": 0}
    for found in _SPILL.finditer(code):
        bits = _BITS.search(found.group(0))
        moved[found.group(1)] += _WIDTH[bits.group(1)] if bits else 4
    return {
        "registers": used["REG"],
        # What Triton asks for at the launch: the binary itself reports static memory only.
        "shared": max(compiled.metadata.shared, used["SHARED"]),
        "spills_store": moved["STL"],
        "spills_load": moved["LDL"],
        "stack": used["STACK"],
    }


def describe(spec: AotSpec) -> str:
    """Name a specification: element type, then the constants that tell it from its siblings."""
    _, signature, constexprs, _, num_warps = spec
    pointers = [kind for kind in signature.values() if kind.startswith("*")]
    dtype = pointers[0][1:] if pointers else "none"
    shown = [
        f"{name}={int(value) if isinstance(value, bool) else value}"
        for name, value in constexprs.items()
    ]
    return f"{dtype} {' '.join(shown)} warps={num_warps}"


def all_specs() -> dict[str, list[AotSpec]]:
    """Collect the list ``AOT`` of every kernel file.

    Returns:
        File name without suffix -> its specifications; files without the list are left out.
    """
    found: dict[str, list[AotSpec]] = {}
    for module in sorted(pkgutil.iter_modules(inl_core.kernels.__path__), key=lambda m: m.name):
        if module.name == "aot":
            continue
        specs = getattr(importlib.import_module(f"inl_core.kernels.{module.name}"), "AOT", None)
        if specs:
            found[module.name] = list(specs)
    return found


def reports(match: str = "", archs: tuple[int, ...] = ARCHITECTURES) -> Iterator[dict[str, Any]]:
    """Compile every specification.

    Args:
        match: Only files whose name contains this text.
        archs: Architectures to compile for.

    Yields:
        A row a specification and architecture: ``file``, ``kernel``, ``variant``, ``arch`` and what
        `compile_report` gives.
    """
    for file, specs in all_specs().items():
        if match not in file:
            continue
        for spec in specs:
            for arch in archs:
                names = {"file": file, "kernel": spec[0].__name__, "variant": describe(spec)}
                yield {**names, "arch": f"sm_{arch}", **compile_report(spec, arch)}


def main(arguments: list[str] | None = None) -> int:
    """Print the reports; the exit status is 1 if a kernel spills."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.kernel_aot", description=__doc__
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--match", default="", help="only kernel files with this in their name")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    spilled = False
    for row in reports(options.match, tuple(options.arch)):
        spilled = spilled or row["spills_store"] + row["spills_load"] + row["stack"] > 0
        line = json.dumps(row) if options.json else "  ".join(str(value) for value in row.values())
        print(line, flush=True)
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
