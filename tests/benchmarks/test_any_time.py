"""The study of any-time models: its arms differ in the loop alone, and runs go on from rows."""

import argparse
import itertools
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.common.memory import parameters
from benchmarks.common.results import read_rows
from benchmarks.study import any_time, any_time_report
from benchmarks.study.any_time_report import ARMS, LOOPS, SAMPLED
from benchmarks.study.variants_dit import varied_dit
from benchmarks.study.variants_lm import VariedConfig, VariedForCausalLM

from complexity_dit.models.transformer import SIZES
from support.networks import randomised

SWAPPED = [arm for arm in ARMS if arm not in ("plain", "unshared", "velocity", *SAMPLED)]


def config_of(name, arm, *overrides):
    options = argparse.Namespace(
        out=Path("unused"), steps=100, source="stdlib", override=list(overrides)
    )
    return any_time.config_of(any_time.MODELS[name], arm, 0, options)


def language_network(arm, like=None):
    """The network of an arm, with the widths of another one."""
    config, swap = config_of("lm", arm)
    model = config.model
    if like is not None:
        model.overrides |= {"intermediate_size": like.config.intermediate_size}
    torch.manual_seed(0)
    return VariedForCausalLM(
        VariedConfig(
            vocab_size=128, dynamics_placement=model.dynamics_placement, swap=swap,
            num_loops=model.num_loops, **model.overrides,
        )
    ).eval()  # fmt: skip


def image_network(arm, like=None):
    config, swap = config_of("dit", arm)
    model, (width, _, heads) = config.model, SIZES["nano"]
    torch.manual_seed(0)
    return varied_dit(swap)(
        sample_size=32, patch_size=4, hidden_size=width, num_attention_heads=heads,
        dynamics_placement=model.dynamics_placement, num_loops=model.num_loops, **model.overrides,
    ).eval()  # fmt: skip


def outputs(model, **how):
    """Logits, or an image of a network whose blocks are no identities."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(model, VariedForCausalLM):
        return model(torch.randint(128, (2, 9), generator=draw), use_cache=False, **how).logits
    model = randomised(model).double()
    images = torch.randn(2, 3, 32, 32, generator=draw, dtype=torch.float64)
    return model(images, torch.tensor([100.0, 800.0]), **how).sample


BUILD = {"lm": language_network, "dit": image_network}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("arm", ARMS)
def test_arms_have_equal_parameters(name, arm):
    model, ours = BUILD[name](arm), BUILD[name]("velocity")
    found = parameters(model)
    if arm == "unshared":
        layers = model.model.layers if name == "lm" else model.blocks
        assert len(layers) == LOOPS + 2
        found -= (LOOPS - 1) * parameters(layers[0])
    assert found == pytest.approx(parameters(ours), rel=0.002 if name == "lm" else 0.02)


@torch.no_grad()
@pytest.mark.parametrize("name", BUILD)
def test_arms_of_one_seed_differ_in_the_loop_alone(name):
    """Those whose loop starts as the plain one compute the same, the others all something else."""
    plain = BUILD[name]("plain")
    found = {arm: outputs(BUILD[name](arm, plain)) for arm in (*SWAPPED, "velocity")}
    wanted = outputs(plain)
    for arm in ("step sizes", "no carry"):
        torch.testing.assert_close(found.pop(arm), wanted, rtol=1e-4, atol=1e-4)
    # Inertia of 0.5 is where both begin, one number or one per channel.
    for arm in ("momentum", "spring"):
        torch.testing.assert_close(found.pop(arm), found["velocity"], rtol=1e-4, atol=1e-4)
    for one, other in itertools.combinations([*found.values(), wanted], 2):
        assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("arm", [*SWAPPED, "velocity"])
def test_more_repetitions_than_trained(name, arm):
    model = BUILD[name](arm)
    assert outputs(model, num_loops=2 * LOOPS).isfinite().all()


def test_a_swap_needs_a_loop():
    with pytest.raises(ValueError, match="no loop with dynamics to replace"):
        VariedForCausalLM(VariedConfig(**any_time.LanguageModel.shape, swap="loop, momentum"))
    with pytest.raises(ValueError, match="no loop with dynamics to replace"):
        varied_dit("loop, momentum").from_size("nano")


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["any_time", *map(str, arguments)])
    any_time.main()


LM = ("--override", "batch_size=2", "data.context=16", "data.piece_bytes=512",
      "tokenizer.vocab_size=300", "mixed_precision=no",
      "model.overrides.hidden_size=48")  # fmt: skip
DIT = ("--weights", "random", "--num_images=6", "--evaluations=2", "--override", "batch_size=4",
       "mixed_precision=no", "data.num_images=64", "data.resolution=8",
       "model.overrides.hidden_size=32")  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*n = 6:UserWarning")
@pytest.mark.parametrize("name", ["lm", "dit"])
def test_runs_are_measured_once(name, tmp_path, monkeypatch, capsys):
    """A run of each kind of arm; the second call finds all rows and trains nothing."""
    rows, figure = tmp_path / "rows.csv", tmp_path / "curve.png"
    if name == "lm":
        text = tmp_path / "text.txt"
        text.write_text("".join(f"line {i} of {i % 7} and {i * i}\n" for i in range(2000)))
        more = ("--source", f"text:{text}", "--documents=2", *LM)
    else:
        more = DIT
    arms = ("unshared", "momentum", "velocity, sampled")
    command = (
        name, "--out", tmp_path / "runs", "--steps=10", "--seeds=1", "--rows", rows,
        "--figure", figure, "--arms", *arms, *more,
    )  # fmt: skip
    called(monkeypatch, *command)
    known = {row["case"].split(" / ")[1] for row in read_rows(rows)}
    assert known == set(arms)
    counts = {row["metric"] for row in read_rows(rows) if "/ unshared /" in row["case"]}
    measure = "bits per byte" if name == "lm" else "fd_random"
    assert [x for x in counts if x.startswith(measure)] == [f"{measure}, {LOOPS} loops"]
    assert figure.stat().st_size > 1000
    before = rows.read_bytes()
    monkeypatch.setattr(any_time, "run", None)  # or a call would raise
    called(monkeypatch, *command)
    assert rows.read_bytes() == before
    table = any_time_report.any_time(read_rows(rows))
    shown = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert "| momentum" in shown
    assert table.rsplit("\n\n", 1)[0] in capsys.readouterr().out
