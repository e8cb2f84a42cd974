"""A loop over the layers in the middle: call-time repetitions, caches, training, exits, files."""

import copy
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from complexity_lm import DeepForCausalLM
from complexity_lm.evaluate import evaluate
from complexity_lm.generate import GenerateConfig, generate
from complexity_lm.inspect_model import inspect
from complexity_lm.loading import load
from complexity_lm.parameters import decay_parameter_names
from complexity_lm.train import train
from complexity_lm.trainer import compile_layers
from inl_core import LoopedDynamics, certify_loops, draw_num_loops
from inl_core.run.errors import UserError

PLACEMENTS = ("stream", "branch", "force", "force_mlp", "none")
COUNTS = (1, 2, 5)


def looped(lively, **settings):
    """Four layers, the two in the middle repeated; every coefficient of the loop off its start."""
    usual = {
        "num_hidden_layers": 4, "num_loops": 3, "dynamics_velocity_max": None, "loop_spring": True,
    }  # fmt: skip
    return off_start(lively(**(usual | settings)).double())


def off_start(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoopedDynamics):
                module.alpha.uniform_(0.2, 0.6, generator=torch.Generator().manual_seed(2))
                if module.beta is not None:
                    module.beta.uniform_(0.05, 0.2, generator=torch.Generator().manual_seed(3))
                module.gate.fill_(0.9)
            elif hasattr(module, "mu"):
                module.mu.fill_(0.5)  # off its bound
    return model


@pytest.fixture
def calm(tiny):
    """The same without large weights, so that a small change makes a small difference."""

    def build(**settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (
                DeepForCausalLM(tiny(initializer_range=0.1, loop_spring=True, **settings))
                .double()
                .eval()
            )
        return off_start(model)

    return build


def plain_twin(model, count: int):
    """The stack that a loop without dynamics unrolls to: the same layers, written out."""
    config = model.config.unrolled(count)
    twin = DeepForCausalLM(copy.deepcopy(config)).to(model.dtype).eval()
    start, end = model.config.loop_start, model.config.loop_end
    order = [*range(start), *list(range(start, end)) * count, *range(end, len(model.model.layers))]
    state = {k: v for k, v in model.state_dict().items() if "loop" not in k and ".layers." not in k}
    for index, source in enumerate(order):
        layer = model.model.layers[source].state_dict()
        state |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_one_repetition_at_the_start_is_the_plain_stack(lively, ids, placement) -> None:
    model = looped(lively, dynamics_placement=placement)
    model.model.dynamics_loop.reset_parameters()
    expected = plain_twin(model, 1)(ids).logits
    torch.testing.assert_close(model(ids, num_loops=1).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_without_dynamics_it_is_the_stack_written_out(lively, ids, count) -> None:
    model = looped(lively, loop_dynamics=False, dynamics_placement="none")
    found, expected = model(ids, num_loops=count).logits, plain_twin(model, count)(ids).logits
    assert torch.equal(found, expected)


@torch.no_grad()
def test_repetitions_are_those_of_the_definition(lively, ids) -> None:
    model = looped(lively, dynamics_placement="none")
    seen = []
    hook = model.model.layers[2].register_forward_hook(lambda *a: seen.append(a[2][0]))
    states = model(ids, output_hidden_states=True, num_loops=3).hidden_states
    hook.remove()
    assert len(seen) == 3
    assert len(states) == 4 + 2 * 2 + 1
    dynamics = model.model.dynamics_loop
    x = states[1]
    mu, v, h = x @ dynamics.equilibrium.weight.T, 0.0, x
    layer_inputs = [x]
    for out in seen:
        v = dynamics.alpha * v - dynamics.beta * (h - mu) + (out - h)
        h = h + dynamics.gate * v
        layer_inputs.append(h)
    entered = []
    model.model.layers[1].register_forward_pre_hook(lambda m, a: entered.append(a[0]))
    model.model.layers[3].register_forward_pre_hook(lambda m, a: entered.append(a[0]))
    model(ids)
    for found, expected in zip(entered, layer_inputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dynamics", [True, False], ids=["velocity", "plain"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "growing"])
@pytest.mark.parametrize(
    "settings",
    [
        *({"dynamics_placement": placement} for placement in PLACEMENTS),
        {"num_experts": 3},
        {
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 6, "loop_start": 0, "loop_end": 2,
        },
        {"loop_start": 2, "loop_end": 4},
    ],
    ids=[*PLACEMENTS, "routed", "sliding", "end"],
)  # fmt: skip
@torch.no_grad()
def test_cached_decoding_equals_the_full_text(lively, ids, settings, kind, dynamics) -> None:
    if kind == "growing" and "sliding_window" in settings:
        pytest.skip("a cache that knows no config has no sliding layers")
    model = looped(lively, **settings, loop_dynamics=dynamics)
    for count in COUNTS:
        cache = {
            "dynamic": lambda c=count: DynamicCache(config=model.config.unrolled(c)),
            "static": lambda c=count: StaticCache(model.config.unrolled(c), max_cache_len=16),
            "growing": DynamicCache,
        }[kind]()
        full = model(ids, num_loops=count, use_cache=False).logits
        parts = [
            model(ids[:, a:b], num_loops=count, past_key_values=cache).logits
            for a, b in ((0, 5), (5, 6), (6, 7), (7, 11))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-8)


@torch.no_grad()
def test_a_cache_made_from_the_config_has_its_repetitions(lively, ids) -> None:
    model = looped(lively)
    cache = DynamicCache(config=model.config)
    assert len(cache) == 8
    full = model(ids, use_cache=False).logits
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 8), (8, 11))]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="the cache has 8 layers, and num_loops asks for 12"):
        model(ids, past_key_values=cache, num_loops=5)


