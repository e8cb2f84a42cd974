"""Text in the network: tokens beside those of the image, the null text, padding."""

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig

from complexity_dit.models.tokens import draw_kept_tokens
from complexity_dit.models.transformer import PLACEMENTS
from complexity_dit.seeding import generator_for
from support.networks import randomised, small_network

# Of FasterCache.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

WIDTH = 12
TOKENS = 16


def network(**overrides):
    settings = {"num_layers": 4, "num_key_value_heads": 2, "caption_channels": WIDTH}
    return randomised(small_network(**(settings | overrides)))


def inputs():
    """Three images with a label each."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, 8, 8, generator=draw)
    return x, torch.tensor([999.0, 300.0, 5.0]), torch.tensor([[0, 1], [2, -1], [-1, -1]])


def text(length=5, tokens=(5, 2, 0)):
    """Texts of 5, 2 and 0 tokens, padded with random numbers."""
    draw = torch.Generator().manual_seed(3)
    states = torch.randn(3, length, WIDTH, generator=draw)
    mask = torch.arange(length) < torch.tensor(tokens)[:, None]
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def test_without_text_parameters_and_draws_are_those_of_before():
    plain, reading = small_network(), small_network(caption_channels=WIDTH)
    added = reading.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in added} == {
        "caption_norm", "caption_embed", "caption_null", "caption_pool",
    }  # fmt: skip
    for name, value in plain.state_dict().items():
        assert torch.equal(value, reading.state_dict()[name]), name
    assert "caption_channels" in plain.config
    old = {k: v for k, v in plain.config.items() if k != "caption_channels"}
    assert type(plain).from_config(old).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("auxiliary_layer", [0, 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_parameter_has_a_gradient_with_and_without_text(placement, auxiliary_layer):
    for given in (text(), {}):
        model = network(dynamics_placement=placement, auxiliary_layer=auxiliary_layer)
        out = model(*inputs(), **given, return_auxiliary=bool(auxiliary_layer), return_dict=False)
        sum(part.square().mean() for part in out).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        if given:
            for name, p in model.named_parameters():
                assert p.grad.abs().sum() > 0 or "dynamics" in name, name


@torch.no_grad()
def test_each_image_follows_its_own_text_labels_and_order_of_words():
    model, given = network(), text()
    plain = model(*inputs(), **given).sample
    other = {k: v.clone() for k, v in given.items()}
    other["encoder_hidden_states"][0] += 1
    changed = model(*inputs(), **other).sample
    assert not torch.allclose(changed[0], plain[0], atol=1e-3)
    assert torch.equal(changed[1:], plain[1:])
    x, t, labels = inputs()
    assert not torch.allclose(model(x, t, labels.flip(1) * 0, **given).sample, plain, atol=1e-3)
    other = {k: v.clone() for k, v in given.items()}
    other["encoder_hidden_states"][0] = other["encoder_hidden_states"][0].flip(0)
    assert not torch.allclose(model(*inputs(), **other).sample[0], plain[0], atol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing():
    """Neither its contents nor, but for rounding, its length."""
    model, given = network(), text()
    plain = model(*inputs(), **given).sample
    other = {k: v.clone() for k, v in given.items()}
    other["encoder_hidden_states"][~given["encoder_attention_mask"]] = 1e4
    assert torch.equal(model(*inputs(), **other).sample, plain)
    longer = text(length=9)
    longer["encoder_hidden_states"][:, :5] = given["encoder_hidden_states"]
    torch.testing.assert_close(model(*inputs(), **longer).sample, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_text_is_the_null_text():
    model = network()
    nothing = model(*inputs()).sample
    empty = model(*inputs(), **text(tokens=(0, 0, 0))).sample
    torch.testing.assert_close(empty, nothing, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model(*inputs(), **text()).sample[2], nothing[2], rtol=1e-4, atol=1e-5
    )
    before = nothing.clone()
    model.caption_null.weight += 1
    assert not torch.allclose(model(*inputs()).sample, before, atol=1e-3)


@torch.no_grad()
def test_dropped_tokens_are_those_of_the_image():
    model, given = network(), text()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _given, made: seen.append(made[0].shape[1]))
    everything = torch.arange(TOKENS).expand(3, TOKENS)
    plain = model(*inputs(), **given).sample
    kept = model(*inputs(), kept_tokens=everything, **given).sample
    torch.testing.assert_close(kept, plain)
    seen.clear()
    some = draw_kept_tokens(3, TOKENS, 0.5, generator_for(0, "test"))
    model(*inputs(), kept_tokens=some, **given)
    assert seen == [TOKENS + 5, 8 + 5, 8 + 5, TOKENS + 5]


@torch.no_grad()
def test_loops_checkpointing_and_fused_projections():
    model, given = network(num_loops=2), text()
    plain = model(*inputs(), **given).sample
    assert not torch.allclose(model(*inputs(), num_loops=1, **given).sample, plain, atol=1e-4)
    model.enable_gradient_checkpointing()
    with torch.enable_grad():
        checkpointed = model(*inputs(), **given).sample
        checkpointed.sum().backward()
    torch.testing.assert_close(checkpointed.detach(), plain)
    assert model.caption_embed.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports while compiling
@torch.no_grad()
def test_compiled_as_one_graph():
    model = network()
    expected = model(*inputs(), **text()).sample
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs(), **text()).sample, expected)


@torch.no_grad()
def test_attention_backends_get_the_mask():
    model = network()
    expected = model(*inputs(), **text()).sample
    try:
        for backend in ("_native_math", "native"):
            model.set_attention_backend(backend)
            found = model(*inputs(), **text()).sample
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    finally:
        model.reset_attention_backend()


@torch.no_grad()
def test_bf16_attention_of_the_cpu_gets_the_mask():
    model = network()
    expected = model(*inputs(), **text()).sample
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs(), **text()).sample
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cache", ["first block", "faster"])
@torch.no_grad()
def test_caches_with_a_text(cache):
    """Every step computed by a cache that skips nothing is the plain step."""
    model, (x, t, labels), given = network(), inputs(), text()
    # As the pipeline calls it: the rows without labels and text first.
    null = text(tokens=(0, 0, 0))
    rows = {
        "hidden_states": torch.cat([x, x]), "timestep": torch.cat([t, t]),
        "class_labels": torch.cat([torch.full_like(labels, -1), labels]),
    } | {k: torch.cat([null[k], v]) for k, v in given.items()}  # fmt: skip
    expected = model(**rows).sample
    if cache == "faster":
        config = FasterCacheConfig(
            tensor_format="BCHW", current_timestep_callback=lambda: 999.0,
            spatial_attention_timestep_skip_range=(-1, 0),
            unconditional_batch_timestep_skip_range=(-1, 0),
            attention_weight_callback=lambda _: 0.5,
        )  # fmt: skip
    else:
        config = FirstBlockCacheConfig(threshold=0.0)
    model.enable_cache(config)
    for _ in range(2):
        with model.cache_context("step"):
            torch.testing.assert_close(model(**rows).sample, expected)


@torch.no_grad()
def test_lora_of_a_network_with_text():
    pytest.importorskip("peft")
    from peft import LoraConfig

    model = network()
    expected = model(*inputs(), **text()).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "caption_embed"]))
    torch.testing.assert_close(model(*inputs(), **text()).sample, expected)
    for layer in (model.blocks[0].attn.to_q, model.caption_embed):
        layer.lora_B["default"].weight.fill_(1.0)
    full = model(*inputs(), **text()).sample
    half = model(*inputs(), **text(), attention_kwargs={"scale": 0.5}).sample
    assert not torch.allclose(full, expected, atol=1e-4)
    assert not torch.allclose(half, full, atol=1e-4)


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model = network()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.caption_channels == WIDTH
    assert torch.equal(again(*inputs(), **text()).sample, model(*inputs(), **text()).sample)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(3, 5, 7)}, r"\(3, 5, 7\) must be \(3, T, 12\)"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 12)}, "text for each image"),
        ({"encoder_hidden_states": torch.zeros(3, 0, 12)}, "at least one token"),
        ({"encoder_attention_mask": torch.ones(3, 5)}, "needs encoder_hidden_states"),
        (text() | {"encoder_attention_mask": torch.ones(3, 4)}, r"\(3, 4\) must be \(3, 5\)"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        network()(*inputs(), **given)


def test_a_network_without_text_refuses_one():
    with pytest.raises(ValueError, match="reads no text"):
        small_network()(*inputs(), **text())
    with pytest.raises(ValueError, match="caption_channels -1"):
        small_network(caption_channels=-1)
