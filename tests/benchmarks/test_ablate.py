"""Ablations: studies, cells that resume, metrics of a training curve."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from benchmarks.common import results
from benchmarks.study import ablate, ablation_labs
from benchmarks.study.ablation_curves import curve_metrics, spikes
from benchmarks.study.ablation_labs import LABS, path_metrics, states_by_depth
from benchmarks.study.ablation_report import NEAR
from benchmarks.study.ablation_study import read_study
from benchmarks.study.variants_dit import varied_dit
from benchmarks.study.variants_lm import VariedConfig, VariedForCausalLM

from complexity_dit.config import OptimConfig
from complexity_dit.training.optimizer import SpikeGuard
from complexity_lm.trainer import LMTrainer
from inl_core.run.errors import UserError
from support.benchmark_rows import ROOT, call, committed_study

STUDY = ROOT / "configs/ablations/lm.yaml"


# Studies ------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["lm", "dit"])
def test_every_variant_has_a_plain_network_of_its_size(package):
    """The column "equal parameters" is never empty for want of a baseline."""
    sizes = {True: {}, False: {}}
    study = committed_study(package)
    for name, network in study.networks.items():
        config = study.config(LABS[package], network, 0, "unused", {})
        with torch.device("meta"):
            if package == "lm":
                settings = config.model.overrides | {
                    "vocab_size": config.tokenizer.vocab_size,
                    "dynamics_placement": config.model.dynamics_placement,
                    "dynamics_adaptive": config.model.dynamics_adaptive,
                }
                model = VariedForCausalLM(VariedConfig(**settings, swap=network.swap))
            else:
                model = varied_dit(network.swap).from_size(
                    config.model.size,
                    **config.model.overrides,
                    sample_size=32,
                    patch_size=4,
                    label_fields=["style"],
                    num_classes=[8],
                    dynamics_placement=config.model.dynamics_placement,
                    dynamics_adaptive=config.model.dynamics_adaptive,
                )
        sizes[network.plain][name] = sum(p.numel() for p in model.parameters())
    for name, size in sizes[False].items():
        gap = min(abs(plain / size - 1) for plain in sizes[True].values())
        assert gap <= NEAR[package], (name, size, sizes[True])


def test_a_cell_has_the_fields_of_its_network_and_the_steps_of_its_line():
    study = committed_study("lm")
    longer = next(n for n in study.networks.values() if n.longer == 1.3)
    overrides = {"steps": 10, "data.source": "stdlib"}
    config = study.config(LABS["lm"], longer, 3, "there", overrides)
    assert (config.steps, config.seed, config.resume, config.out) == (13, 3, "auto", "there")
    assert config.model.dynamics_placement == "none"
    bound = study.config(LABS["lm"], study.networks["branch, no mu"], 0, "there", overrides)
    assert bound.model.overrides["dynamics_mu_max"] == 0.0
    assert bound.model.overrides["hidden_size"] == 128


def test_invalid_studies_and_fields_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "study.yaml"
    path.write_text("package: lm\nrun: {}\n")
    with pytest.raises(ValueError, match=r"has the sections \['package', 'run'\], expected"):
        read_study(path)
    whole = {"package": "lm", "run": {}, "plain": {"x": {}}, "longer": [], "variants": {}}
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(ValueError, match="the first plain network must be called none"):
        read_study(path)
    study = committed_study("lm")
    with pytest.raises(ValueError, match="OptimConfig has no field 'rate'"):
        study.config(LABS["lm"], study.networks["none"], 0, "", {"optim.rate": 1.0})
    monkeypatch.delenv("COMPLEXITY_DATA")
    with pytest.raises(ValueError, match="set the environment variable"):
        study.config(LABS["lm"], study.networks["none"], 0, "", {})


# Metrics of a curve -----------------------------------------------------------------------------


def test_variance_counts_noise_and_not_the_trend():
    steps = np.arange(400.0)
    falling = 5 - 0.01 * steps + 1e-5 * steps**2
    noise = np.random.default_rng(0).normal(0, 0.1, 400)
    smooth = curve_metrics(falling, np.ones(400), 50, "nats")
    rough = curve_metrics(falling + noise, np.ones(400), 50, "nats")
    assert smooth["detrended loss variance"][0] == pytest.approx(0, abs=1e-20)
    assert rough["detrended loss variance"][0] == pytest.approx(0.01, rel=0.2)
    assert smooth["final training loss"][0] == pytest.approx(falling[-8:].mean())
    assert smooth["mean training loss"][0] == pytest.approx(np.trapezoid(falling) / 399)


def test_turning_and_jumps_are_means_over_tokens():
    """One token goes (1, 0), (1, 1), (1, 2), (3, 2): a right angle; the other stays."""

    class Moves(torch.nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = torch.tensor([by, [0.0, 0.0]])

        def forward(self, h):
            return h + self.by, None

    layers = [Moves(by) for by in ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 0.0])]

    def forward():
        h = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
        for layer in layers:
            h, _ = layer(h)

    states = states_by_depth(layers, forward)
    assert [x.tolist() for x in states] == [
        [[1, 0], [3, 4]], [[1, 1], [3, 4]], [[1, 2], [3, 4]], [[3, 2], [3, 4]],
    ]  # fmt: skip
    found = path_metrics(states)
    assert found["turning over depth"][0] == pytest.approx(math.pi / 2 / 2)
    assert found["largest jump of a layer"][0] == pytest.approx(0.5)


def test_spikes_are_counted_as_the_guard_of_the_image_trainer_does():
    draw = np.random.default_rng(0)
    norms = draw.lognormal(0, 0.2, 500)
    norms[[120, 200, 201, 380]] *= 4
    guard = SpikeGuard(OptimConfig(spike_factor=2.0, spike_window=100))
    assert spikes(norms) == sum(not guard.admits(float(norm)) for norm in norms) == 4
    assert spikes(norms[:100]) == 0


# Cells ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """Overrides that make a cell of the language model a matter of seconds."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"{'word ' * (i % 7 + 3)}and again {i}.\n" * 20)
    return [
        "steps=6", "batch_size=2", "checkpoint_every=2", "data.context=16", "optim.warmup_steps=1",
        "tokenizer.vocab_size=270", f"data.source=text:{texts}", "model.overrides.hidden_size=16",
        "model.overrides.intermediate_size=16", "model.overrides.num_hidden_layers=2",
        "model.overrides.dynamics_controller_hidden=4",
    ]  # fmt: skip


