"""Schedulers by name: accuracy on a flow with a known solution, and counts of evaluations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.recipe.sampler_table import steps_within
from diffusers import DDIMScheduler, DEISMultistepScheduler, FlowMatchEulerDiscreteScheduler

from complexity_dit.config import ObjectiveConfig, SampleConfig
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import iter_samples
from complexity_dit.pipelines.schedulers import (
    FLOW_SCHEDULERS,
    count_evaluations,
    named_scheduler,
    network_times,
    set_steps,
)
from complexity_dit.training.objective import build_scheduler
from inl_core.run.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)
CPU = torch.device("cpu")
OWN = build_scheduler(ObjectiveConfig(sampling_shift=2.0))
MEAN, STD = 0.7, 0.5


def exact_velocity(x, t):
    """E[noise - data | x_t = x] for data N(MEAN, STD^2): the velocity of a perfect network."""
    variance = ((1 - t) * STD) ** 2 + t**2
    surprise = (x - (1 - t) * MEAN) / variance
    return t * surprise - (MEAN + (1 - t) * STD**2 * surprise)


def error(scheduler, steps):
    """Mean distance to the exact solution for unit noise, MEAN + STD * noise."""
    noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    x, timesteps = noise, set_steps(scheduler, steps, CPU)
    for t, time in zip(timesteps, network_times(scheduler), strict=True):
        v = exact_velocity(x.double(), float(time) / 1000).float()
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return float((x - MEAN - STD * noise).abs().mean())


# name: (largest error at 50 steps, smallest factor by which 100 steps reduce it)
ACCURACY = {
    "FlowMatchEulerDiscreteScheduler": (0.020, 1.9),
    "FlowMatchHeunDiscreteScheduler": (0.002, 3.5),
    "DPMSolverMultistepScheduler": (0.005, 2.0),
    "DPMSolverSinglestepScheduler": (0.007, 3.0),
    "UniPCMultistepScheduler": (0.002, 3.5),
}


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_each_solves_a_known_flow_with_its_order_of_accuracy(name):
    bound, gain = ACCURACY[name]
    coarse, fine = (error(named_scheduler(OWN, name), steps) for steps in (50, 100))
    assert coarse < bound
    assert coarse > gain * fine


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # likewise
def test_deis_stops_before_the_end():
    deis = DEISMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    assert error(deis, 50) > 0.02  # several times the error of Euler


def test_network_times_are_exact_noise_levels():
    scheduler = named_scheduler(OWN, "DPMSolverMultistepScheduler", shift=1.0)
    steps = set_steps(scheduler, 30, CPU)
    assert steps.dtype == torch.int64
    times = network_times(scheduler)
    torch.testing.assert_close(times, scheduler.sigmas[:-1] * 1000)
    assert float((times - steps).max()) > 0.5
    ddim = DDIMScheduler()
    assert torch.equal(set_steps(ddim, 4, CPU), network_times(ddim))


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_counts_of_evaluations_match_actual_calls(pipe, monkeypatch, name, steps):
    calls = []
    real = ComplexityDiTTransformer2DModel.forward

    def watch(self, hidden_states, timestep, *args, **kwargs):
        calls.append((len(hidden_states), float(timestep)))
        return real(self, hidden_states, timestep, *args, **kwargs)

    monkeypatch.setattr(ComplexityDiTTransformer2DModel, "forward", watch)
    pipe.scheduler = named_scheduler(pipe.scheduler, name)
    interval = (0.3, 0.9)
    pipe(style=0, num_inference_steps=steps, guidance_scale=3.0, guidance_interval=interval)
    ran = sum(rows for rows, _ in calls)
    assert ran == pipe.num_evaluations
    assert ran == count_evaluations(pipe.scheduler, steps, 3.0, interval)
    assert len(calls) == count_evaluations(pipe.scheduler, steps)
    assert len(calls) == (2 * steps - 1 if "Heun" in name else steps)
    # Guidance adds a second row only inside the interval.
    assert all((rows == 2) == (300 <= time <= 900) for rows, time in calls)
    assert calls[0][1] == pytest.approx(1000, abs=1)


def test_steps_within_a_budget():
    heun = named_scheduler(OWN, "FlowMatchHeunDiscreteScheduler")
    assert [steps_within(heun, k) for k in (1, 5, 10, 20)] == [1, 3, 5, 10]
    assert steps_within(OWN, 20) == 20


def test_shift_is_kept_or_replaced_under_each_name():
    for name in FLOW_SCHEDULERS:
        for asked, expected in ((None, 2.0), (3.0, 3.0)):
            config = named_scheduler(OWN, name, asked).config
            assert config.get("flow_shift", config.get("shift")) == expected
    assert named_scheduler(OWN) is OWN
    assert named_scheduler(OWN, shift=4.0).config.shift == 4.0
    back = named_scheduler(named_scheduler(OWN, "UniPCMultistepScheduler"), OWN.__class__.__name__)
    assert back.timesteps.equal(OWN.timesteps)
    assert back.config.shift == OWN.config.shift


def test_schedulers_that_do_not_fit_are_refused_with_near_names():
    with pytest.raises(UserError, match=r"near names are FlowMatchHeunDiscreteScheduler"):
        named_scheduler(OWN, "FlowMatchHeun")
    with pytest.raises(UserError, match="'DDIMScheduler' for a model trained on flow"):
        named_scheduler(OWN, "DDIMScheduler")
    with pytest.raises(UserError, match=r"shift 0\.0 must be above 0"):
        named_scheduler(OWN, shift=0.0)
    ddim = build_scheduler(ObjectiveConfig(prediction_type="epsilon"))
    with pytest.raises(UserError, match="trained on epsilon"):
        named_scheduler(ddim, "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(UserError, match="this model samples with DDIMScheduler"):
        named_scheduler(ddim, shift=2.0)
    other = named_scheduler(ddim, "DPMSolverMultistepScheduler")
    assert (other.config.prediction_type, other.config.timestep_spacing) == ("epsilon", "trailing")


def test_sampling_with_another_scheduler_does_not_change_the_pipeline(pipe):
    labels, before = pipe.get_label_ids(style=[0, 1, 2]), pipe.scheduler
    config = SampleConfig(num_inference_steps=3, batch_size=2, chunk_size=2)

    def paint(**changes):
        batches = iter_samples(pipe, labels, replace(config, **changes), progress=False)
        return np.concatenate([images for _, images in batches])

    plain = paint()
    heun = paint(scheduler="FlowMatchHeunDiscreteScheduler")
    assert not np.array_equal(plain, heun)
    assert np.array_equal(heun, paint(scheduler="FlowMatchHeunDiscreteScheduler", batch_size=3))
    assert not np.array_equal(plain, paint(shift=1.0))
    assert pipe.scheduler is before
    assert isinstance(before, FlowMatchEulerDiscreteScheduler)
    assert np.array_equal(plain, paint())
    with pytest.raises(UserError, match="no scheduler 'Euler'"):
        paint(scheduler="Euler")


def test_another_solver_is_saved_with_the_pipeline(pipe, tmp_path):
    pipe.scheduler = named_scheduler(pipe.scheduler, "UniPCMultistepScheduler")
    pipe.save_pretrained(tmp_path)
    again = ComplexityDiTPipeline.from_pretrained(tmp_path)
    assert again.scheduler.config.flow_shift == pipe.scheduler.config.flow_shift
    pictures = []
    for one in (pipe, again):
        one.set_progress_bar_config(disable=True)
        pictures.append(
            one(style=0, num_inference_steps=3, output_type="np",
                generator=torch.Generator().manual_seed(0)).images
        )  # fmt: skip
    assert np.array_equal(*pictures)
