"""The totals of docs/promises.md: what is counted, and that nothing broken is counted as kept."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPORT = """<testsuites><testsuite>
<testcase classname="tests.faults.test_disk" name="test_a[dit]"><properties>
<property name="injected" value="12" /></properties></testcase>
<testcase classname="tests.faults.test_disk" name="test_a[lm]" />
<testcase classname="tests.dit.training.test_kill" name="test_b"><failure message="no" /></testcase>
<testcase classname="tests.dit.training.test_kill" name="test_c"><skipped message="no" /></testcase>
</testsuite></testsuites>"""
SECTIONS = {
    "faults/test_disk.py::test_a": "Full and failing disks",
    "dit/training/test_kill.py::test_b": "Crash and power loss",
    "dit/training/test_kill.py::test_c": "Crash and power loss",
}


def row(bench, case, metric, value, commit="c"):
    from benchmarks.common import results

    told = {"bench": bench, "case": case, "metric": metric, "value": str(value), "commit": commit}
    return dict.fromkeys(results.FIELDS, "") | told


def test_every_section_has_tests_to_run():
    from benchmarks.robustness.promise_counts import named_tests
    from benchmarks.robustness.promises_page import FAULTS, INPUTS, PAGE

    found = named_tests(PAGE.read_text())
    assert {*found.values()} == {*FAULTS, *INPUTS}
    assert not [name for name in found if "fuzz" in name]


def test_what_a_test_notes_is_counted_and_failures_are_named(tmp_path):
    from benchmarks.robustness.promise_counts import counts

    (tmp_path / "report.xml").write_text(REPORT)
    found, wrong = counts(tmp_path / "report.xml", SECTIONS)
    assert found["Full and failing disks", "injected"] == 12 + 1
    assert found["Full and failing disks", "tests"] == 2
    assert found["Crash and power loss", "skipped"] == 1
    assert wrong == ["dit/training/test_kill.py::test_b"]


def test_totals_are_of_the_last_runs():
    from benchmarks.robustness import promises_page

    rows = [
        row("promises", "Damaged files", "injected", 1000, "old"),
        row("promises", "Damaged files", "injected", 30),
        row("promises", "Damaged files", "tests", 8),
        row("promises", "Hostile input", "injected", 5),
        row("promises", "Hostile input", "tests", 5),
        row("soak", "s", "rounds", 9), row("soak", "s", "kills", 7),
        row("soak", "s", "rounds failed", 2), row("soak", "s", "rounds with other bits", 3),
    ]  # fmt: skip
    line = {
        "parser": "a_b", "seconds": 300.0, "executions": 2000, "values": 7, "outcomes": 3,
        "slowest": 0.5, "covered": 4, "lines": 9, "commit": "d",
    }  # fmt: skip
    log = promises_page.parsers("\n".join(json.dumps(line | {"executions": n}) for n in (1, 2000)))
    marks = "<!-- promises: totals -->\n<!-- end -->\n<!-- promises: fuzzing -->\nold\n<!-- end -->"
    done = promises_page.rewritten(marks, rows, log)
    assert "| **all** | 37 | 2,005 | 2 | 3 | 0 |" in done
    assert "| a b | 300 | 2,000 | 7 | 3 | 0.50 | 4 of 9 | d |" in done
    assert "old" not in done
    assert promises_page.rewritten(done, rows, log) == done