def test_cells_run_once_resume_and_write_rows(tmp_path, tiny, monkeypatch):
    lab, rows = ablation_labs.LABS["lm"], tmp_path / "rows.csv"
    only = ("--only", "none", "branch, zero spring", "--override", *tiny)

    def run(out):
        call(monkeypatch, ablate, "run", STUDY, "--out", tmp_path / out, "--rows", rows, *only)

    save, killed = LMTrainer._save_checkpoint, []

    def killed_behind_step_4(self, *arguments):
        save(self, *arguments)
        if self.state.global_step == 4 and not killed:
            killed.append(True)
            raise KeyboardInterrupt

    run("straight")
    straight = results.read_rows(rows)
    monkeypatch.setattr(LMTrainer, "_save_checkpoint", killed_behind_step_4)
    rows.unlink()
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    assert not rows.exists()
    run("killed")
    again = results.read_rows(rows)
    assert len(again) == len(straight) > 20
    assert {r["case"] for r in again} == {"none", "branch, zero spring"}
    assert all(str(tmp_path) not in r["command"] for r in again)
    for a, b in zip(straight, again, strict=True):
        assert (a["case"], a["metric"], a["value"]) == (b["case"], b["metric"], b["value"])

    monkeypatch.setattr(type(lab), "train", None)  # nothing is trained any more
    run("killed")
    assert results.read_rows(rows) == again
    rows.unlink()
    run("killed")  # rows that were lost come from the cells
    assert [r["value"] for r in results.read_rows(rows)] == [r["value"] for r in again]
    only += ("optim.lr=1.0",)
    with pytest.raises(ValueError, match="holds another run"):
        run("killed")