@pytest.mark.parametrize("implementation", ["dynamic", "static", "none"])
def test_generate_takes_the_number_of_repetitions(lively, ids, implementation) -> None:
    model = looped(lively)
    how = {"max_new_tokens": 6, "do_sample": False}
    if implementation == "none":
        how["use_cache"] = False
    elif implementation == "static":
        how["cache_implementation"] = "static"
    texts = []
    for count in COUNTS:
        expected = ids
        for _ in range(6):
            logits = model(expected, num_loops=count, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        texts.append(model.generate(ids, num_loops=count, **how))
        assert torch.equal(texts[-1], expected)
    assert not torch.equal(texts[0], texts[2])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        model.generate(ids, num_loops=0, **how)
    assert model.config.loop_start == 1  # also after an error


def test_beams_follow_the_cache_of_the_loop(lively, ids) -> None:
    model = looped(lively)
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_loops": 2}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


def test_gradients_in_fp64(calm, ids) -> None:
    """By finite differences, along one random direction per parameter."""
    model = calm(num_loops=4).train()
    names = dict(model.named_parameters())
    loss = model(ids, labels=ids).loss
    loss.backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in names.items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        slope, step = float((parameter.grad * direction).sum()), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(model(ids, labels=ids).loss.item())
                parameter.sub_(sign * step * direction)
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(slope, rel=1e-4, abs=1e-7), name
    dynamics = model.model.dynamics_loop
    for name in ("alpha", "beta", "gate", "equilibrium.weight"):
        assert dynamics.get_parameter(name).grad.abs().min() > 0, name


@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
def test_gradient_checkpointing_gives_the_same_gradients(lively, ids, experts) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = looped(lively, num_experts=experts).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False, num_loops=4).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_graph_for_each_number_of_repetitions(lively, ids) -> None:
    model = looped(lively)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for count in COUNTS:
        expected = model(ids, num_loops=count, use_cache=False).logits
        found = compiled(ids, num_loops=count, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_training_under_autocast(calm, ids, count) -> None:
    model = calm(num_loops=3).float().train()
    exact = model(ids, labels=ids, num_loops=count).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, num_loops=count).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.01)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # The first repetition has no velocity to keep; DDP still finds a gradient.
    assert bool(model.model.dynamics_loop.alpha.grad.any()) == (count > 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_a_layer_in_the_loop_acts_in_every_repetition(lively, ids, fit) -> None:
    peft = pytest.importorskip("peft")
    model = looped(lively)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings).double().train()
    assert sum(".1.self_attn.q_proj.lora_A" in n for n, _ in adapted.named_parameters()) == 1
    losses = fit(adapted, ids, 8, 1e-2)
    assert losses[-1] < losses[0]
    text = adapted.eval().generate(input_ids=ids, num_loops=4, max_new_tokens=3, do_sample=False)
    expected = ids
    for _ in range(3):
        logits = adapted(expected, num_loops=4, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, expected)


