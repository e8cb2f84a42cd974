"""The report of a study: intervals, comparisons at equal size and time, tables, figures."""

import json
import math

import pytest
from benchmarks.study import ablation_report
from benchmarks.study.ablation_labs import LABS
from benchmarks.study.ablation_report import Results, interval, of_all_commands
from benchmarks.study.ablation_study import shape_of

from support.benchmark_rows import committed_study, row


def test_the_interval_is_that_of_student():
    """1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.303."""
    middle, half = interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert interval([1.5]) == (1.5, None)


def rows_of(study, losses, ratios):
    rows = []
    for name, of_seeds in losses.items():
        network = study.networks[name]
        size = {"none, wide": 1100, "branch": 1102}.get(name, 1000)
        for seed, loss in enumerate(of_seeds):
            shape = shape_of(study.config(LABS["lm"], network, seed, "", {}), network)
            rows.append(row("ablate_lm", name, "held-out loss", loss, shape=shape))
            rows.append(row("ablate_lm", name, "parameters", size, shape=shape))
        old = "old settings, seed 0, config 1"
        rows.append(row("ablate_lm", name, "held-out loss", 99, shape=old))
    return rows + [row("ablate_lm", name, "step ratio", ratio) for name, ratio in ratios.items()]


LOSSES = {
    "none": [2.0, 2.2],
    "none, wide": [1.9, 2.0],
    "none, 1.3 x steps": [1.8, 2.0],
    "none, 1.7 x steps": [1.7, 1.9],
    "branch": [1.9, 2.2],
    "stream": [1.95, 2.1],
}


def test_comparisons_are_paired_and_fair():
    study = committed_study("lm")
    ratios = {"branch": math.sqrt(1.3), "stream": 1.8}
    found = Results(study, rows_of(study, LOSSES, ratios), {})
    close = pytest.approx
    assert found.differences("branch", "held-out loss", "none") == close([-0.1, 0.0])
    assert found.plain_of_equal_size("branch") == "none, wide"
    assert found.plain_of_equal_size("stream") == "none"
    # Half way between 1 and 1.3 in the logarithm of the steps: 1.9 and 2.1.
    assert found.differences_at_equal_time("branch") == close([0.0, 0.1])
    assert found.differences_at_equal_time("stream") == []  # beyond the longest plain run


def test_the_error_of_the_step_ratio_is_carried_to_equal_time():
    """Two variants of the same work measure 1.10 and 1.21: the ratio is known to that error."""
    study = committed_study("lm")
    ratios = {"branch": 1.1, "branch, zero spring": 1.21, "stream": 1.05}
    found = Results(study, rows_of(study, LOSSES, ratios), {})
    error = 12.7062 * math.log(1.1) / math.sqrt(2)  # t(0.975, 1) times the deviation
    assert found.ratio_error() == pytest.approx(error, rel=1e-4)
    # The plain losses fall by 0.2 per log 1.3 and 0.1 per log(1.7 / 1.3), and not beyond 1 and 1.7.
    middle = 0.2 * math.log(1.1) / math.log(1.3)
    assert found.error_at_equal_time("branch") == pytest.approx(max(middle, 0.3 - middle), rel=1e-6)
    mean, half = interval(found.differences_at_equal_time("branch"))
    wide = math.hypot(half, 0.1)
    shown = ablation_report.shown(found.differences_at_equal_time("branch"), 0.1)
    assert shown == f"{mean:+.4f} [{mean - wide:+.4f}, {mean + wide:+.4f}]"
    assert Results(study, rows_of(study, LOSSES, {"branch": 1.1}), {}).ratio_error() == 0.0


def test_the_report_prints_its_tables_and_writes_figures(tmp_path, capsys):
    study = committed_study("lm")
    rows = rows_of(study, LOSSES, {"branch": 1.1, "stream": 1.2})
    cell = tmp_path / "runs/branch/seed-0/cell.json"
    cell.parent.mkdir(parents=True)
    look = {"layer": "l0", "alpha_mean": 0.9, "beta_mean": 0.1, "gate_mean": 0.5, "velocity_rms": 1}
    cell.write_text(
        json.dumps({"case": "branch", "profile": {"activation_rms": [1.0], "dynamics": [look]}})
    )

    class Options:
        into, runs = tmp_path / "dynamics", tmp_path / "runs"

    ablation_report.report(study, rows, Options, {})
    written = capsys.readouterr().out
    line = next(x for x in written.splitlines() if x.startswith("| branch |"))
    assert "| 2 | 1.102 | 1.100 | 2.0500 ± 0.2121 | -0.0500 [-0.6853, +0.5853] |" in line
    assert {p.name for p in (tmp_path / "dynamics").iterdir()} == {
        "lm.png", "lm-depth.csv", "lm-depth.png",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no rows of none for this study as it is now"):
        ablation_report.report(study, rows, Options, {"steps": 7})


def test_every_command_and_corpus_has_a_table(monkeypatch):
    """Without the folder of the data: a cell names its corpus only."""
    monkeypatch.delenv("COMPLEXITY_DATA")
    study = committed_study("lm")
    assert of_all_commands(study, []) == "No rows yet."

    def rows(losses, command, overrides):
        for name, loss in losses.items():
            network = study.networks[name]
            shape = shape_of(study.config(LABS["lm"], network, 0, "", overrides), network)
            for metric, value in (("held-out loss", loss), ("parameters", 1000)):
                yield row("ablate_lm", name, metric, value, shape=shape, command=command)

    text = {"data.source": "text:/x/tinyshakespeare.txt"}
    other = {"data.source": "stdlib", "steps": 7}
    both = [
        *rows({"none": 2.0, "branch": 1.5}, "run", text),
        *rows({"none": 3.0, "branch": 3.25}, "run --override steps=7 --jobs 2", other),
    ]
    written = of_all_commands(study, both)
    assert written.count("| network | seeds |") == 2
    assert "| branch | 1 | 1.000 |  | 1.5000 | -0.5000 |" in written
    assert "| branch | 1 | 1.000 |  | 3.2500 | +0.2500 |" in written
    assert "not shown" not in written

    lost = [r | {"shape": r["shape"].replace("config", "config 0")} for r in both[4:]]
    written = of_all_commands(study, both[:4] + lost)
    assert written.count("| network | seeds |") == 1
    assert "2 runs of `run --override steps=7 --jobs 2` on stdlib had settings that" in written
