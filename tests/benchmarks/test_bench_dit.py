"""The speed benchmark compares equal parameters, half of the tokens and complete steps."""

import argparse

import pytest
import torch
from benchmarks.speed import bench_dit as bench

BOTH = ("fp32", "bf16")
OPTIONS = argparse.Namespace(
    size="nano", cells=8, channels=4, patch=2, batch_size=2, rounds=1, device="cpu", threads=1,
    task="train", dtypes=["fp32", "bf16"], modes=["eager"],
    cases=["diffusers", "dynamics", "dynamics, half the tokens"], attention=None,
)  # fmt: skip


def test_equal_parameters_are_equal_to_the_step_of_the_mlp():
    counts = {case: bench.parameters(bench.build(case, OPTIONS)) for case in bench.CASES}
    step = 3 * 64 * 128 * 4  # 64 units of a SwiGLU in each of four layers
    assert abs(counts["none, equal parameters"] - counts["diffusers"]) <= step / 2
    assert counts["none"] < counts["none, equal parameters"]
    assert counts["dynamics"] == counts["dynamics, half the tokens"]
    assert counts["none, prompts"] > counts["none"] + 500_000  # the text encoder
    work = {case: bench.step_gflops(case, OPTIONS) for case in bench.CASES}
    assert work["none"] < work["none, equal parameters"]
    assert work["none, half the tokens"] < work["none"] < work["none, prompts"]


def test_half_of_the_tokens_go_through_the_middle():
    step, model = bench.stepper("dynamics, half the tokens", OPTIONS, compiled=False)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, output: seen.append(args[0].shape[1]))
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert seen == [16, 8, 8, 16]
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def test_ratios_are_to_diffusers_to_fp32_and_to_all_tokens():
    found = bench.measure(OPTIONS)
    assert len(found) == 6
    first = found["diffusers", "fp32", "eager"]
    assert first["speed ratio"][0] == 1.0
    assert "over fp32" not in first
    best = [found["diffusers", dtype, "eager"]["over its fastest mode"][0] for dtype in BOTH]
    assert 1.0 in best
    half = found["dynamics, half the tokens", "bf16", "eager"]
    assert set(half) >= {"speed ratio", "over fp32", "over all tokens"}
    assert "over all tokens" not in found["dynamics", "bf16", "eager"]
    step, _ = bench.stepper("dynamics", OPTIONS, compiled=False)
    assert "Self CPU" in bench.profile_of(step, OPTIONS.device)


@pytest.mark.parametrize("case", ["diffusers", "dynamics", "none, prompts"])
def test_sampling_evaluates_the_network_twenty_times(case):
    sample, model = bench.sampler(case, OPTIONS, compiled=False, dtype="bf16")
    network, seen, read = getattr(model, "network", model), [], []
    network.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
    if network is not model:
        model.text_encoder.register_forward_hook(lambda *call: read.append(call))
    sample()
    assert seen == [torch.bfloat16] * 20
    assert len(read) == (0 if network is model else OPTIONS.batch_size)


def test_a_step_on_prompts_trains_their_reader_and_is_compared_with_labels():
    step, model = bench.stepper("none, prompts", OPTIONS, compiled=False)
    before = [p.detach().clone() for p in model.text_encoder.parameters()]
    step()
    moved = zip(before, model.text_encoder.parameters(), strict=True)
    assert sum(not torch.equal(a, b) for a, b in moved) > 0.8 * len(before)
    options = argparse.Namespace(**vars(OPTIONS) | {"cases": ["none", "none, prompts"]})
    found = bench.measure(options)
    assert set(found["none, prompts", "fp32", "eager"]) == {"speed", "speed ratio"}
    assert set(found["none", "fp32", "eager"]) == {"speed"}
