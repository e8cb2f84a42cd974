"""The model: initial weights, outputs, gradients, dtypes, backends, errors of invalid input."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from complexity_lm import DeepForCausalLM, DeepModel
from inl_core import INLDynamics, INLDynamicsLite, ops

PLACEMENTS = ("stream", "branch", "force", "force_mlp", "none")


def dynamics_of(model) -> list[INLDynamics]:
    return [module for module in model.modules() if isinstance(module, INLDynamics)]


def assert_exact_start(dynamics: INLDynamics, alpha: float, beta: float, gate: float) -> None:
    h = torch.randn(5, dynamics.hidden_size)
    raw = dynamics._coefficients(h, torch.randn_like(h))
    used = ops.inl_coefficients(*raw, beta_max=dynamics.beta_max)
    for current, expected in zip(used, (alpha, beta, gate), strict=True):
        torch.testing.assert_close(current, torch.full_like(current, expected), rtol=2e-6, atol=0)
    assert dynamics.mu.eq(0).all()


# Initial weights


@pytest.mark.parametrize("adaptive", ["token", "channel", "layer"])
@pytest.mark.parametrize("placement", ["stream", "branch", "force", "force_mlp"])
def test_the_dynamics_start_at_their_coefficients(tiny, placement, adaptive) -> None:
    """The initialisation of the original models reset α, β, g to 0.5, 0.69, 0.5."""
    model = DeepForCausalLM(tiny(dynamics_placement=placement, dynamics_adaptive=adaptive))
    start = (0.5, 0.01, 0.99) if placement.startswith("force") else (0.9, 0.1, 0.5)
    assert len(dynamics_of(model)) == (6 if placement == "force" else 3)
    for dynamics in dynamics_of(model):
        assert_exact_start(dynamics, *start)


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "routed"])
def test_residual_projections_start_smaller_with_depth(tiny, experts) -> None:
    config = tiny(hidden_size=128, intermediate_size=256, num_experts=experts)
    model = DeepForCausalLM(config)
    small = 0.02 / math.sqrt(2 * config.num_hidden_layers)
    seen = 0
    for name, parameter in model.named_parameters():
        if "dynamics" in name or parameter.ndim < 2:
            continue
        is_residual = any(part in name for part in ("o_proj", "down"))
        seen += is_residual
        wanted = small if is_residual else 0.02
        assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
    assert seen == config.num_hidden_layers * (3 if experts else 2)


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "routed"])
@pytest.mark.parametrize("placement", ["stream", "branch", "force", "force_mlp"])
def test_dynamics_do_not_change_the_initial_backbone(tiny, placement, experts) -> None:
    states = []
    for where in ("none", placement):
        torch.manual_seed(0)
        model = DeepForCausalLM(tiny(dynamics_placement=where, num_experts=experts))
        states.append(model.state_dict())
    plain, moved = states
    assert set(plain) == {name for name in moved if "dynamics" not in name}
    for name, value in plain.items():
        assert torch.equal(value, moved[name]), name


def test_random_matrices_start_different(tiny) -> None:
    controllers = dynamics_of(DeepForCausalLM(tiny()))
    first, second = controllers[0].weight_in_h, controllers[1].weight_in_h
    assert not torch.equal(first, second)
    assert not torch.equal(first, controllers[0].weight_in_v)


def test_loading_keeps_saved_weights_and_initialises_missing_ones(lively, tmp_path) -> None:
    """Values that a checkpoint lacks get their exact initial value."""
    model = lively()
    model.save_pretrained(tmp_path)
    loaded = DeepForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

    weights = load_file(tmp_path / "model.safetensors")
    missing = [name for name in weights if name.startswith("model.layers.1.dynamics")]
    missing.append("model.layers.2.dynamics.mu")
    assert len(missing) == 7
    save_file(
        {name: value for name, value in weights.items() if name not in missing},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    partly, info = DeepForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing)
    assert_exact_start(partly.model.layers[1].dynamics, 0.5, 0.01, 0.99)
    assert partly.model.layers[2].dynamics.mu.eq(0).all()
    for name, value in model.state_dict().items():
        if name not in missing:
            assert torch.equal(partly.state_dict()[name], value), name


# Outputs


def test_force_without_inertia_and_spring_equals_the_plain_residual(lively, ids) -> None:
    plain = lively(dynamics_placement="none").double()
    force = lively(
        dynamics_placement="force", dynamics_adaptive="lite", dynamics_velocity_max=None,
        dynamics_alpha=0, dynamics_beta=0, dynamics_gate=1, dynamics_dt=1,
    ).double()  # fmt: skip
    force.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(force(ids).logits, plain(ids).logits)


def test_the_velocity_starts_at_zero_in_every_decoding_step(lively, ids) -> None:
    """The original models passed the last velocity of a token to the next token."""
    model = lively(dynamics_placement="branch")
    entering = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: entering.append(args[1]))
    model.generate(ids, max_new_tokens=4, do_sample=False)
    model.train()
    model(ids)
    assert len(entering) == 5
    assert all(v is None for v in entering)


def test_a_cached_step_attends_to_every_earlier_key(lively, ids) -> None:
    """In the original models, a causal mask with one query hid all keys but the first."""
    model = lively(attn_implementation="eager").double()
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        out = model(ids[:, -1:], past_key_values=cache, output_attentions=True)
    for weights in out.attentions:
        assert weights.shape == (3, 4, 1, ids.shape[1])
        assert (weights > 1e-9).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_and_evaluation_mode_agree(lively, ids, placement) -> None:
    model = lively(dynamics_placement=placement).double()
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_hidden_states_and_attentions_are_returned_on_request(lively, ids) -> None:
    model = lively(attn_implementation="eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(3, 11, 32)] * 4
    assert [a.shape for a in out.attentions] == [(3, 4, 11, 11)] * 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids, return_dict=False)[0].shape == (3, 11, 64)


def test_logits_to_keep(lively, ids) -> None:
    model = lively()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    keep = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, full[:, keep])


# transformers passes a deprecated argument to torch's flex masks.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_attention_backends_agree(lively, ids, backend, window) -> None:
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    reference = lively(sliding_window=window)
    assert reference.config._attn_implementation == "sdpa"
    other = lively(sliding_window=window, attn_implementation=backend)
    with torch.no_grad():
        want = reference(ids, attention_mask=mask).logits
        got = other(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-4)


def test_the_loss_is_the_mean_over_counted_labels(lively, ids) -> None:
    model = lively().double()
    labels = ids.clone()
    labels[0, :6] = -100
    out = model(ids, labels=labels)
    targets = labels[:, 1:].reshape(-1)
    want = F.cross_entropy(out.logits[:, :-1].reshape(-1, 64), targets)
    assert out.loss.dtype == torch.float64
    torch.testing.assert_close(out.loss, want, rtol=1e-14, atol=0)
    # As `Trainer` calls it under gradient accumulation.
    part = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(part, want * (targets != -100).sum() / 50, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_every_rope_type_of_transformers_works(lively, ids, rope_type) -> None:
    settings = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type in ("yarn", "llama3"):
        settings["original_max_position_embeddings"] = 32
    if rope_type == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = lively(rope_parameters=settings, max_position_embeddings=64)
    with torch.no_grad():
        moved = model(ids).logits - lively()(ids).logits
    assert moved.isfinite().all()
    # NTK scaling has no effect until a text exceeds the original length.
    assert (moved.abs().max() > 1e-3) == (rope_type != "dynamic")


# Gradients and dtypes


@pytest.mark.parametrize("adaptive", ["token", "channel", "layer", "lite"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_parameter_has_a_gradient(lively, ids, placement, adaptive) -> None:
    """Including the first layer, whose velocity is zero: DistributedDataParallel needs all."""
    model = lively(dynamics_placement=placement, dynamics_adaptive=adaptive).train()
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_gives_the_same_gradients(lively, ids, placement, experts) -> None:
    plain = lively(dynamics_placement=placement, num_experts=experts).double().train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "routed"])
def test_bf16_is_close_and_does_not_round_frequencies(lively, ids, tmp_path, experts) -> None:
    model = lively(num_experts=experts)
    model.save_pretrained(tmp_path)
    want = model(ids).logits
    loaded = DeepForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for low in (loaded, copy.deepcopy(model).to(torch.bfloat16)):
        assert low.dtype == torch.bfloat16
        assert torch.equal(low.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
        got = low(ids, labels=ids)
        assert got.logits.dtype == torch.bfloat16
        assert got.loss.dtype == torch.float32
        error = (got.logits.float() - want).square().mean().sqrt()
        assert error < 0.05 * want.std()
        assert low.generate(ids, max_new_tokens=3, do_sample=False).shape == (3, 14)


def test_every_placement_trains_under_autocast(lively, ids) -> None:
    for placement in PLACEMENTS:
        model = lively(dynamics_placement=placement, num_experts=3).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_model_overfits_a_small_text(tiny, ids, fit, placement) -> None:
    torch.manual_seed(0)
    losses = fit(DeepForCausalLM(tiny(dynamics_placement=placement)).train(), ids, 40, 2e-2)
    assert losses[0] == pytest.approx(math.log(64), rel=0.05)
    assert losses[-1] < 1.0


# Vocabulary and invalid input


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_keeps_remaining_ids(lively, ids, tied) -> None:
    model = lively(tie_word_embeddings=tied)
    before = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == 70
    after = model(ids, labels=torch.full_like(ids, 69))
    torch.testing.assert_close(after.logits[..., :64], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"token id 63 is outside the vocabulary of 50 ids"):
        model(torch.tensor([[63]]))


@pytest.mark.parametrize("bad", [64, 1000, -1])
def test_an_id_outside_the_vocabulary_is_rejected(lively, ids, bad) -> None:
    ids[1, 5] = bad
    with pytest.raises(ValueError, match=rf"token id {bad} is outside the vocabulary of 64 ids"):
        lively()(ids)
    with pytest.raises(ValueError, match=rf"token id {bad} is outside"):
        lively().generate(ids, max_new_tokens=2)


def test_ids_and_embeddings_exclude_each_other(lively, ids) -> None:
    model = lively()
    embeddings = model.get_input_embeddings()(ids)
    for inputs in ({"input_ids": ids, "inputs_embeds": embeddings}, {}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)


def test_a_checkpoint_of_another_shape_is_rejected(lively, tiny, tmp_path) -> None:
    lively().save_pretrained(tmp_path)
    message = r"mlp.down_proj.weight: \(32, 48\) in the checkpoint, \(32, 64\) by the configuration"
    with pytest.raises(RuntimeError, match=message):
        DeepForCausalLM.from_pretrained(tmp_path, config=tiny(intermediate_size=64))


def test_the_decoder_loads_from_the_folder_of_the_full_model(lively, ids, tmp_path) -> None:
    model = lively(num_experts=3)
    model.save_pretrained(tmp_path)
    decoder = DeepModel.from_pretrained(tmp_path)
    torch.testing.assert_close(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_lite_dynamics_have_mu_as_their_only_parameter(tiny) -> None:
    model = DeepForCausalLM(tiny(dynamics_adaptive="lite"))
    layers = [m for m in model.modules() if isinstance(m, INLDynamicsLite)]
    assert len(layers) == 3
    assert all([name for name, _ in m.named_parameters()] == ["mu"] for m in layers)
