"""Ahead-of-time compilation without a GPU: registers, shared memory and spills of every kernel.

`kernel_resources` writes the table of these specifications. Triton's interpreter must be off: it
replaces the kernels by Python functions, which cannot be compiled.
"""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inl_core.kernels import (
    _common,
    add_rms_norm,
    gated_residual,
    gated_residual_norm,
    inl_step,
    modulated_rms_norm,
    qk_norm_rope,
    rms_norm,
    routed_mlp,
    swiglu,
)

ARCHITECTURES = (80, 90)
"""A100 and H100/H200."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SPILL = re.compile(r"\b(STL|LDL)(?:\.\w+)*\b")
_BITS = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


# ------------------------------------------------------------------------------------------------
# What is compiled: every kernel at its default shapes, mostly at the widths of the models

WIDTHS = (192, 384, 768, 1152)
"""Of tiny, S, B and XL."""

AotSpec = tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int]
"""(kernel, signature, constexprs, attrs, num_warps): one ahead-of-time compilation."""

_FLOATS = {"eps", "dt", "beta_max", "velocity_max", "mu_min", "mu_max"}
_COUNTS = {
    "rows", "q_rows", "k_rows", "blocks", "parts", "samples", "tiles", "walkers", "programs",
}  # fmt: skip


def aot_spec(
    kernel: Any, constants: Mapping[str, Any], num_warps: int, types: Mapping[str, str]
) -> AotSpec:
    """Describe one ahead-of-time compilation, aligned as at a launch with default shapes.

    Args:
        kernel: The jitted function.
        constants: Value of every constexpr; None for an optional pointer left out.
        num_warps: As at the launch.
        types: Triton types of other arguments where they differ from the default: pointers are
            "*bf16", strides and sizes "i32:16", counts "i32", the remaining numbers "fp32".
            Pointers and "i32:16" are multiples of 16; without that mark loads stay scalar.

    Raises:
        ValueError: If a constexpr of the kernel is missing, or it has no argument of a given name.
    """
    needed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    if wrong := sorted(needed - set(constants) | {*constants, *types} - set(kernel.arg_names)):
        raise ValueError(f"arguments of {kernel.__name__} missing or unknown: {wrong}")
    signature, attrs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else types.get(name) or _default_type(name)
        signature[name] = kind.removesuffix(":16")
        if kind.startswith("*") or kind.endswith(":16"):
            attrs[index,] = [["tt.divisibility", 16]]
    return kernel, signature, dict(constants), attrs, num_warps


def _default_type(name: str) -> str:
    if name.endswith("_ptr"):
        return "*bf16"
    return "fp32" if name in _FLOATS else "i32" if name in _COUNTS else "i32:16"


def _spec(kernel: Any, constants: Mapping[str, Any], warps: int, fp32: str, **types: str) -> Any:
    """`aot_spec` with what concerns this kernel of constants, fp32 pointers and other types."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types |= {f"{name}_ptr": "*fp32" for name in fp32.split()}
    known = set(kernel.arg_names) - set(constants)
    return aot_spec(
        kernel, constants, warps, {name: kind for name, kind in types.items() if name in known}
    )


def _row_specs(module: ModuleType, fp32: str, **absent: None) -> list[AotSpec]:
    """Both kernels of a file at every width, without the pointers `absent`."""
    specs = []
    for width in WIDTHS:
        for kernel, per_thread in ((module._forward, 8), (module._backward, module.PER_THREAD)):
            sizes = {**_common.row_config(width, per_thread=per_thread), **absent}
            specs.append(_spec(kernel, sizes, sizes.pop("num_warps"), fp32))
    return specs


def _gated_residual_specs() -> list[AotSpec]:
    specs = []
    for width in WIDTHS:
        sizes = _common.row_config(width)
        specs.append(_spec(gated_residual._forward, sizes, sizes.pop("num_warps"), ""))
        block_r, block_d, warps = _common.tile(width)
        sizes = {"D": width, "BLOCK_R": block_r, "BLOCK_D": block_d}
        specs.append(_spec(gated_residual._backward, sizes, warps, "dgate"))
    return specs


def _common_specs() -> list[AotSpec]:
    sizes = {"BLOCK_P": _common.BLOCK_P, "BLOCK_C": _common.BLOCK_C, "third_ptr": None}
    return [_spec(_common._add_parts, sizes, 4, "parts")]


def _swiglu_specs() -> list[AotSpec]:
    sizes = {"BLOCK": swiglu.BLOCK}
    return [_spec(k, sizes, swiglu.WARPS, "") for k in (swiglu._forward, swiglu._backward)]


def _qk_norm_rope_specs() -> list[AotSpec]:
    specs = []
    for width, heads in ((64, 12), (72, 16)):
        sizes = qk_norm_rope._config(width, heads, heads)
        warps = sizes.pop("num_warps")
        types = {"tokens": "i32"}
        if width % 32:  # the row of a table is then no multiple of 16
            types["table_token_stride"] = "i32"
        fp32 = "q_weight k_weight dq_weight dk_weight cos sin"
        for kernel in (qk_norm_rope._forward, qk_norm_rope._backward):
            specs.append(_spec(kernel, sizes, warps, fp32, **types))
    return specs


