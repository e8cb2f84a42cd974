"""Conversion of the research code's checkpoints: equal outputs of parts, and a complete report.

`Source` is written from the published forward of complexity-diffusion, part by part, in fp64.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from complexity_dit.__main__ import run
from complexity_dit.cli.convert import convert, from_state_dict
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel, patchify, unpatchify
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import load_pipeline
from complexity_dit.training.network import start_from
from inl_core import rotary_2d
from inl_core.run.errors import UserError
from support.authors import GRID, HEADS, KV, PATCH, C, D, E, checkpoint


class Source:
    """Parts of the source network's forward, of block 1."""

    def __init__(self, tensors):
        self.t = {name: x.double() for name, x in tensors.items()}
        self.b = "blocks.1."

    def norm(self, x, weight):
        return self.t[weight] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def modulated(self, x, c, which):
        """norm1 or norm3 with shift and scale, and the gate."""
        linear = F.linear(F.silu(c), *(self.t[f"{self.b}adaLN_modulation.1.{k}"]
                                       for k in ("weight", "bias")))  # fmt: skip
        shift, scale, gate = linear.chunk(6, dim=-1)[3 * which : 3 * which + 3]
        normed = self.norm(x, f"{self.b}norm{(1, 3)[which]}.weight")
        return normed * (1 + scale[:, None]) + shift[:, None], gate

    def attention(self, x):
        count = x.shape[1]
        q, k, v = (
            F.linear(x, self.t[f"{self.b}self_attn.{n}_proj.weight"])
            .view(len(x), count, heads, E).transpose(1, 2)
            for n, heads in (("q", HEADS), ("k", KV), ("v", KV))
        )  # fmt: skip
        q, k = (self.norm(y, f"{self.b}self_attn.{n}_norm.weight") for y, n in ((q, "q"), (k, "k")))
        frequencies = 10000.0 ** (-torch.arange(0, E, 4).double() / E)
        row, column = torch.meshgrid(*[torch.arange(GRID).double()] * 2, indexing="ij")
        angles = torch.cat([torch.outer(p.flatten(), frequencies) for p in (row, column)], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        q, k = (
            torch.cat([y[..., ::2] * cos - y[..., 1::2] * sin,
                       y[..., ::2] * sin + y[..., 1::2] * cos], dim=-1)
            for y in (q, k)
        )  # fmt: skip
        k, v = (y.repeat_interleave(HEADS // KV, dim=1) for y in (k, v))
        out = torch.softmax(q @ k.transpose(-2, -1) / E**0.5, dim=-1) @ v
        out = out.transpose(1, 2).flatten(2)
        return F.linear(out, self.t[f"{self.b}self_attn.out_proj.weight"])

    def dynamics(self, h, v):
        d = f"{self.b}dynamics."
        hidden = F.silu(F.linear(torch.cat([h, v], -1), self.t[f"{d}controller.0.weight"],
                                 self.t[f"{d}controller.0.bias"]))  # fmt: skip
        alpha, beta, gate = F.linear(hidden, self.t[f"{d}controller.2.weight"],
                                     self.t[f"{d}controller.2.bias"]).chunk(3, dim=-1)  # fmt: skip
        v = alpha.sigmoid() * v - F.softplus(beta).clamp(max=2) * (h - self.t[f"{d}mu"])
        v = v.clamp(-10, 10)
        return h + 0.1 * gate.sigmoid() * v, v

    def last(self, x, c):
        linear = F.linear(F.silu(c), self.t["final_layer.adaLN_modulation.1.weight"],
                          self.t["final_layer.adaLN_modulation.1.bias"])  # fmt: skip
        shift, scale = linear.chunk(2, dim=-1)
        x = self.norm(x, "final_layer.norm.weight") * (1 + scale[:, None]) + shift[:, None]
        x = F.linear(x, self.t["final_layer.linear.weight"], self.t["final_layer.linear.bias"])
        x = x.view(len(x), GRID, GRID, PATCH, PATCH, C)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), C, GRID * PATCH, GRID * PATCH)


@torch.no_grad()
def test_each_part_computes_the_same_as_in_the_source():
    tensors = checkpoint(routed=False)
    source, network = Source(tensors), from_state_dict(tensors).network.double()
    block = network.blocks[1]
    draw = torch.Generator().manual_seed(1)
    picture = torch.randn(2, C, GRID * PATCH, GRID * PATCH, generator=draw).double()
    x = torch.randn(2, GRID * GRID, D, generator=draw).double()
    c, v = torch.randn(2, D, generator=draw).double(), torch.randn(x.shape, generator=draw).double()

    embed = F.conv2d(picture, source.t["patch_embed.proj.weight"],
                     source.t["patch_embed.proj.bias"], stride=PATCH)  # fmt: skip
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)  # weights are fp32
    close(network.patch_embed(patchify(picture, PATCH)), embed.flatten(2).transpose(1, 2))

    chunks = block.adaln(F.silu(c)).chunk(6, dim=-1)
    for which, norm in enumerate((block.norm1, block.norm2)):
        shift, scale, gate = chunks[3 * which : 3 * which + 3]
        expected, expected_gate = source.modulated(x, c, which)
        close(norm(x, shift, scale), expected)
        close(gate, expected_gate)

    cos, sin = rotary_2d(GRID, GRID, E, theta=network.config.rope_theta)
    close(block.attn(x, cos, sin), source.attention(x))
    for actual, expected in zip(block.dynamics(x, v), source.dynamics(x, v), strict=True):
        close(actual, expected)
    gate, up, down = (source.t[f"blocks.1.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    close(block.mlp(x), F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))

    shift, scale = network.adaln_out(F.silu(c)).chunk(2, dim=-1)
    last = unpatchify(network.proj_out(network.norm_out(x, shift, scale)), PATCH, GRID, GRID)
    close(last, source.last(x, c))


def test_every_tensor_is_converted_or_reported():
    for routed in (True, False):
        tensors = checkpoint(routed)
        done = from_state_dict(tensors)
        used = {source for sources in done.taken.values() for source in sources}
        assert used.isdisjoint(done.left_out)
        assert used | set(done.left_out) == set(tensors)
        parameters = {name for name, _ in done.network.named_parameters()}
        assert set(done.taken) | set(done.fresh) == parameters
        assert "no counterpart was found" not in done.fresh.values()
        assert any(".mlp." in name for name in done.fresh) == routed
        assert done.left_out["blocks.0.self_attn.mu_to_q.weight"].startswith("mu is not passed")
    strange = from_state_dict(tensors | {"surprise": torch.zeros(1)})
    assert strange.left_out["surprise"] == "the checkpoint has another layout"


def test_training_starts_from_the_written_folder(tmp_path, capsys):
    save_file(checkpoint(), tmp_path / "source.safetensors")
    run(["convert", str(tmp_path / "source.safetensors"), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    for words in ("left out: t_embed.mlp.0.bias and 3 more", "--model.dynamics_placement stream",
                  "rope_theta: 10000.0", "experts", "prediction_type epsilon"):  # fmt: skip
        assert words in text
    pipe = ComplexityDiTPipeline.from_pretrained(tmp_path / "out")
    new = ComplexityDiTTransformer2DModel.from_config(
        pipe.transformer.config, label_fields=["style"], num_classes=[3]
    )
    source = load_pipeline(str(tmp_path / "out"))
    start_from(new, source, {"style": ["a", "b", "c"]}, "it")
    weight = pipe.transformer.blocks[1].attn.to_q.weight
    assert torch.equal(new.blocks[1].attn.to_q.weight, weight)
    with pytest.raises(UserError, match="exists"):
        convert(tmp_path / "source.safetensors", tmp_path / "out")


def test_pickles_and_other_layouts_are_refused(tmp_path):
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match="pickles are not loaded"):
        convert(tmp_path / "model.pt", tmp_path / "out")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        convert(tmp_path / "broken.safetensors", tmp_path / "out")
    good = checkpoint()
    for change, words in (
        ({"patch_embed.proj.weight": None}, "not a checkpoint of the research code"),
        ({"blocks.0.self_attn.q_norm.weight": None}, "no QK-norm"),
        ({"blocks.1.dynamics.mu": None}, "has no blocks.1.dynamics.mu"),
        ({"blocks.1.dynamics.mu": torch.zeros(5)}, r"blocks.1.dynamics.mu \(5,\) cannot become"),
    ):
        tensors = {k: v for k, v in (good | change).items() if v is not None}
        with pytest.raises(UserError, match=words):
            from_state_dict(tensors)
    with pytest.raises(UserError, match="8 must be 4: heads are 8 wide"):
        from_state_dict(good, num_attention_heads=8)