@torch.no_grad()
def test_a_token_stops_when_it_settles(calm, ids) -> None:
    """Each token by itself: a longer text changes nothing before it, and a cache little."""
    model = calm(num_loops=40)
    model.model.dynamics_loop.beta.fill_(0.8)
    for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        projection.weight.mul_(0.05)  # a contraction
    exact = model(ids, use_cache=False).logits
    calls = []
    model.model.layers[1].register_forward_hook(lambda *a: calls.append(1))
    model.config.loop_tolerance = 1e-3
    early = model(ids, use_cache=False).logits
    assert 1 < len(calls) < 40
    torch.testing.assert_close(early, exact, rtol=0, atol=0.1)
    assert not torch.equal(early, exact)
    short = model(ids[:, :6], use_cache=False).logits
    torch.testing.assert_close(early[:, :6], short, rtol=0, atol=1e-12)
    one = model(ids[:1], use_cache=False).logits
    torch.testing.assert_close(early[:1], one, rtol=0, atol=1e-12)
    cache, parts = DynamicCache(config=model.config), []
    for begin, end in ((0, 5), (5, 6), (6, 11)):
        parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
    assert {layer.keys.shape[2] for layer in cache.layers} == {11}
    torch.testing.assert_close(torch.cat(parts, 1), early, rtol=0, atol=0.05)
    calls.clear()
    model.train()(ids, use_cache=False)
    assert len(calls) == 40


@pytest.mark.parametrize("placement", ["force_mlp", "branch", "none"])
def test_the_certificate_is_that_of_the_whole_jacobian(lively, placement) -> None:
    """Against every column of the model's own loop, by differences of its layers' outputs."""
    ids = torch.randint(1, 64, (1, 3), generator=torch.Generator().manual_seed(0))
    model = looped(
        lively, num_hidden_layers=3, hidden_size=8, num_attention_heads=2, num_key_value_heads=1,
        dynamics_placement=placement,
    )  # fmt: skip
    report = certify_loops(model, {"input_ids": ids, "use_cache": False}, 3)
    certificate = report["model.dynamics_loop"]
    inner, layer = model.model, model.model.layers[1]
    entered = []
    hook = layer.register_forward_hook(lambda *a, **k: entered.append(a[1:]), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False, num_loops=1)
    hook.remove()
    (x, v_layers, plan), kwargs, _ = entered[0]
    dynamics, mu = inner.dynamics_loop, inner.dynamics_loop.equilibrium(x).detach()

    def step(state):
        h, v = state.view(2, *x.shape)
        out, _ = layer(h, v_layers, plan, **kwargs)
        return torch.stack(dynamics(h, v, out - h, mu)).flatten()

    state, whole = torch.stack([x, torch.zeros_like(x)]).flatten(), None
    for radius in certificate.spectral_radius:
        columns = []
        for i in range(state.numel()):
            bump = torch.zeros_like(state)
            bump[i] = 1e-6
            with torch.no_grad():
                columns.append((step(state + bump) - step(state - bump)) / 2e-6)
        jacobian = torch.stack(columns, 1)
        expected = torch.linalg.eigvals(jacobian).abs().max().item()
        assert radius == pytest.approx(expected, rel=1e-4)
        whole = jacobian if whole is None else jacobian @ whole
        with torch.no_grad():
            state = step(state)
    largest = torch.linalg.matrix_norm(whole, ord=2).item()
    assert certificate.response == pytest.approx(largest, rel=2e-3)
    assert type(dynamics).loop is LoopedDynamics.loop
    assert "loop" not in vars(dynamics)


@torch.no_grad()
def test_saved_and_loaded(lively, ids, tmp_path) -> None:
    model = looped(lively, loop_tolerance=1e-9, loop_alpha=0.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (loaded.config.num_loops, loaded.config.loop_start, loaded.config.loop_end) == (3, 1, 3)
    for count in (None, 1, 5):
        expected = model(ids, num_loops=count).logits
        found = loaded(ids, num_loops=count).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    remote = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, trust_remote_code=True
    )
    found, expected = (of(ids, num_loops=2).logits for of in (remote, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_start_is_exact_and_without_weight_decay(tiny) -> None:
    model = DeepForCausalLM(tiny(num_loops=4, loop_alpha=0.75, loop_spring=True))
    dynamics = model.model.dynamics_loop
    assert dynamics.alpha.tolist() == [0.75] * 32
    assert torch.equal(dynamics.equilibrium.weight, torch.eye(32))
    assert dynamics.beta.tolist() == [0.0] * 32
    assert not [name for name in decay_parameter_names(model) if "loop" in name]
    small, wanted = model.model.layers[0].mlp.down_proj.weight.std().item(), 0.02 / 12**0.5
    assert small == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_loops": 0}, "num_loops must be at least 1, got 0"),
        ({"num_loops": 10**9}, "num_loops 1000000000 makes 1000000002 layers, more than 10000"),
        ({"num_loops": 2, "loop_start": 2, "loop_end": 2}, "loop_start 2 and loop_end 2 must"),
        ({"loop_end": 4}, "loop_end <= num_hidden_layers 3"),
        ({"loop_start": -1}, "0 <= loop_start"),
        ({"num_loops": 2, "loop_alpha": 1.5}, r"loop_alpha must be in \[0, 1\], got 1.5"),
        ({"num_loops": 2, "loop_tolerance": 0.0}, "loop_tolerance must be positive"),
        ({"loop_tolerance": 0.1}, "loop_tolerance 0.1 needs a loop with loop_dynamics"),
    ],
)
def test_wrong_settings_are_refused(tiny, change, message) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny(**change)


