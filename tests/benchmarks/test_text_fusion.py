"""The study of cross-attention beside joint tokens: the other network, and the script once."""

from types import SimpleNamespace

import pytest
import torch
from benchmarks.common import results
from benchmarks.recipe import text_fusion
from benchmarks.recipe.text_fusion import ARMS, CrossAttentionDiT

from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from support.benchmark_rows import call
from support.networks import randomised, small_network


@torch.no_grad()
def crossed():
    """A small network with cross-attention, whose every weight affects the output."""
    plain = small_network(caption_channels=16, dynamics_placement="none")
    network = randomised(CrossAttentionDiT.from_config(dict(plain.config))).eval()
    for block in network.blocks:
        block.cross_attn.to_out.weight.normal_(std=0.1)
    return network


def test_every_token_of_the_text_is_read_by_cross_attention_and_no_padding():
    network = crossed()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([100.0, 800.0])
    text, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()

    def output(text, mask=mask):
        return network(
            x, t, encoder_hidden_states=text, encoder_attention_mask=mask, return_dict=False
        )[0]

    with torch.no_grad():
        first = output(text)
        padding = text.clone()
        padding[0, 3:] = 9.0
        torch.testing.assert_close(output(padding), first)
        # The mean of the text stays, so that the condition does: what is left is attention.
        embedded = []
        network.caption_embed.register_forward_hook(
            lambda _, inputs, out: embedded.append(out) or (out + swap)
        )
        swap = torch.zeros(2, 5, 32)
        swap[1, 0], swap[1, 1] = 1.0, -1.0
        changed = output(text)
        assert not torch.allclose(changed[1], first[1], atol=1e-3)
        torch.testing.assert_close(changed[0], first[0])
        nothing = torch.zeros_like(mask)
        torch.testing.assert_close(output(text, nothing), output(2 * text, nothing))
        assert embedded


def test_both_have_as_many_parameters():
    sizes = {"caption_channels": 128, "dynamics_placement": "none", "sample_size": 16}
    counts = {}
    for arm, (build, changes) in ARMS.items():
        kind = ComplexityDiTTransformer2DModel if arm == "joint" else CrossAttentionDiT
        network = kind.from_size("tiny", **sizes, **changes)
        counts[arm] = sum(p.numel() for p in network.parameters())
        assert callable(build)
    assert counts["cross-attention"] == pytest.approx(counts["joint"], rel=1e-3)
    assert counts["cross-attention added"] > 1.15 * counts["joint"]


def test_arms_differ_in_nothing_but_the_network(tmp_path):
    options = SimpleNamespace(
        source="art", latents=None, caption_template="{style}", out=tmp_path, images=64,
        override=['model.overrides={"num_layers": 2}'],
    )  # fmt: skip
    configs = [text_fusion.arm_config(arm, 3, options) for arm in ARMS]
    for config, (_, changes) in zip(configs, ARMS.values(), strict=True):
        assert config.model.overrides == {"num_layers": 2} | changes
        config.model.overrides = {}
        assert config.heldout_every == config.steps
        config.out = ""
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"  # diffusers builds arrays from tensors
)
def test_the_script_runs_once_and_does_not_train_again(tmp_path, monkeypatch):
    monkeypatch.setattr(text_fusion, "HELDOUT_IMAGES", 16)
    arguments = (
        "--source", "art", "--caption_template", "{style} in {genre}", "--images", 16,
        "--out", tmp_path / "out", "--seeds", 0, "--rounds", 1, "--rows", tmp_path / "rows.csv",
        "--override", "data.resolution=16", "data.num_images=64", "batch_size=8",
        "model.size=nano", "optim.warmup_steps=1", "text_encoder.max_length=40",
        'model.overrides={"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}',
        'text_encoder.overrides={"vocab_size": 300, "num_hidden_layers": 1}',
    )  # fmt: skip
    call(monkeypatch, text_fusion, *arguments)
    found = results.read_rows(tmp_path / "rows.csv")
    losses = {r["case"]: float(r["value"]) for r in found if r["metric"] == "held-out loss"}
    assert losses.keys() == ARMS.keys()
    assert losses["joint"] != losses["cross-attention added"]
    assert {r["metric"] for r in found if r["case"] == "cross-attention - joint"} == {"difference"}
    assert all(str(tmp_path) not in r["command"] for r in found)
    monkeypatch.setattr(text_fusion, "train", None)
    call(monkeypatch, text_fusion, *arguments)
    again = results.read_rows(tmp_path / "rows.csv")[len(found) :]
    assert {r["case"]: float(r["value"]) for r in again if r["metric"] == "held-out loss"} == losses
    with pytest.raises(SystemExit, match="was trained for 2 steps, not 4"):
        call(monkeypatch, text_fusion, *arguments, "--images", 32)
