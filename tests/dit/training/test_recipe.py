"""The parts of a step: mirrored images, schedules, clipping, and the warm-up of the average."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from complexity_dit.config import EMAConfig, ObjectiveConfig, OptimConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.callbacks import NoiseLevels
from complexity_dit.training.network import build_model
from complexity_dit.training.state import build_state
from complexity_dit.training.train import optimizer_step

FLOW = ObjectiveConfig(network_output="target", label_dropout=0.0)


def state_of(run, **optim):
    torch.manual_seed(0)
    run = dataclasses.replace(run, optim=OptimConfig(**optim))
    data = load_data(run.data, "train")
    return build_state(build_model(run, data), run), run, data


def clean_images(run, step):
    """The images of a step: x = (1 - t) * image + t * noise, target = noise - image."""
    batch = StepBatches(load_data(run.data, "train"), run, 0, 1)[step]
    t = batch["timestep"].view(-1, 1, 1, 1) / 1000
    return batch["x"] - t * batch["target"]


def test_half_of_the_pictures_are_mirrored(small_run):
    run = dataclasses.replace(small_run, objective=FLOW, batch_size=64)
    unflipped = dataclasses.replace(run, data=dataclasses.replace(run.data, flip=False))
    mirrored = 0
    for step in range(4):
        for image, original in zip(
            clean_images(run, step), clean_images(unflipped, step), strict=True
        ):
            same = torch.allclose(image, original, atol=1e-4)
            flipped = torch.allclose(image, original.flip(-1), atol=1e-4)
            assert same or flipped
            mirrored += flipped and not same
    assert 0.35 < mirrored / 256 < 0.65


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))),
        ("constant_with_warmup", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
    ],
)
def test_the_rate_warms_up_and_follows_its_schedule(small_run, schedule, shape):
    run = dataclasses.replace(small_run, steps=24)
    state, _, _ = state_of(run, lr=1e-3, warmup_steps=4, schedule=schedule)
    rates = []
    for _ in range(24):
        rates.append(state.lr_scheduler.get_last_lr()[0])
        state.optimizer.step()
        state.lr_scheduler.step()
    assert rates[:5] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([1e-3 * shape(i / 20) for i in range(20)])


def test_the_average_warms_up_and_stops_at_its_decay(small_run):
    run = dataclasses.replace(small_run, ema=EMAConfig(decay=0.9, power=0.75))
    state, _, _ = state_of(run)
    parameter, shadow = next(state.model.parameters()), state.ema.shadow_params[0]
    expected = shadow.double().clone()
    for step in range(1, 40):
        with torch.no_grad():
            parameter.normal_(generator=torch.Generator().manual_seed(step))
        state.ema.step(state.model.parameters())
        decay = min(1 - step**-0.75, 0.9)  # 1 - (1 + s)^-power, s counted from 0
        expected = decay * expected + (1 - decay) * parameter.detach().double()
        torch.testing.assert_close(shadow.double(), expected, rtol=1e-5, atol=1e-6)
    assert decay == 0.9


def test_adamw_is_fused_and_gradients_are_clipped(small_run):
    state, run, data = state_of(small_run, grad_clip=1e-3, lr=1e-3, warmup_steps=0)
    assert all(group["fused"] for group in state.optimizer.param_groups)
    seen = []

    def watch(*_):
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        seen.append(torch.stack([g.norm() for g in grads]).norm().item())

    state.optimizer.register_step_pre_hook(watch)
    batch = StepBatches(data, run, 0, 1)[0]
    accelerator = Accelerator(cpu=True)
    noise = NoiseLevels(0, Path(run.out), 0, accelerator)
    _, norm, taken = optimizer_step(accelerator, state.model, state, batch, run, noise)
    assert taken
    assert norm > 1e-2  # as it was
    assert seen == pytest.approx([1e-3], rel=1e-3)  # as it was applied
