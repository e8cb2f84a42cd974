"""Schedulers by name: accuracy on a flow with a known solution, and counts of evaluations."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from benchmarks.recipe.sampler_table import steps_within
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    schedulers,
)

from complexity_dit.config import ObjectiveConfig, SampleConfig
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.image_to_image import ComplexityDiTImg2ImgPipeline
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import iter_samples
from complexity_dit.pipelines.schedulers import (
    FLOW_SCHEDULERS,
    count_evaluations,
    named_scheduler,
    network_times,
    noised,
    predicted_clean,
    scheduler_names,
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


# Every scheduler of diffusers, given as its pages show, to a network that is exact.

ALL = sorted(
    name
    for name in dir(schedulers)
    if isinstance(getattr(schedulers, name), type) and name.endswith("Scheduler")
)
PREDICTIONS = ["flow", "epsilon", "v_prediction", "sample"]

NEEDS_A_PACKAGE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}  # torchsde
NEEDS_ARGUMENTS = {"AmusedScheduler", "RFD4ProteinaScheduler", "VQDiffusionScheduler"}


def scheduler_of(predicts):
    """The scheduler of a model; networks that predict the clean image are foreign ones."""
    objective = ObjectiveConfig()
    objective.prediction_type = predicts
    return build_scheduler(objective)


class ExactNetwork(torch.nn.Module):
    """What a perfect network predicts for data N(MEAN, STD^2), with the interface of ours."""

    def __init__(self, network, predicts, alphas):
        super().__init__()
        self.config, self.dtype, self.device = network.config, torch.float32, CPU
        self.predicts, self.alphas = predicts, alphas

    def forward(self, x, t, labels, return_dict):
        if self.predicts == "flow":
            return (exact_velocity(x.double(), float(t) / 1000).float(),)
        time = float(t)
        low = min(int(time), 998)
        signal = float(torch.lerp(*self.alphas[low : low + 2].double(), time - low))
        a, s = signal**0.5, (1 - signal) ** 0.5
        surprise = (x.double() - a * MEAN) / (signal * STD**2 + s**2)
        clean, noise = MEAN + a * STD**2 * surprise, s * surprise
        target = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}
        return (target[self.predicts].float(),)


def exact_pipe(pipe, predicts, cls=ComplexityDiTPipeline):
    scheduler = scheduler_of(predicts)
    network = ExactNetwork(pipe.transformer, predicts, getattr(scheduler, "alphas_cumprod", None))
    exact = cls(network, scheduler, id2label=pipe.id2label)
    exact.set_progress_bar_config(disable=True)
    return exact


def distribution(pipe, steps=250):
    x = pipe(
        num_images_per_prompt=32, num_inference_steps=steps, guidance_scale=1.0,
        output_type="latent", generator=[torch.Generator().manual_seed(i) for i in range(32)],
    ).images  # fmt: skip
    return float(x.mean()), float(x.std())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("name", ALL)
def test_each_scheduler_of_diffusers_samples_the_data_or_is_refused(pipe, name, predicts):
    if name in NEEDS_A_PACKAGE | NEEDS_ARGUMENTS:
        assert name not in scheduler_names(predicts)
        return
    exact = exact_pipe(pipe, predicts)
    if name == "UnCLIPScheduler" and predicts != "flow":
        with pytest.raises(ValueError, match="only supports"):  # diffusers refuses it itself
            schedulers.UnCLIPScheduler.from_config(exact.scheduler.config)
        return
    other = getattr(schedulers, name).from_config(exact.scheduler.config)
    if name not in scheduler_names(predicts):
        before = exact.scheduler
        with pytest.raises(UserError, match=f"no scheduler '{name}' for a model trained on"):
            exact.scheduler = other
        assert exact.scheduler is before
        return
    exact.scheduler = other
    assert distribution(exact) == pytest.approx((MEAN, STD), abs=0.06)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_scheduler_is_fitted_however_it_reaches_the_pipeline(pipe, tmp_path, predicts):
    own = ComplexityDiTPipeline(
        pipe.transformer, scheduler_of(predicts),
        id2label=pipe.id2label,
    )  # fmt: skip
    own.save_pretrained(tmp_path)
    other = diffusers.UniPCMultistepScheduler.from_config(own.scheduler.config)
    fitted = named_scheduler(own.scheduler, "UniPCMultistepScheduler").config
    again = ComplexityDiTPipeline.from_pretrained(tmp_path, scheduler=other)
    stock = DiffusionPipeline.from_pretrained(tmp_path, scheduler=other, trust_remote_code=True)
    shared = ComplexityDiTImg2ImgPipeline.from_pipe(own, scheduler=other)
    own.scheduler = other
    wrong = "EulerDiscrete" if predicts == "flow" else "FlowMatchEulerDiscrete"
    wrong = getattr(diffusers, f"{wrong}Scheduler")()
    for one in (own, again, stock, shared):
        found = one.scheduler.config
        keys = ("use_flow_sigmas", "prediction_type", "flow_shift", "beta_end", "timestep_spacing")
        assert {k: found[k] for k in keys} == {k: fitted[k] for k in keys}
        with pytest.raises(UserError, match="no scheduler"):
            one.scheduler = wrong
    with pytest.raises(UserError, match="no scheduler"):
        ComplexityDiTPipeline.from_pretrained(tmp_path, scheduler=wrong)
    with pytest.raises(UserError, match="no scheduler"):
        ComplexityDiTImg2ImgPipeline.from_pipe(own, scheduler=wrong)


def test_options_of_a_scheduler_are_kept_and_what_contradicts_the_model_is_refused(pipe):
    solver = diffusers.DPMSolverMultistepScheduler
    pipe.scheduler = solver.from_config(pipe.scheduler.config, solver_order=3, flow_shift=2.5)
    assert (pipe.scheduler.config.solver_order, pipe.scheduler.config.flow_shift) == (3, 2.5)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.flow_shift == 2.5
    for wrong in ({"use_karras_sigmas": True}, {"prediction_type": "epsilon"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            pipe.scheduler = solver.from_config(pipe.scheduler.config, **wrong)
    noise = exact_pipe(pipe, "epsilon")
    for wrong in ({"prediction_type": "sample"}, {"beta_end": 0.012}, {"use_flow_sigmas": True}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            noise.scheduler = solver.from_config(noise.scheduler.config, **wrong)
    noise.scheduler = solver.from_config(noise.scheduler.config, use_karras_sigmas=True)
    assert noise.scheduler.config.use_karras_sigmas


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_noise_of_a_stochastic_scheduler_is_that_of_the_generators(pipe, name):
    exact = exact_pipe(pipe, "epsilon")
    exact.scheduler = named_scheduler(exact.scheduler, name)

    def paint(*seeds):
        return exact(
            num_images_per_prompt=len(seeds), num_inference_steps=3, output_type="np",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip

    assert np.array_equal(paint(1, 2)[1], paint(2)[0])


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_the_clean_image_follows_from_an_exact_prediction(kind):
    scheduler = scheduler_of(kind)
    set_steps(scheduler, 10, torch.device("cpu"))
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    for step in (0, 4, 9):
        x, time = noised(scheduler, clean, noise, step), network_times(scheduler)[step]
        if kind == "flow":
            prediction = noise - clean
        else:
            kept = scheduler.alphas_cumprod[int(time)]
            prediction = (
                noise if kind == "epsilon" else kept**0.5 * noise - (1 - kept) ** 0.5 * clean
            )
        found = predicted_clean(scheduler, x, prediction, time)
        torch.testing.assert_close(found, clean, atol=2e-2, rtol=0)
