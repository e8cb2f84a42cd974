"""Dropped tokens, value residual and routed experts."""

import dataclasses

import pytest
import torch

from complexity_dit.data.dataset import load_data
from complexity_dit.models.tokens import TokenSubset, draw_kept_tokens
from complexity_dit.models.transformer import PLACEMENTS, ComplexityDiTTransformer2DModel
from complexity_dit.seeding import generator_for
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.network import build_model
from complexity_dit.training.train import train
from inl_core import ops
from inl_core.run.errors import UserError
from support.networks import randomised, small_network

TOKENS = 16


def build(**overrides):
    """Four blocks on 16 tokens, with random values for weights that start at a constant."""
    settings = {"num_layers": 4, "num_key_value_heads": 2}
    settings |= {"label_fields": ["style"], "num_classes": [3]}
    return randomised(small_network(**(settings | overrides)))


def inputs(batch=3):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 8, 8), torch.rand(batch) * 1000, torch.tensor([[0], [2], [-1]])


def kept(rate=0.5, batch=3):
    return draw_kept_tokens(batch, TOKENS, rate, generator_for(0, "test"))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_keeping_all_tokens_equals_the_plain_forward(placement):
    model = build(dynamics_placement=placement)
    everything = torch.arange(TOKENS).expand(3, TOKENS)
    with torch.no_grad():
        plain = model(*inputs()).sample
        torch.testing.assert_close(model(*inputs(), kept_tokens=everything).sample, plain)
        assert not torch.allclose(model(*inputs(), kept_tokens=kept()).sample, plain)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropped_tokens_keep_position_and_velocity_of_before_the_middle(
    placement, start, monkeypatch
):
    model = build(dynamics_placement=placement, token_drop_start=start, token_drop_end=3)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, given, made: seen.append((given, made)))
    chosen = kept()
    with torch.no_grad():
        model(*inputs(), kept_tokens=chosen)
    assert [made[0].shape[1] for _, made in seen] == [TOKENS] * start + [8] * (3 - start) + [TOKENS]
    dropped = torch.ones(3, TOKENS, dtype=torch.bool).scatter(1, chosen, False)
    (h_end, v_end, *_), _ = seen[3]
    h_out, v_out = seen[2][1]
    if start:
        h_whole, v_whole = seen[0][1]
        assert torch.equal(h_end[dropped], h_whole[dropped])
    assert torch.equal(h_end[~dropped], h_out.flatten(0, 1))
    if placement == "none":
        assert v_end is None
        return
    assert torch.equal(v_end[~dropped], v_out.flatten(0, 1))
    expected = v_whole[dropped] if start else torch.zeros_like(v_end[dropped])
    assert torch.equal(v_end[dropped], expected)
    assert v_out.abs().sum() > 0


def test_kept_tokens_keep_their_rotary_positions(monkeypatch):
    tables = []
    real = ops.qk_norm_rope

    def watched(q, k, q_weight, k_weight, cos, sin, eps):
        tables.append((cos, sin))
        return real(q, k, q_weight, k_weight, cos, sin, eps)

    monkeypatch.setattr(ops, "qk_norm_rope", watched)
    chosen = kept()
    with torch.no_grad():
        build()(*inputs(), kept_tokens=chosen)
    for whole, part in zip(tables[0], tables[1], strict=True):
        assert torch.equal(part, torch.stack([whole[row] for row in chosen]))


def test_gradients_with_dropped_tokens():
    """Against autograd's own indexing, and against finite differences."""
    torch.manual_seed(0)
    x, part = (torch.randn(3, n, 2, dtype=torch.float64, requires_grad=True) for n in (TOKENS, 8))
    chosen = kept()
    subset = TokenSubset(chosen, 3, TOKENS)
    taken, velocity = subset.take((x, None))
    assert torch.equal(taken, torch.stack([x[i, row] for i, row in enumerate(chosen)]))
    assert velocity is None
    assert torch.autograd.gradcheck(lambda x: subset.take((x, x * x)), (x,))

    def back(part, x):
        return subset.put_back((part, part * part), (x, None))

    assert torch.autograd.gradcheck(back, (part, x))


