"""Run the tests that docs/promises.md names, and count what they inject.

    python -m benchmarks.robustness.promise_counts --rows benchmarks/results.csv

The tests of the sections about faults and hostile input, slow ones too, but not the fuzzing, which
keeps a log of its own. A test that injects several things notes how many, with `record_property`;
any other counts as one. If one fails or runs into its time limit there are no rows, and status 1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from benchmarks.common.results import append_rows, commit
from benchmarks.robustness.promises_page import FAULTS, INPUTS, PAGE, ROOT

NAMED = re.compile(r"`(\S+\.py)::(test_\w+)`")


def named_tests(page):
    """Section by test, "FILE::NAME" below tests/; a test of two sections counts in the first."""
    found = {}
    for part in page.split("\n## ")[1:]:
        title = part.partition("\n")[0]
        if title in (*FAULTS, *INPUTS):
            for file, name in NAMED.findall(part):
                if not file.startswith("properties/"):
                    found.setdefault(f"{file}::{name}", title)
    return found


def counts(report, sections):
    """Of pytest's XML: (section, metric) to number, and the names of tests that did not pass."""
    found, wrong = Counter(), []
    for case in ET.parse(report).iter("testcase"):
        file = case.get("classname").removeprefix("tests.").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name').partition('[')[0]}"
        if case.find("skipped") is not None:
            found[sections[name], "skipped"] += 1
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            wrong.append(f"{file}::{case.get('name')}")
        noted = [p.get("value") for p in case.iter("property") if p.get("name") == "injected"]
        found[sections[name], "tests"] += 1
        found[sections[name], "injected"] += int(noted[0]) if noted else 1
    return found, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="CSV that gets the rows")
    parser.add_argument("--only", help="a section alone")
    options = parser.parse_args()
    code, sections = commit(), named_tests(PAGE.read_text())
    if options.only:
        sections = {test: title for test, title in sections.items() if title == options.only}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-m", "slow or not slow", "-q"]
        # The newer family of reports has no place for what a test notes.
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        command += [f"tests/{test}" for test in sections]
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        status = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, check=False).returncode
        found, wrong = counts(report, sections)
    for (section, metric), number in found.items():
        print(f"{section:>24}  {metric:<9} {number:>6}")
    if status or wrong:
        sys.exit(f"pytest ended with {status}; not as promised: {', '.join(wrong)}")
    if options.rows:
        rows = [
            {"case": section, "metric": metric, "value": number, "unit": ""}
            for (section, metric), number in found.items()
        ]
        append_rows(options.rows, "promises", rows, commit=code)


if __name__ == "__main__":
    main()
