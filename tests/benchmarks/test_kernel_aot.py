"""The kernels compile ahead of time for A100 and H100 and keep everything in registers."""

import importlib
import os
import re
import time
from pathlib import Path

import pytest

import inl_core.kernels

pytest.importorskip("triton", reason="triton is not installed on this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has nothing to compile", allow_module_level=True)

from benchmarks.speed import kernel_aot as aot

TABLE = Path(__file__).parents[2] / "docs/results/tables/kernels.md"


def assert_no_spills(spec: aot.AotSpec, arch: int) -> None:
    report = aot.compile_report(spec, arch)
    assert 0 < report["registers"] <= 255  # the limit per thread
    assert report["shared"] <= 99 * 1024  # what every GPU since A100 gives a program
    spilled = report["spills_store"] + report["spills_load"] + report["stack"]
    assert spilled == 0, f"{spec[0].__name__} {aot.describe(spec)}: {report}"


# The kernels that need most registers, at D = 768 in bf16, each on its tighter architecture.
HEAVIEST = [
    ("inl_step", 1, 90),
    ("rms_norm", 5, 90),
    ("modulated_rms_norm", 5, 90),
    ("gated_residual_norm", 5, 90),
]


@pytest.mark.parametrize(("file", "index", "arch"), HEAVIEST)
def test_the_heaviest_kernels_do_not_spill(file: str, index: int, arch: int) -> None:
    assert_no_spills(aot.all_specs()[file][index], arch)


def committed() -> list[list[str]]:
    lines = TABLE.read_text().splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "sm_" in line
    ]


def test_the_committed_table_has_every_kernel_and_no_spill() -> None:
    rows = committed()
    wanted = {
        (file, spec[0].__name__, aot.describe(spec), f"sm_{arch}")
        for file, specs in aot.all_specs().items()
        for spec in specs
        for arch in aot.ARCHITECTURES
    }
    assert {tuple(row[:4]) for row in rows} == wanted, "run `make kernels`"
    assert [row for row in rows if row[6:9] != ["0", "0", "0"]] == []


def test_programs_that_are_to_run_at_once_have_the_registers_for_it() -> None:
    """A launch counts on the registers that its file states for H100 and H200.

    With more, a few programs would start when the others are done.
    """
    checked = set()
    for file, kernel, variant, arch, registers, *_ in committed():
        module = importlib.import_module(f"inl_core.kernels.{file}")
        if arch == "sm_90" and "backward" in kernel and hasattr(module, "REGISTERS"):
            stated = module.REGISTERS
            if isinstance(stated, dict):
                stated = stated[int(re.search(r"KIND_A=(\d)", variant)[1])]  # type: ignore[index]
            assert int(registers) <= stated, (file, variant)
            checked.add(file)
    norms = {"rms_norm", "add_rms_norm", "modulated_rms_norm", "gated_residual_norm"}
    assert checked == norms | {"gated_residual", "inl_step", "qk_norm_rope"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("file", list(aot.all_specs()))
def test_no_kernel_spills(file: str, arch: int) -> None:
    for spec in aot.all_specs()[file]:
        assert_no_spills(spec, arch)


def test_every_kernel_file_has_specifications() -> None:
    folder = os.path.dirname(inl_core.kernels.__file__)
    files = {name[:-3] for name in os.listdir(folder) if name.endswith(".py")}
    files.remove("__init__")
    assert set(aot.all_specs()) == files


def test_a_spill_is_reported() -> None:
    """A tile that needs four times the registers that the threads of one warp have."""
    kernel, signature, constexprs, attrs, _ = aot.all_specs()["inl_step"][1]
    crowded = (kernel, signature, constexprs | {"BLOCK_R": 4, "BLOCK_D": 256}, attrs, 1)
    report = aot.compile_report(crowded, 90)
    assert report["spills_store"] > 0
    assert report["spills_load"] > 0


def test_a_slow_compilation_is_stopped() -> None:
    kernel, signature, constexprs, attrs, _ = aot.all_specs()["inl_step"][1]
    huge = (kernel, signature, constexprs | {"BLOCK_R": 32, "BLOCK_D": 256}, attrs, 2)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.2 s"):
        aot.compile_report(huge, 90, timeout=0.2)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("change", [{"D": None}, {"no_such": 1}])
def test_a_specification_needs_every_constant_and_no_unknown_name(change: dict) -> None:
    kernel, _, constants, _, num_warps = aot.all_specs()["rms_norm"][0]
    changed = {name: value for name, value in constants.items() if name not in change}
    changed |= {name: value for name, value in change.items() if value is not None}
    with pytest.raises(ValueError, match=r"missing or unknown: \['(D|no_such)'\]"):
        aot.aot_spec(kernel, changed, num_warps, {})