@pytest.mark.slow  # each process imports everything
def test_processes_make_the_same_cells(tmp_path, tiny, monkeypatch):
    common = ("--only", "none", "branch, both", "--override", *tiny)
    found = []
    for jobs in (1, 2):
        rows = tmp_path / f"{jobs}.csv"
        call(
            monkeypatch, ablate, "run", STUDY, "--out", tmp_path / str(jobs), "--rows", rows,
            "--jobs", jobs, *common,
        )  # fmt: skip
        read = results.read_rows(rows)
        found.append({(r["case"], r["shape"], r["metric"]): r["value"] for r in read})
    assert found[0] == found[1]
    assert len(found[0]) > 20


def test_a_run_that_diverges_is_a_result(tmp_path, tiny, monkeypatch):
    lab, rows = ablation_labs.LABS["lm"], tmp_path / "rows.csv"
    messages = iter(["step 7: loss nan, gradient norm nan; training stopped", "no such file"])

    def broken(self, config, swap):
        raise UserError(next(messages))

    monkeypatch.setattr(type(lab), "train", broken)
    common = ("--rows", rows, "--only", "branch", "--override", *tiny)
    call(monkeypatch, ablate, "run", STUDY, "--out", tmp_path / "a", *common)
    found = results.read_rows(rows)
    assert [(r["metric"], r["value"]) for r in found] == [("diverged", "7")]
    with pytest.raises(UserError, match="no such file"):
        call(monkeypatch, ablate, "run", STUDY, "--out", tmp_path / "b", *common)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)
def test_a_cell_of_the_image_model_is_measured_as_the_network_it_is(tmp_path, monkeypatch):
    """The held-out loss is that of the varied network: its saved folder alone would not know."""
    rows = tmp_path / "rows.csv"
    study = ROOT / "configs/ablations/dit.yaml"
    small = [
        "steps=4", "batch_size=4", "data.source=art", "data.num_images=64", "data.resolution=16",
        "data.label_fields=null", "model.overrides.hidden_size=32", "model.overrides.num_layers=2",
        "model.overrides.num_attention_heads=2", "optim.warmup_steps=1",
    ]  # fmt: skip
    monkeypatch.setattr(ablation_labs, "HELDOUT_DRAWS", 8)
    name = "stream, anchored at the start"
    call(
        monkeypatch, ablate, "run", study, "--out", tmp_path / "out", "--rows", rows,
        "--only", name, "--fid", 8, "--weights", "random", "--evaluations", 2, "--override", *small,
    )  # fmt: skip
    found = {r["metric"]: float(r["value"]) for r in results.read_rows(rows)}
    assert found["held-out loss"] > 0
    assert any(metric.startswith("fd_random (n 8") for metric in found)
    cell = json.loads(next(tmp_path.glob("out/*/seed-0/cell.json")).read_text())
    assert len(cell["profile"]["activation_rms"]) == len(cell["profile"]["dynamics"]) == 2

    overrides = {k: yaml.safe_load(v) for k, v in (item.split("=") for item in small)}
    whole = read_study(study)
    lab, network = ablation_labs.LABS["dit"], whole.networks[name]
    run = next(tmp_path.glob("out/*/seed-0/run"))
    config = whole.config(lab, network, 0, run, overrides)
    loss = ablation_labs.heldout_loss
    batches = ablation_labs.heldout_batches(config)
    varied, plain = (loss(lab.network(config, s), batches, config) for s in (network.swap, None))
    assert varied == pytest.approx(found["held-out loss"], rel=1e-5)
    assert varied != plain


def test_step_times_are_measured_in_turn(tmp_path, tiny, monkeypatch):
    rows = tmp_path / "rows.csv"
    time = ("time", STUDY, "--rounds", 1, "--rows", rows)
    call(monkeypatch, ablate, *time, "--only", "none", "branch", "--override", *tiny)
    found = {(r["case"], r["metric"]): float(r["value"]) for r in results.read_rows(rows)}
    assert found["none", "step ratio"] == 1.0
    assert found["branch", "step"] > 0
    with pytest.raises(ValueError, match="the first of --only must be none"):
        call(monkeypatch, ablate, *time, "--only", "branch", "--override", *tiny)