def test_checkpointing_and_one_graph_with_dropped_tokens():
    x, t, labels = inputs()
    gradients, outputs = [], []
    for how in ("plain", "checkpointed", "compiled"):
        model = build(num_layers=3, dynamics_adaptive="channel").train()
        run = model
        if how == "checkpointed":
            model.enable_gradient_checkpointing()
        elif how == "compiled":
            run = torch.compile(model, fullgraph=True, backend="eager")
        out = run(x, t, labels, kept_tokens=kept()).sample
        out.square().mean().backward()
        outputs.append(out.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for out, grads in zip(outputs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(out, outputs[0])
        assert grads.keys() == gradients[0].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, gradients[0][name], msg=name)


def test_all_tokens_are_kept_equally_often():
    chosen = draw_kept_tokens(20000, TOKENS, 0.75, generator_for(0, "test"))
    assert chosen.dtype == torch.int64
    assert chosen.shape == (20000, 4)
    assert (chosen.diff(dim=1) > 0).all()
    share = torch.bincount(chosen.flatten(), minlength=TOKENS) / 20000
    assert share.tolist() == pytest.approx([0.25] * TOKENS, abs=0.015)
    assert draw_kept_tokens(2, TOKENS, 0.999, generator_for(0, "test")).shape == (2, 1)


def test_dropping_tokens_changes_no_other_random_draw(small_run):
    data = load_data(small_run.data, "train")
    plain = StepBatches(data, small_run, 0, 1)[3]
    assert "kept_tokens" not in plain
    model = dataclasses.replace(small_run.model, token_drop_rate=0.5)
    config = dataclasses.replace(small_run, model=model)
    batches = StepBatches(data, config, 0, 1)
    item = batches[3]
    assert all(torch.equal(item[name], plain[name]) for name in plain)
    assert item["kept_tokens"].shape == (4, 8)
    assert torch.equal(batches[3]["kept_tokens"], item["kept_tokens"])
    assert not torch.equal(batches[4]["kept_tokens"], item["kept_tokens"])
    for rank in (0, 1):
        mine = StepBatches(data, config, rank, 2)[3]["kept_tokens"]
        assert torch.equal(mine, item["kept_tokens"][rank::2])


def test_no_tokens_are_dropped_at_the_end_of_training(small_run):
    model = dataclasses.replace(small_run.model, token_drop_rate=0.5, token_drop_until=0.75)
    config = dataclasses.replace(small_run, model=model)
    batches = StepBatches(load_data(small_run.data, "train"), config, 0, 1)
    assert ["kept_tokens" in batches[step] for step in range(8)] == [True] * 6 + [False] * 2


def test_training_with_dropped_tokens_and_accumulation(small_run):
    model = dataclasses.replace(
        small_run.model,
        token_drop_rate=0.5,
        overrides={"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2},
    )
    folder = train(dataclasses.replace(small_run, model=model, gradient_accumulation_steps=2))
    again = ComplexityDiTTransformer2DModel.from_pretrained(folder / "transformer")
    assert again.config.num_layers == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_drop_rate": 1.0}, r"token_drop_rate 1.0 must be at least 0 \(off\) and below 1"),
        ({"token_drop_rate": -0.5}, "token_drop_rate -0.5 must be"),
        ({"token_drop_until": 0.0}, "token_drop_until 0.0 must be above 0"),
        ({"token_drop_rate": 0.5}, "2 blocks have no middle"),
        ({"token_drop_start": 2, "token_drop_end": 1}, "0 <= start < end <= num_layers 2"),
        ({"token_drop_end": 3}, "token_drop_end 3 must satisfy"),
    ],
)
def test_contradictory_model_settings_are_refused(small_run, settings, words):
    settings["overrides"] = small_run.model.overrides | settings.get("overrides", {})
    data = load_data(small_run.data, "train")

    def build_changed():
        model = dataclasses.replace(small_run.model, **settings)
        return build_model(dataclasses.replace(small_run, model=model), data)

    with pytest.raises(UserError, match=words):
        build_changed()


def test_wrong_kept_tokens_are_refused():
    model = build()
    for wrong in (kept().int(), kept()[:2], kept()[0], torch.zeros(3, 17, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"kept_tokens of shape .* must be int64 \(3, K\)"):
            model(*inputs(), kept_tokens=wrong)
    with pytest.raises(ValueError, match="2 blocks have no middle ones"):
        build(num_layers=2)(*inputs(), kept_tokens=kept())
