"""Averages whose length is chosen after training, against sums over all steps."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from complexity_dit.config import EMAConfig, LoraOptions, PlanConfig
from complexity_dit.evaluation.report import compare
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training.averages import AVERAGES_FILE, PowerEMA, coefficients, exponent_of
from complexity_dit.training.plan import plan
from complexity_dit.training.train import train
from inl_core.run.checkpoints import all_checkpoints
from inl_core.run.errors import UserError
from support.outcomes import last_checkpoint, tensor_files
from support.processes import torchrun

LENGTHS = (0.05, 0.1)


def profile(steps: int, length: float) -> np.ndarray:
    """The weight of each of the steps 1 to `steps`: the power function over its unit interval."""
    return np.diff((np.arange(steps + 1) / steps) ** (exponent_of(length) + 1))


def trajectory(steps: int) -> torch.Tensor:
    """Weights that wander, (steps, 50)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, 50, generator=generator, dtype=torch.float64).cumsum(0)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.28])
def test_a_length_is_the_standard_deviation_of_its_profile(length):
    shares, times = profile(20_000, length), np.arange(1, 20_001) / 20_000
    assert shares.sum() == pytest.approx(1)
    mean = shares @ times
    assert np.sqrt(shares @ (times - mean) ** 2) == pytest.approx(length, rel=1e-4)


