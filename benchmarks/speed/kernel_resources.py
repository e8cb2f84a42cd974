"""Table of the registers, shared memory and spills of every kernel; needs no GPU.

Compiles the specifications of `kernel_aot` for sm_80 and sm_90. The exit status is 1 if a kernel
spills.

    python -m benchmarks.speed.kernel_resources --out docs/results/tables/kernels.md
"""

import argparse
import sys
from pathlib import Path

import triton
from benchmarks.speed import kernel_aot as aot
from tqdm import tqdm

HEAD = """# Registers, shared memory and spills of the Triton kernels

Written by `make kernels`: every kernel compiled ahead of time at its default shapes (the variants
are those of D = 768 and D = 1152) with triton {triton}. Registers and stack are a thread's, shared
memory and spilled bytes a program's and an instruction's, counted in the machine code.

"""
COLUMNS = (
    "file", "kernel", "variant", "arch", "registers", "shared", "spills_store", "spills_load",
    "stack",
)  # fmt: skip


def table(rows):
    """Markdown table of the reports."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"]
    lines.append("|" + "".join(" --- |" if i < 4 else " ---: |" for i in range(len(COLUMNS))))
    lines += ["| " + " | ".join(str(row[name]) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/tables/kernels.md"))
    parser.add_argument("--match", default="", help="only kernel files with this in their name")
    options = parser.parse_args()
    files = {name: specs for name, specs in aot.all_specs().items() if options.match in name}
    total = sum(len(specs) for specs in files.values()) * len(aot.ARCHITECTURES)
    rows = list(tqdm(aot.reports(options.match), total=total, unit="kernel", desc="compiling"))
    unfinished = options.out.with_suffix(".tmp")
    unfinished.write_text(HEAD.format(triton=triton.__version__) + table(rows))
    unfinished.replace(options.out)
    spilled = [row for row in rows if row["spills_store"] + row["spills_load"] + row["stack"]]
    print(f"{len(rows)} compilations, {len(spilled)} with spills -> {options.out}")
    for row in spilled:
        print("spills:", row, file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
