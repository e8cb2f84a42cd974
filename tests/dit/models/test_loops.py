"""A loop over the blocks in the middle: call-time repetitions, training, exits, files."""

import copy
import dataclasses

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from complexity_dit.cli.inspect import inspect
from complexity_dit.config import SampleConfig
from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.models.transformer import PLACEMENTS, ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import iter_samples, recorded
from complexity_dit.seeding import generator_for
from complexity_dit.training.train import train
from inl_core import LoopedDynamics, certify_loops, draw_num_loops
from inl_core.run.errors import UserError
from support.networks import randomised, small_network

COUNTS = (1, 2, 5)


def looped(**overrides):
    """Four blocks, the two in the middle repeated; every coefficient of the loop off its start."""
    usual = {"num_layers": 4, "num_loops": 3, "dynamics_velocity_max": None, "loop_spring": True}
    model = randomised(small_network(**(usual | overrides))).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoopedDynamics):
                module.alpha.uniform_(0.2, 0.6)
                if module.beta is not None:
                    module.beta.uniform_(0.05, 0.2)
                module.gate.fill_(0.9)
            elif hasattr(module, "mu"):
                module.mu.fill_(0.5)  # off its bound
    return model


def inputs(batch=3, dtype=torch.float64):
    torch.manual_seed(1)
    labels = torch.tensor([[0, 1], [2, -1], [-1, 0]])[:batch]
    return torch.randn(batch, 3, 8, 8, dtype=dtype), torch.rand(batch) * 1000, labels


def written_out(model, count: int):
    """The stack that a loop without dynamics unrolls to, with copies of the blocks."""
    order = [0, *[1, 2] * count, 3]
    names = ("num_loops", "loop_dynamics", "num_layers")
    settings = {k: v for k, v in model.config.items() if k not in names and k[0] != "_"}
    twin = ComplexityDiTTransformer2DModel(**settings, num_layers=len(order)).double().eval()
    state = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in (
        "blocks", "dynamics_loop",
    )}  # fmt: skip
    for index, source in enumerate(order):
        block = model.blocks[source].state_dict()
        state |= {f"blocks.{index}.{name}": value for name, value in block.items()}
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_one_repetition_at_the_start_is_the_plain_stack(placement):
    model = looped(dynamics_placement=placement)
    model.dynamics_loop.reset_parameters()
    expected = written_out(model, 1)(*inputs()).sample
    torch.testing.assert_close(model(*inputs(), num_loops=1).sample, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_without_dynamics_it_is_the_stack_written_out(count):
    model = looped(loop_dynamics=False, dynamics_placement="none")
    expected = written_out(model, count)(*inputs()).sample
    assert torch.equal(model(*inputs(), num_loops=count).sample, expected)


@torch.no_grad()
def test_repetitions_are_those_of_the_definition():
    model = looped(dynamics_placement="none")
    entered, left = [], []
    for index in (1, 3):
        model.blocks[index].register_forward_pre_hook(lambda m, a: entered.append(a[0]))
    model.blocks[2].register_forward_hook(lambda m, a, out: left.append(out[0]))
    default = model(*inputs()).sample
    dynamics = model.dynamics_loop
    h = x = entered[0]
    mu, v = x @ dynamics.equilibrium.weight.T, 0.0
    expected = [x]
    for out in left:
        v = dynamics.alpha * v - dynamics.beta * (h - mu) + (out - h)
        h = h + dynamics.gate * v
        expected.append(h)
    assert len(expected) == 4
    for found, wanted in zip(entered, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert torch.equal(model(*inputs(), num_loops=3).sample, default)
    assert not torch.equal(model(*inputs(), num_loops=4).sample, default)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_in_fp64(placement):
    """By finite differences, along one random direction per parameter."""
    model = looped(dynamics_placement=placement).train()

    def loss():
        return model(*inputs(), num_loops=4).sample.square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        slope, step, values = float((parameter.grad * direction).sum()), 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(loss().item())
                parameter.sub_(sign * step * direction)
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(slope, rel=1e-4, abs=1e-8), name
    for name, parameter in model.dynamics_loop.named_parameters():
        assert parameter.grad.abs().min() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = looped().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs(), num_loops=4).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_training_under_autocast(count):
    model = looped().float().train()
    x, t, labels = inputs(dtype=torch.float32)
    exact = model(x, t, labels, num_loops=count).sample
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, t, labels, num_loops=count).sample
    found.float().square().mean().backward()
    assert (found - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # The first repetition has no velocity to keep; DDP still finds a gradient.
    assert bool(model.dynamics_loop.alpha.grad.any()) == (count > 1)


# torch asks the inputs for it, and hides its warning where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_counts_share_the_graphs_of_blocks():
    """As `compile: regional` trains with sampled counts."""
    model = looped().train()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    found = []
    compiled = copy.deepcopy(model)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    for count in (2, 1, 5, 3, 9, 4, 8, 6, 7, 10):
        counters.clear()
        expected = model(*inputs(), num_loops=count).sample
        torch.testing.assert_close(compiled(*inputs(), num_loops=count).sample, expected)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] >= 1
    assert not any(found[1:])
    torch.compiler.reset()