def test_the_average_of_a_run_is_the_sum_over_its_steps():
    weights = trajectory(300)
    average = PowerEMA([torch.nn.Parameter(torch.full((50,), 7.0))], 0.1)  # where it starts is left
    for row in weights:
        average.step([torch.nn.Parameter(row)])
    expected = torch.tensor(profile(300, 0.1)) @ weights
    torch.testing.assert_close(average.shadow_params[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_snapshots_give_the_average_of_any_length(length):
    steps, weights = 1000, trajectory(1000)
    snapshots = [(t, kept) for t in range(50, steps + 1, 50) for kept in LENGTHS]
    found, error = coefficients(snapshots, steps, length)
    assert found.sum() == pytest.approx(1)
    combined = np.zeros(steps)
    for (step, kept), share in zip(snapshots, found, strict=True):
        combined[:step] += share * profile(step, kept)
    wanted = profile(steps, length)
    true_error = np.linalg.norm(combined - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(true_error, abs=1e-4)
    assert error < (1e-6 if length in LENGTHS else 0.03)
    averages = torch.tensor(np.stack([combined, wanted])) @ weights
    spread = (weights - averages[1]).square().mul(torch.tensor(wanted)[:, None]).sum(0).sqrt()
    assert (
        (averages[0] - averages[1]).abs() < (1e-6 if length in LENGTHS else 0.03) * spread
    ).all()


def with_snapshots(run, **settings):
    return dataclasses.replace(run, ema=EMAConfig(snapshot_every=2), **settings)


def snapshots_of(run):
    return tensor_files(run / "averages")


def test_kept_averages_resume_exactly_and_change_no_bit(small_run, resumed_as_straight, tmp_path):
    resumed_as_straight(with_snapshots(small_run))
    straight = snapshots_of(tmp_path / "straight")
    assert sorted(straight) == [f"step-{step:08d}/{AVERAGES_FILE}" for step in (2, 4, 6, 8)]
    # As if killed with the checkpoint of step 4: later snapshots are written again.
    stopped = tmp_path / "stopped"
    assert snapshots_of(stopped) == straight
    kept = load_file(last_checkpoint(stopped) / AVERAGES_FILE)
    assert {name.split("/")[0] for name in kept} == {"0.05", "0.1"}

    train(dataclasses.replace(small_run, out=str(tmp_path / "plain")))
    plain, averaged = (
        tensor_files(last_checkpoint(tmp_path / name)) for name in ("plain", "straight")
    )
    assert averaged.pop(AVERAGES_FILE)
    assert plain == averaged


def test_going_back_removes_the_snapshots_of_the_way_that_is_left(small_run, tmp_path):
    run = with_snapshots(small_run, keep_last=0)
    train(run)
    first, last = all_checkpoints(tmp_path / "run" / "checkpoints")
    before = snapshots_of(tmp_path / "run")
    last.rename(tmp_path / "aside")
    changed = dataclasses.replace(
        run, resume=str(first), optim=dataclasses.replace(run.optim, lr=1e-4)
    )
    train(changed)
    after = snapshots_of(tmp_path / "run")
    assert before.keys() == after.keys()
    kept = [name for name in sorted(before) if before[name] == after[name]]
    assert kept == sorted(before)[:2]


def test_the_command_writes_the_average_over_all_steps(small_run, tmp_path, command):
    run = with_snapshots(small_run, checkpoint_every=1, keep_last=0)
    train(run)
    steps = [
        load_file(f / "model.safetensors") for f in all_checkpoints(tmp_path / "run/checkpoints")
    ]
    assert len(steps) == 8
    for length, tolerance in ((0.1, 1e-4), (0.07, 0.05)):
        out = tmp_path / f"at-{length}"
        status, said, error = command("average", tmp_path / "run", "--length", length, "--out", out)
        assert status == 0, error
        assert "step 8, of 4 snapshots" in said
        shares, found = profile(8, length), load_pipeline(str(out)).transformer.state_dict()
        for name, weight in found.items():
            expected = sum(share * one[name] for share, one in zip(shares, steps, strict=True))
            spread = max(float((one[name] - expected).abs().max()) for one in steps)
            assert float((weight - expected).abs().max()) <= tolerance * spread + 1e-6, name
    about = json.loads((out / "average.json").read_text())
    assert (about["length"], about["step"], about["snapshots"]) == (0.07, 8, 4)
    assert 0 < about["error"] < 0.05
    card = ModelCard.load(out / "README.md").text
    assert "power-function average of length 0.07 at step 8" in card
    assert "the embedded art set" in card  # data.json came along
    load_pipeline(str(out)).save_pretrained(out)  # a card that is written again still says it
    assert "length 0.07" in (out / "README.md").read_text()


def test_lengths_are_measured_and_the_best_goes_to_the_card(small_run, tmp_path, command):
    run = with_snapshots(small_run)
    train(run)
    options = (
        "--reference", "art", "--num_images", 6, "--weights", "random", "--measures", "[fid,kid]",
        "--bootstrap", 0, "--curve", "false", "--label_field", "null", "--kid_subset_size", 4,
        "--report", "false", "--cache", "false", "--sample.num_inference_steps", 2,
    )  # fmt: skip
    out = tmp_path / "lengths"
    words = ("evaluate", tmp_path / "run", *options, "--out", out, "--lengths", "[0.05, 0.1]")
    status, said, error = command(*words)
    assert status == 0, error
    results = {
        length: json.loads((out / f"length-{length}" / "result.json").read_text())
        for length in ("0.05", "0.1")
    }
    distances = {length: result["metrics"]["fd_random"] for length, result in results.items()}
    best = min(distances, key=distances.get)
    assert len(set(distances.values())) == 2
    result = json.loads((out / "result.json").read_text())
    assert result["average"]["by_length"] == distances
    assert result["average"]["length"] == float(best)
    assert result["metrics"] == results[best]["metrics"]
    assert f"the best is {best}" in said
    assert compare(out, out / f"length-{best}")

    status, _, error = command(
        "average", tmp_path / "run", "--result", out / "result.json", "--out", tmp_path / "best"
    )
    assert status == 0, error
    card = ModelCard.load(tmp_path / "best" / "README.md").text
    assert "The average was chosen by Distance of random features from these lengths: 0.05" in card
    assert f"{distances[best]:.4g}" in card

    status, _, error = command(*words)
    assert (status, "result.json exists" in error) == (2, True)
    other = ("average", tmp_path / "run", "--out", tmp_path / "no")
    for arguments, message in (
        (
            ("--result", out / "length-0.1" / "result.json"),
            "is not a result of complexity-dit eval",
        ),
        (("--result", out / "result.json", "--length", 0.2), "leave --length or --result out"),
        ((), "give --length, or the --result"),
    ):
        status, _, error = command(*other, *arguments)
        assert status == 2
        assert message in error
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_averaged_is_refused(small_run, tmp_path, command):
    train(with_snapshots(small_run))
    run, out = tmp_path / "run", tmp_path / "out"

    def message(folder, length):
        status, _, error = command("average", folder, "--length", length, "--out", out)
        assert status == 2
        assert not out.exists()
        return error

    assert "lengths is [0.5]; expected a number in [0.01, 0.28]" in message(run, 0.5)
    assert "give length 0.28 only with an error of" in message(run, 0.28)
    snapshot = run / "averages" / "step-00000004" / AVERAGES_FILE
    content = snapshot.read_bytes()
    snapshot.write_bytes(content[:-1] + b"\0\0")
    assert "step-00000004 is damaged" in message(run, 0.1)
    snapshot.write_bytes(content)
    train(dataclasses.replace(small_run, out=str(tmp_path / "plain")))
    assert "has no averages to combine: train with --ema.snapshot_every" in message(
        tmp_path / "plain", 0.1
    )


def test_settings_that_keep_no_average_are_refused(small_run):
    for wrong in ([], [0.1, 0.1]):
        with pytest.raises(UserError, match="different ones, at least one"):
            EMAConfig(lengths=wrong)
    with pytest.raises(UserError, match=r"lengths is \[0.3\]"):
        EMAConfig(lengths=[0.3])
    with pytest.raises(UserError, match="leave it at 0 for an adapter"):
        with_snapshots(small_run, lora=LoraOptions(rank=2))
    run = with_snapshots(small_run, resume="auto")
    train(run)
    later = EMAConfig(snapshot_every=2, lengths=[0.1])
    with pytest.raises(UserError, match=r"ema\.lengths is \[0.05, 0.1\] there"):
        train(dataclasses.replace(run, ema=later))


def test_a_plan_counts_them(small_run):
    options = PlanConfig(num_classes={"style": 9})
    assert ", average " in plan(small_run, options)
    assert ", averages " in plan(with_snapshots(small_run), options)


@pytest.mark.slow
def test_two_processes_keep_those_of_one(small_run, tmp_path):
    for processes in (1, 2):
        torchrun(
            processes, "-m", "complexity_dit", "train", "--out", tmp_path / str(processes),
            "--steps", 4, "--batch_size", 4, "--data.num_images", 32, "--data.resolution", 16,
            "--mixed_precision", "no", "--compile", "no", "--ema.snapshot_every", 2,
            "--optim.warmup_steps", 2,
        )  # fmt: skip
    one, two = (
        load_file(tmp_path / str(n) / "averages" / "step-00000004" / AVERAGES_FILE) for n in (1, 2)
    )
    assert one.keys() == two.keys()
    for name in one:
        # In fp32 AdamW turns the rounding of a small gradient into a step: of single weights.
        assert (one[name] - two[name]).norm() <= 1e-3 * one[name].norm(), name