def test_wrong_calls_are_refused(lively, ids, tiny) -> None:
    with pytest.raises(ValueError, match="num_loops 4: this model has no loop"):
        lively()(ids, num_loops=4)
    for count in (0, 2.0, True):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            looped(lively)(ids, num_loops=count)
    with pytest.raises(ValueError, match="unknown config key 'loop_begin'"):
        tiny(loop_begin=1)
    with pytest.raises(ValueError, match="continuous batching"):
        looped(lively)(ids, cache=object())


# A run


@pytest.fixture
def eager_graphs(monkeypatch):
    """What the trainer compiles becomes graphs that torch runs as they are."""
    torch.compiler.reset()  # graphs of a function are counted over all its models
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled(f, backend="eager", **how))
    yield
    torch.compiler.reset()


@pytest.fixture
def looped_run(small_run):
    small_run.model.num_loops = 3
    small_run.model.overrides["num_hidden_layers"] = 3
    small_run.loop_sampling = "uniform"
    return small_run


def test_a_sampled_count_resumes_exactly(looped_run, monkeypatch, tmp_path) -> None:
    seen = []
    original = LoopedDynamics.loop

    def watched(self, block, x, num_loops, **kwargs):
        if self.training:
            seen.append(num_loops)
        return original(self, block, x, num_loops, **kwargs)

    monkeypatch.setattr(LoopedDynamics, "loop", watched)
    whole = train(looped_run)
    drawn = [draw_num_loops(3, "uniform", looped_run.seed, step) for step in range(8)]
    assert seen == drawn
    assert len(set(drawn)) > 2
    seen.clear()
    parts = copy.deepcopy(looped_run)
    parts.out, parts.steps = str(tmp_path / "parts"), 4
    parts.optim.schedule = looped_run.optim.schedule = "constant_with_warmup"
    train(parts)
    parts.steps, parts.resume = 8, "auto"
    train(parts)
    assert seen == drawn

    loaded = load(str(whole), device="cpu")
    assert loaded.model.config.num_loops == 3
    losses = [
        evaluate(loaded, looped_run.data.source, config=config(looped_run, count))["metrics"][
            "loss"
        ]
        for count in (None, 3, 6)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert loaded.model.config.num_loops == 3
    (once,) = next(generate(loaded, ["Ka lo"], config=GenerateConfig(num_loops=1)))
    assert once.startswith("Ka lo")
    assert inspect(str(whole))["loop"]["num_loops"] == 3
    assert "model.dynamics_loop,nan" in Path(looped_run.out, "dynamics.csv").read_text()


# torch asks the inputs for it, and hides its warning where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_counts_share_the_graphs_of_layers(lively, ids, eager_graphs) -> None:
    """Graphs of the whole model, one per count, would end at torch's limit of eight."""
    model, counters = looped(lively).train(), torch._dynamo.utils.counters
    compiled, found = copy.deepcopy(model), []
    compile_layers(compiled)
    for count in (2, 1, 5, 3, 9, 4, 8, 6, 7, 10):
        counters.clear()
        expected = model(ids, num_loops=count, use_cache=False).logits
        logits = compiled(ids, num_loops=count, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] >= 1
    assert not any(found[1:])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_run_with_sampled_counts_is_the_eager_one(looped_run, eager_graphs) -> None:
    losses = []
    for compiled in (True, False):
        run = copy.deepcopy(looped_run)
        run.out, run.compile = f"{run.out}-{compiled}", compiled
        train(run)
        rows = Path(run.out, "train_log.csv").read_text().splitlines()[1:]
        losses.append([float(row.split(",")[1]) for row in rows])
        assert "model.layers.1.dynamics" in Path(run.out, "dynamics.csv").read_text()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def config(run, count):
    from complexity_lm.config import EvalConfig

    return EvalConfig(num_loops=count, quiet=True, device="cpu", batch_size=8, max_documents=2)


def test_a_model_without_a_loop_refuses_repetitions(trained) -> None:
    with pytest.raises(UserError, match="num_loops 4: this model has no loop"):
        next(generate(load(str(trained), device="cpu"), ["Ka"], config=GenerateConfig(num_loops=4)))
