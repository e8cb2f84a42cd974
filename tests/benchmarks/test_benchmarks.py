"""Scripts run and write rows with their origin; tables are written from the rows."""

import os
import subprocess
import sys

import pytest
import torch
from benchmarks.common import blocks, memory, results, timing
from benchmarks.common.results import current_command
from benchmarks.pages import ops_table, tables
from benchmarks.speed import (
    bench_ops,
    bench_placements,
    bench_tax,
    bench_train,
    device_checks,
    op_cases,
)

from complexity_dit.cli.demo import demo_config
from complexity_dit.config import ModelConfig, OptimConfig
from complexity_dit.training.optimizer import build_optimizer
from complexity_lm import DeepConfig
from inl_core import make_routing_plan, ops, reference
from support.benchmark_rows import ROOT
from support.benchmark_rows import row as result_row


def run(script, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", *arguments],
        env=clean | environment, cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def measure(out, script, *arguments):
    """Run a script that succeeds, and return the rows it writes to `out`."""
    done = run(script, *map(str, arguments), str(out))
    assert done.returncode == 0, done.stderr
    return results.read_rows(out)


def values(rows):
    return {(r["case"], r["metric"]): float(r["value"]) for r in rows}


def test_bench_ops_writes_one_row_per_number(tmp_path):
    done = run(
        "speed.bench_ops", "--device", "cpu", "--quick", "--seconds", "0.001",
        "--dtype", "float32", "--backends", "eager", "F.rms_norm", "dense", "grouped_mm",
        "--out", str(tmp_path / "rows.csv"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "device time: not measured, cpu has no CUDA graphs"
    found = results.read_rows(tmp_path / "rows.csv")
    assert all(float(row["value"]) > 0 for row in found)
    for name in ("command", "hardware", "torch", "commit", "date", "case", "metric"):
        assert all(row[name] for row in found), name
    for passed in ("forward", "backward"):
        norm = [r for r in found if r["case"] == f"rms_norm {passed}"]
        assert {r["backend"] for r in norm} == {"eager", "F.rms_norm"}
        assert {r["metric"] for r in norm} == {"time", "GB/s", "of copy"}
        routed = [r for r in found if r["case"] == f"routed_mlp {passed}"]
        assert {r["metric"] for r in routed} == {"time", "TFLOP/s", "of matmul"}
    copy = next(float(r["value"]) for r in found if r["case"] == "copy")
    gbs, share = (
        next(float(r["value"]) for r in found if r["case"] == "swiglu forward" and r["metric"] == m)
        for m in ("GB/s", "of copy")
    )
    assert share == pytest.approx(gbs / copy, rel=1e-4)


@pytest.mark.parametrize("backend", ["eager", "mask loop"])
@pytest.mark.parametrize("captures", [True, False])
def test_device_time_beside_the_time_of_calls(captures, backend, monkeypatch, capsys):
    """Two metrics of a case; where CUDA captures nothing, the time of calls and a word about it."""

    def called(call, *_):
        call()
        return 2.0

    def replayed(make, _):
        make()()
        if not captures:
            raise RuntimeError("no stream")
        return 0.5

    monkeypatch.setattr(bench_ops, "median_ms", called)
    monkeypatch.setattr(bench_ops, "graph_ms", replayed)
    cases = op_cases.bandwidth_cases(1, 2, 64, torch.float32, "cpu")
    case = next(case for case in cases if case.op == "rms_norm")
    rows = bench_ops.rows_of(
        case, backend, reference.rms_norm, {"copy": 1.0}, torch.float32, "cuda", 0.01
    )
    rows = {row["metric"]: row["value"] for row in rows if row["case"] == "rms_norm backward"}
    measured = captures and backend != "mask loop"
    assert rows["time"] == 2.0
    assert rows.get("device time") == (0.5 if measured else None)
    assert rows["GB/s"] == 3 * 2 * 64 * 4 / (0.5 if measured else 2.0) / 1e6
    said = "no CUDA graph of rms_norm backward 2x64 eager: no stream" in capsys.readouterr().out
    assert said == (not captures and backend == "eager")


def test_every_operation_with_a_kernel_has_a_case():
    found = {case.op for case in op_cases.bandwidth_cases(1, 2, 64, torch.float32, "cpu")}
    assert found | {"routed_mlp"} == set(ops.AUTO)


def test_auto_follows_the_committed_rows():
    """On a GPU `auto` is what was faster in the last run there."""
    measured = ops_table.choices(results.read_rows(ROOT / "benchmarks/results.csv"))
    assert {name: measured[name] for name in ops.AUTO} == ops.AUTO


def test_the_table_of_operations_puts_implementations_side_by_side():
    def row(case, backend, value, metric="time", **columns):
        about = {"shape": "8x4", "dtype": "float32", "unit": "ms", "backend": backend}
        return result_row("ops", case, metric, value, **(about | columns))

    rows = [
        row("copy", "torch", "100", "GB/s", unit="GB/s"),
        row("swiglu forward", "eager", "4"), row("swiglu forward", "compile", "1.5"),
        row("swiglu forward", "triton", "1"), row("swiglu forward", "triton", "0.5", "of copy"),
        row("swiglu backward", "compile", "1.5"), row("swiglu backward", "triton", "1"),
        row("rms_norm forward", "eager", "6"),
        row("rms_norm forward", "compile", "1"), row("rms_norm forward", "triton", "2"),
        row("rms_norm forward", "F.rms_norm", "3"), row("rms_norm forward", "liger", "2.5"),
        row("routed_mlp forward", "dense", "1"), row("routed_mlp forward", "mask loop", "9"),
        row("routed_mlp forward", "grouped_mm", "3"), row("routed_mlp forward", "triton", "2"),
    ]  # fmt: skip
    text = "\n".join(ops_table.table(rows))
    assert text.startswith("Here: copy 100 GB/s. Milliseconds in float32:")
    assert "| swiglu forward | 8x4 | 4 | 1.5 | 1 |  | 0.50 of copy |" in text
    assert "| rms_norm forward | 8x4 | 6 | 1 | 2 | 2.5 liger |  |" in text
    assert "| routed_mlp forward | 8x4 | 9 |  | 2 | 3 grouped_mm |  |" in text
    assert "| dense_mlp forward | 8x4 | 1 |  |  |  |  |" in text
    assert "| swiglu | 2.00 | 1.50 |  |" in text
    chosen = {
        "swiglu": ("triton", "triton"),
        "rms_norm": ("triton", "reference"),
        "routed_mlp": ("triton", "triton"),
    }
    assert ops_table.choices(rows) == chosen
    replayed = [row | {"metric": "device time", "value": "0.5"} for row in rows[1:4]]
    replayed[2]["value"] = "0.7"
    text = "\n".join(ops_table.table(rows + replayed))
    assert "in float32, called from Python / replayed from a CUDA graph:" in text
    assert "| swiglu forward | 8x4 | 4 / 0.5 | 1.5 / 0.5 | 1 / 0.7 |" in text
    assert ops_table.choices(rows + replayed)["swiglu"] == ("triton", "reference")
    later = [row | {"commit": "2"} for row in rows if row["backend"] == "F.rms_norm"]
    assert ops_table.choices(rows + later) == chosen, "a run without kernels"


def test_bench_tax_compares_with_none_and_with_dense(tmp_path):
    rows = measure(
        tmp_path / "rows.csv", "speed.bench_tax", "--eager", "--depth", 2, "--batch_size", 1,
        "--side", 2, "--rounds", 1, "--kinds", "lite", "token", "--routing", 64, 32, 64, 4,
        "--device", "cpu", "--out",
    )  # fmt: skip
    found = values(rows)
    for kind in ("lite", "token"):
        assert found[f"stack eager {kind}", "ratio"] > 0
        assert found[f"stack eager {kind}", "parameters"] > 1
    assert found["mlp dense", "ratio"] == 1
    assert found["mlp routed", "ratio"] > 0
    assert found["mlp mask loop", "ratio"] > 0


def test_bench_placements_compares_each_demo_with_none(tmp_path):
    for name, config in (("dit", demo_config("").model), ("lm", DeepConfig())):
        none, default = (bench_placements.settings(c) for c in bench_placements.CASES[name][:2])
        assert none == {"dynamics_placement": "none"}
        assert default == {field: getattr(config, field) for field in default}
    assert ModelConfig().resolved().dynamics_placement == "none"
    rows = measure(
        tmp_path / "rows.csv", "speed.bench_placements", "--eager", "--rounds", 1, "--images", 1,
        "--texts", 1, "--context", 8, "--device", "cpu", "--rows",
    )  # fmt: skip
    found = values(rows)
    for case in ("dit branch channel, eager", "lm force_mlp channel, eager"):
        assert found[case, "ratio"] > 0
        assert 1 < found[case, "parameter ratio"] < 1.01
    assert found["dit none, eager", "memory ratio"] == 1


def test_a_loop_has_the_flops_of_the_stack_that_it_unrolls_to(tmp_path):
    rows = measure(
        tmp_path / "rows.csv", "speed.bench_loops", "--eager", "--rounds", 1, "--images", 1,
        "--texts", 1, "--context", 32, "--new_tokens", 3, "--cores", 1, "--device", "cpu", "--rows",
    )  # fmt: skip
    found = values(rows)
    for name in ("lm", "dit"):
        stack, plain, velocity = (
            f"{name}, core of 1, {case}, eager"
            for case in ("unshared", "plain loop", "velocity loop")
        )
        assert found[plain, "forward"] == found[stack, "forward"]
        assert found[velocity, "forward"] == found[stack, "forward"]
        assert found[velocity, "parameters"] - found[plain, "parameters"] == 2 * 192
        assert found[stack, "parameters"] > 2 * found[plain, "parameters"] - 2048 * 192
        assert found[velocity, "ratio"] > 0
    assert found["lm, core of 1, plain loop, eager", "decode ratio"] > 0


def test_the_peak_of_a_call_includes_memory_that_it_frees():
    def held():
        torch.ones(16 * memory.MIB)  # 64 MiB, written and freed

    memory.peak_of(lambda: None, "cpu")
    assert 60 < memory.peak_of(held, "cpu") < 90
    assert memory.peak_of(lambda: None, "cpu") < 10


def test_the_routed_mlp_and_the_mask_loop_compute_the_same():
    plan = make_routing_plan(torch.tensor([1, 0, 3, 1]), 4)
    routed, loop = (kind(8, 12, 4, plan) for kind in (bench_tax.Routed, bench_tax.MaskLoop))
    loop.load_state_dict(routed.state_dict())
    x = torch.randn(4, 8)
    torch.testing.assert_close(routed(x), loop(x))


def test_dynamics_change_nothing_else_in_the_stack():
    """The backbones are equal, so the ratio is that of the dynamics alone."""
    plain = blocks.Stack(16, 2, 2, "none", 2, compiled=False).state_dict()
    for kind in blocks.KINDS[1:]:
        state = blocks.Stack(16, 2, 2, kind, 2, compiled=False).state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.items())
        assert len(state) > len(plain)


def test_medians_of_paired_rounds(monkeypatch):
    """A round in which everything is slow does not move the ratio."""
    durations = iter([1.0, 2.0, 10.0, 20.0, 1.0, 2.0])
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(durations)

    got = timing.paired({"a": work, "b": work}, rounds=3, device="cpu", warm_up=0)
    assert got == {"a": (1.0, 1.0), "b": (2.0, 2.0)}


def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = run("speed.gpu", "ops", OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "sees no GPU; nothing was measured" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tests", "ops", "models"])
def test_every_part_of_make_gpu_runs_on_a_cpu(part, tmp_path):
    done = run("speed.gpu", part, "--device", "cpu", "--quick", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert results.read_rows(tmp_path / f"{part}.csv")


@pytest.mark.parametrize("library", ["with diffusers", "without diffusers"])
def test_the_training_part_of_make_gpu_runs_on_a_cpu(library, tmp_path):
    """Both optimizers, with dynamics and without; without diffusers it names what it measures."""
    if library == "without diffusers":
        # What Python does with a missing package, in the process of the part only.
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\nfrom importlib import util\nfind = util.find_spec\n"
            "util.find_spec = lambda name, *a: None if name == 'diffusers' else find(name, *a)\n"
            "sys.modules['diffusers'] = sys.modules['accelerate'] = None\n"
        )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    quick = ("--device", "cpu", "--quick")
    done = run("speed.gpu", "train", *quick, OUT=str(tmp_path), PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read_rows(tmp_path / "train.csv")
    name = "model" if library == "with diffusers" else "stack"
    assert ("diffusers is not installed" in done.stdout) == (name == "stack")
    got = {(row["case"], row["metric"]): row for row in rows}
    assert len(got) == len(rows)
    for optimizer in ("adamw", "muon"):
        plain, dynamics = (f"{name} {optimizer} {k} no" for k in ("none", "channel"))
        assert float(got[plain, "ratio"]["value"]) == 1
        for case in (plain, dynamics):
            values = {metric: float(row["value"]) for (c, metric), row in got.items() if c == case}
            assert values["speed"] == pytest.approx(2 / values["step"], rel=1e-4)
            assert values["utilisation"] == pytest.approx(
                values["model FLOPs"] / values["peak"], rel=1e-4
            )
            assert values["peak memory"] > 0
            assert got[case, "utilisation"]["unit"] == "of a measured product"


def test_flops_and_optimizers_of_the_training_part():
    """FLOPs are those of the matrices: six for each weight and token; Muon is given matrices."""
    model = blocks.Stack(64, 2, 2, "channel", 2, compiled=False)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    hidden = {id(p) for p in optimizer.param_groups[-1]["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in hidden}
    assert named == {
        f"blocks.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out",
                     "mlp.gate", "mlp.up", "mlp.down")
    }  # fmt: skip
    options = bench_train.parse(["--device", "cpu", "--side", "4", "--depth", "1"])
    options.size, options.batch_size = "S/2", 3
    width, tokens = 384, 16
    blocks_flops = 6 * 3 * tokens * (4 * width**2 + 3 * width * 1024)
    assert 1 < bench_train.step_flops("none", options) / blocks_flops < 1.4


def test_a_step_with_muon_launches_at_most_half_as_much_again_as_with_adamw():
    """S/2; see `bench_train` for why this is the bound. torch's own Muon is beyond it."""
    options = bench_train.parse(["--device", "cpu", "--batch_size", "2"])
    options.size = "S/2"
    counts = {
        optimizer: {metric: number for metric, (number, _) in values.items()}
        for optimizer, values in bench_train.count(options).items()
    }
    adamw = counts["adamw"]
    whole = adamw["products and attention"]
    assert whole > 12 * 24  # of twelve blocks

    def ratios(name):
        own = counts[name]
        fused = (whole + own["optimizer"]) / (whole + adamw["optimizer"])
        return own["step"] / adamw["step"], fused

    assert max(ratios("muon")) <= 1.5
    assert max(ratios("muon by matrix")) > 5
    assert counts["muon"]["optimizer"] < counts["muon by matrix"]["optimizer"] / 20
    assert adamw["optimizer"] < counts["adamw foreach"]["optimizer"]


def test_a_wrong_kernel_is_detected(monkeypatch):
    """The device checks fail on the originals' norm gradient and on a result that is NaN."""

    class WeightOutside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return reference.rms_norm(x, weight)

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            r = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            dx = weight * r * (dy - x * r * r * (x * dy).mean(-1, keepdim=True))
            return dx, (dy * x * r).sum((0, 1))

    cases = op_cases.bandwidth_cases(2, 5, 64, torch.float32, "cpu")
    case = next(c for c in cases if c.op == "rms_norm")
    for wrong in (WeightOutside.apply, lambda x, w: reference.rms_norm(x, w) * torch.nan):
        monkeypatch.setattr(device_checks, "kernel", lambda case, wrong=wrong: wrong)
        with pytest.raises(AssertionError, match="above the bound"):
            device_checks.as_good_as_eager(case, stores=1)
    monkeypatch.setattr(device_checks, "kernel", lambda case: reference.rms_norm)
    assert device_checks.as_good_as_eager(case, stores=1) < 1


def test_rows_with_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a,b"):
        results.append_rows(path, "x", [{"case": "c", "metric": "m", "value": 1, "unit": ""}])
    assert path.read_text() == "a,b\n1,2\n"


def test_rows_end_in_a_line_feed_alone(tmp_path):
    path = tmp_path / "rows.csv"
    results.append_rows(path, "x", [{"case": "c", "metric": "m", "value": 1, "unit": ""}])
    for written in (path, ROOT / "benchmarks/results.csv"):
        assert b"\r" not in written.read_bytes()


def test_a_copy_without_history_takes_its_commit_from_the_variable(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(results.subprocess, "run", missing)
    monkeypatch.setenv("COMMIT", "abc1234")
    assert results.commit() == "abc1234"
    monkeypatch.delenv("COMMIT")
    assert results.commit() == "none"


def test_tables_come_from_the_last_run_alone():
    old, new, other = (
        result_row("tax", "lite", "ratio", value, hardware=machine, commit=commit, date="")
        for value, machine, commit in (("1.5", "A", "1"), ("1.25", "A", "2"), ("3", "B", "1"))
    )
    text = "<!-- table: tax -->\n\nold\n\n<!-- end -->\n<!-- table: ops -->\n<!-- end -->\n"
    done = tables.rewritten(text, [old, new, other])
    assert "| lite | 1.25 |" in done
    assert "| lite | 3 |" in done
    assert "1.5" not in done
    assert "No rows yet." in done
    assert tables.rewritten(done, [old, new, other]) == done


def test_words_of_a_mark_choose_runs():
    rows = [
        result_row("tax", case, "ratio", "1.5", command=f"bench_tax --cases {case}")
        for case in ("lite", "full")
    ]
    done = tables.rewritten("<!-- table: tax full -->\n<!-- end -->\n", rows)
    assert "| full | 1.5 |" in done
    assert "lite" not in done


def test_rows_recorded_before_scripts_had_folders_group_with_those_after():
    new = "python -m benchmarks.speed.bench_tax --out rows.csv"
    assert current_command("python benchmarks/bench_tax.py --out rows.csv") == new
    assert current_command(new) == new
    gone = "python benchmarks/no_longer_here.py --rows rows.csv"
    assert current_command(gone) == gone


def test_every_mark_of_the_pages_has_rows():
    marks = [
        mark[1]
        for page in tables.PAGES.rglob("*.md")
        for mark in tables.MARKED.findall(page.read_text())
    ]
    assert len(marks) == len({*marks})
    assert {*tables.WRITERS, "recipe ratios", "recipe missing", "tax", "ops"} <= {*marks}
    for page in tables.PAGES.rglob("*.md"):
        assert tables.EMPTY not in page.read_text()


def test_a_study_or_bench_with_its_own_tables_is_written_between_its_marks():
    marks = "<!-- table: {} -->\nold\n<!-- end -->\n"
    text = marks.format("physics") + "between\n" + marks.format("ablate_lm")
    rows = [
        result_row("physics", f"arm / {network} / seed 0", f"rollout error, {k} steps", value)
        for network, value in (("none", 2), ("branch", 3))
        for k in (1, 16, 64)
    ]
    done = tables.rewritten(text, rows)
    assert "| arm | branch | 1.500 | 1.500 | 1.500 | 1 |" in done
    assert "old" not in done
    assert done.endswith("<!-- table: ablate_lm -->\n\nNo rows yet.\n\n<!-- end -->\n")
    assert tables.rewritten(done, rows) == done


def test_the_tables_are_up_to_date():
    done = run("pages.tables", "--check")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_bench_eval_compares_three_programs(tmp_path):
    by_measure = {}
    rows = measure(tmp_path / "rows.csv", "speed.bench_eval", "--n", 40, "--width", 24, "--rows")
    for row in rows:
        name, program = row["case"].split()
        assert row["shape"] == "n 40 x 24"
        if row["metric"] == "value":
            by_measure.setdefault(name, {})[program] = float(row["value"])
        elif row["metric"] != "memory":
            assert float(row["value"]) > 0
    assert by_measure["prdc"].keys() == {"ours", "torch-fidelity"}
    for name in ("fid", "kid"):
        assert by_measure[name].keys() == {"ours", "torch-fidelity", "torchmetrics"}
    # Times compare equal work only. KID of complete sets draws nothing; the other programs sum it
    # in float32, which costs digits.
    for programs in by_measure.values():
        for value in programs.values():
            assert value == pytest.approx(programs["ours"], rel=1e-3)