def test_a_graph_for_each_number_of_repetitions():
    model = looped()
    torch.compiler.reset()  # graphs of a function are counted over all its models
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for count in COUNTS:
        expected = model(*inputs(), num_loops=count).sample
        torch.testing.assert_close(compiled(*inputs(), num_loops=count).sample, expected)
    torch.compiler.reset()


def test_caches_of_denoising_steps_are_refused():
    with pytest.raises(ValueError, match="repeats blocks \\(loop_start\\): no cache knows that"):
        looped().enable_cache(FirstBlockCacheConfig())


@torch.no_grad()
def test_dropped_tokens_bypass_the_loop_or_the_loop_has_all():
    kept = draw_kept_tokens(3, 16, 0.5, generator_for(0, "test"))
    inside = looped()
    seen = []
    for block in inside.blocks:
        block.register_forward_hook(lambda m, a, out: seen.append(out[0].shape[1]))
    inside(*inputs(), kept_tokens=kept)
    assert seen == [16, *[8] * 6, 16]
    outside = looped(token_drop_start=3, token_drop_end=4, loop_start=0, loop_end=2)
    outside(*inputs(), kept_tokens=kept)
    across = looped(loop_start=0, loop_end=2)
    with pytest.raises(ValueError, match="the loop over blocks 0 to 1 enters or leaves"):
        across(*inputs(), kept_tokens=kept)


@torch.no_grad()
def test_an_image_stops_when_it_settles():
    model = looped(num_layers=3, num_loops=40)
    for name, parameter in model.blocks[1].named_parameters():
        if "to_out" in name or "down" in name:
            parameter.mul_(0.05)
    model.dynamics_loop.beta.fill_(0.8)
    exact = model(*inputs()).sample
    calls = []
    model.blocks[1].register_forward_hook(lambda *a: calls.append(1))
    model.register_to_config(loop_tolerance=1e-3)
    early = model(*inputs()).sample
    assert 1 < len(calls) < 40
    assert not torch.equal(early, exact)
    torch.testing.assert_close(early, exact, rtol=0, atol=0.05)
    for i in range(3):
        alone = model(*(x[i : i + 1] for x in inputs())).sample
        torch.testing.assert_close(alone, early[i : i + 1], rtol=0, atol=1e-12)
    calls.clear()
    model.train()(*inputs())
    assert len(calls) == 40


@pytest.mark.parametrize("placement", ["branch", "none"])
def test_the_certificate_is_that_of_the_whole_jacobian(placement):
    model = looped(num_layers=3, hidden_size=8, num_attention_heads=2, dynamics_placement=placement)
    model = model.requires_grad_(False)
    x, t, labels = (part[:1] for part in inputs())
    x = x[:, :, :4, :2]  # two tokens
    report = certify_loops(model, (x, t, labels), 3)["dynamics_loop"]
    entered = []
    hook = model.blocks[1].register_forward_hook(lambda m, a, out: entered.append(a))
    model(x, t, labels, num_loops=1)
    hook.remove()
    (start, v_blocks, *rest), dynamics = entered[0], model.dynamics_loop
    mu = dynamics.equilibrium(start)

    def step(state):
        h, v = state.view(2, *start.shape)
        out = model.blocks[1](h, v_blocks, *rest)[0]
        return torch.stack(dynamics(h, v, out - h, mu)).flatten()

    state = torch.stack([start, torch.zeros_like(start)]).flatten()
    whole = torch.eye(state.numel(), dtype=torch.float64)
    for radius in report.spectral_radius:
        bumps = 1e-6 * torch.eye(state.numel(), dtype=torch.float64)
        jacobian = torch.stack([(step(state + b) - step(state - b)) / 2e-6 for b in bumps], 1)
        expected = torch.linalg.eigvals(jacobian).abs().max().item()
        assert radius == pytest.approx(expected, rel=1e-4)
        whole, state = jacobian @ whole, step(state)
    largest = torch.linalg.matrix_norm(whole, ord=2).item()
    assert report.response == pytest.approx(largest, rel=2e-3)