def _routed_mlp_specs() -> list[AotSpec]:
    width, inner, experts = 768, 2048, 8
    by_rows = ("gate_up", "d_inner", "down", "d_x")
    specs = []
    for dtype in (torch.bfloat16, torch.float32):
        launches = []
        for name in by_rows:
            kernel = getattr(routed_mlp, f"{name}_kernel")
            options = routed_mlp._tile_options(kernel, experts, inner, width, dtype)
            launches.append((kernel, options))
        for sizes in ((inner, width, False), (width, inner, True)):
            launches.append((routed_mlp.d_weight_kernel, routed_mlp._weight_options(*sizes, dtype)))
        for kernel, options in launches:
            pointers = (name for name in kernel.arg_names if name.endswith("_ptr"))
            types = {} if dtype == torch.bfloat16 else dict.fromkeys(pointers, "*fp32")
            types |= {"order_ptr": "*i64", "offsets_ptr": "*i32"}
            specs.append(_spec(kernel, options, options.pop("num_warps"), "", **types))
    return specs


def _inl_step_specs() -> list[AotSpec]:
    token, channel, layer = inl_step.TOKEN, inl_step.CHANNEL, inl_step.LAYER
    specs = []
    for width, kind, dtype, force in (
        (768, token, "bf16", False),
        (768, token, "bf16", True),
        (768, token, "fp32", True),
        (768, channel, "bf16", False),
        (768, layer, "bf16", False),
        (192, channel, "bf16", False),
        (384, channel, "bf16", False),
        (1152, token, "bf16", True),
        (1152, channel, "bf16", False),
    ):
        block_r, block_d, warps = _common.tile(width)
        kinds = {"KIND_A": kind, "KIND_B": kind, "KIND_C": kind}
        absent = {} if force else {"force_ptr": None}
        constants = absent | kinds | {"CLIP": True, "BLOCK_R": block_r, "BLOCK_D": block_d}
        fp32 = "mu dmu" if kind == token else "mu dmu a b c da db dc"
        if dtype == "fp32":
            fp32 += " h v a b c force h_out v_out dh_next dv_next dh dv da db dc dforce"
        for kernel in (inl_step.forward_kernel, inl_step.backward_kernel):
            specs.append(_spec(kernel, constants, warps, fp32))
        if not force:
            block_p, block_c, warps = inl_step.FINISH
            parts = ("a_parts_ptr", "b_parts_ptr", "c_parts_ptr") if kind == token else ()
            last = dict.fromkeys(parts) | kinds | {"BLOCK_P": block_p, "BLOCK_C": block_c}
            fp32 = "mu_parts a_parts b_parts c_parts mu a b c dmu da db dc"
            specs.append(_spec(inl_step.finish_kernel, last, warps, fp32))
    return specs


@cache
def all_specs() -> dict[str, list[AotSpec]]:
    """What is compiled of every kernel file, by file name without suffix."""
    norm, sums = "weight dweight", "weight dgate dshift sums"
    return {
        "_common": _common_specs(),
        "add_rms_norm": _row_specs(add_rms_norm, norm, b_ptr=None, dresidual_ptr=None),
        "gated_residual": _gated_residual_specs(),
        "gated_residual_norm": _row_specs(gated_residual_norm, sums, weight_ptr=None),
        "inl_step": _inl_step_specs(),
        "modulated_rms_norm": _row_specs(modulated_rms_norm, sums, weight_ptr=None),
        "qk_norm_rope": _qk_norm_rope_specs(),
        "rms_norm": _row_specs(rms_norm, norm),
        "routed_mlp": _routed_mlp_specs(),
        "swiglu": _swiglu_specs(),
    }


# ------------------------------------------------------------------------------------------------
# Compilation


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
        if pending:  # an enclosing limit, such as a test runner's, continues with what is left
            left = max(pending - (time.monotonic() - start), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _cuobjdump(flag: str, cubin: Path, timeout: float) -> str:
    command = [str(_TOOLS / "cuobjdump"), flag, str(cubin)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=timeout
    ).stdout


def compile_report(spec: AotSpec, arch: int, timeout: float = 120.0) -> dict[str, int]:
    """Compile one kernel for one architecture and report the resources it uses.

    Args:
        spec: As made by `aot_spec`.
        arch: Compute capability times ten: 80 or 90.
        timeout: Seconds for the compilation (ptxas may take minutes on a kernel that spills).

    Returns:
        ``registers`` and ``stack`` bytes per thread, ``shared`` bytes per program, and
        ``spills_store`` / ``spills_load``: bytes moved to and from local memory by the
        instructions of the machine code, each counted once.

    Raises:
        RuntimeError: In the interpreter, or outside the main thread.
        TimeoutError: If the compilation takes longer than `timeout`.
    """
    if _common.INTERPRETED:
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
    """Element type, constants and warps of a specification, as one string."""
    _, signature, constexprs, _, num_warps = spec
    pointers = [kind for kind in signature.values() if kind.startswith("*")]
    dtype = pointers[0][1:] if pointers else "none"
    shown = [
        f"{name}={int(value) if isinstance(value, bool) else value}"
        for name, value in constexprs.items()
    ]
    return f"{dtype} {' '.join(shown)} warps={num_warps}"


def reports(match: str = "", archs: tuple[int, ...] = ARCHITECTURES) -> Iterator[dict[str, Any]]:
    """Compile every specification of the files whose name contains `match`.

    Yields:
        One row per specification and architecture: ``file``, ``kernel``, ``variant``, ``arch`` and
        the values of `compile_report`.
    """
    for file, specs in all_specs().items():
        if match not in file:
            continue
        for spec in specs:
            for arch in archs:
                names = {"file": file, "kernel": spec[0].__name__, "variant": describe(spec)}
                yield {**names, "arch": f"sm_{arch}", **compile_report(spec, arch)}