@torch.no_grad()
def test_saved_loaded_and_sampled(pipe, tmp_path):
    model = looped(loop_alpha=0.25, loop_tolerance=1e-9).float()
    pipe = ComplexityDiTPipeline(model, pipe.scheduler, id2label=pipe.id2label)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = ComplexityDiTPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)

    def images(of, **options):
        generator = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": 2, "output_type": "np", "generator": generator}
        return of(style=["Cubism"], **how, **options).images

    for options in ({}, {"num_loops": 1}, {"num_loops": 5, "guidance_scale": 1.0}):
        assert abs(images(loaded, **options) - images(pipe, **options)).max() < 1e-3
    assert (images(pipe) == images(pipe, num_loops=3)).all()
    assert (images(pipe) != images(pipe, num_loops=1)).any()
    with pytest.raises(UserError, match="whole number of at least 1, got 0"):
        images(pipe, num_loops=0)
    labels = torch.tensor([[0, 0], [1, 1]])
    sets = [
        list(iter_samples(pipe, labels, SampleConfig(num_inference_steps=2, num_loops=n), None))
        for n in (None, 3, 1)
    ]
    assert (sets[0][0][1] == sets[1][0][1]).all()
    assert (sets[0][0][1] != sets[2][0][1]).any()
    assert "num_loops" not in recorded(SampleConfig())
    assert recorded(SampleConfig(num_loops=3))["num_loops"] == 3
    shown = inspect(str(tmp_path / "saved"))
    assert shown["loop"]["num_loops"] == 3
    assert "dynamics_loop" in shown["layers"]


def test_a_pipeline_without_a_loop_refuses_repetitions(pipe):
    with pytest.raises(UserError, match="num_loops 4: this network has no loop"):
        pipe(style=["Cubism"], num_inference_steps=1, num_loops=4)
    assert len(pipe(style=["Cubism"], num_inference_steps=1, num_loops=1).images) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_loops": 0}, "at least 1, got 0"),
        ({"num_loops": 2.5}, "whole number"),
        ({"num_loops": 1001}, "num_loops 1001 must be at most 1000"),
        ({"num_loops": 2, "loop_start": 2, "loop_end": 2}, "loop_start 2 and loop_end 2 must"),
        ({"loop_end": 5}, "loop_end <= num_layers 4"),
        ({"loop_start": -1}, "0 <= loop_start"),
        ({"num_loops": 2, "loop_alpha": 1.5}, r"loop_alpha 1.5 must be in \[0, 1\]"),
        ({"loop_tolerance": 0.1}, "loop_tolerance 0.1 must be positive, and needs a loop"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small_network(num_layers=4, **change)


def test_a_sampled_count_resumes_exactly(small_run, monkeypatch):
    small_run.model.num_loops = 3
    small_run.model.overrides["num_layers"] = 3
    small_run.loop_sampling, small_run.optim.schedule = "poisson", "constant_with_warmup"
    seen, original = [], LoopedDynamics.loop

    def watched(self, block, x, num_loops, **kwargs):
        if self.training:
            seen.append(num_loops)
        return original(self, block, x, num_loops, **kwargs)

    monkeypatch.setattr(LoopedDynamics, "loop", watched)
    folder = train(small_run)
    drawn = [draw_num_loops(3, "poisson", small_run.seed, step) for step in range(8)]
    assert seen == drawn
    assert len(set(drawn)) > 2
    seen.clear()
    parts = copy.deepcopy(small_run)
    parts.out += "-parts"
    train(dataclasses.replace(parts, steps=4))
    resumed = train(dataclasses.replace(parts, resume="auto"))
    assert seen == drawn
    states = [
        ComplexityDiTPipeline.from_pretrained(path).transformer.state_dict()
        for path in (folder, resumed)
    ]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
