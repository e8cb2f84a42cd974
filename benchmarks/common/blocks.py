"""A stack of transformer blocks in plain torch and `inl_core`, with dynamics or without.

The blocks are those of the image model (AdaLN-Zero, QK norm, rotary embedding, SwiGLU, dynamics in
placement `branch`) without diffusers, so that they run where only torch is installed.
"""

import torch
from benchmarks.common.timing import training_step
from torch import nn
from torch.nn import functional as F

from inl_core import INLDynamics, INLDynamicsLite, ModulatedRMSNorm, RMSNorm, ops, rotary_2d

KINDS = ("none", "lite", "layer", "channel", "token")
"""Kinds of coefficients of the dynamics; `none` is the plain residual connection."""

SIZES = {
    # width, depth, heads of the published DiT models, at patch 2 on a 32 × 32 latent
    "S/2": (384, 12, 6),
    "B/2": (768, 12, 12),
    "XL/2": (1152, 28, 16),
}


def build_dynamics(kind, width):
    if kind == "none":
        return None
    return INLDynamicsLite(width) if kind == "lite" else INLDynamics(width, adaptive=kind)


class Mlp(nn.Module):
    """Dense SwiGLU."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down(ops.swiglu(self.gate(x), self.up(x)))


class Attention(nn.Module):
    """Self-attention with QK norm and rotary embedding."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x, cos, sin):
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v)
        )
        q, k = ops.qk_norm_rope(
            q, k, self.norm_q.weight, self.norm_k.weight, cos, sin, self.norm_q.eps
        )
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v.to(q.dtype))))
        return self.to_out(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Its matrices are named as those of the image model, by which Muon is given them."""

    def __init__(self, width, heads, kind):
        super().__init__()
        self.adaln = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = ModulatedRMSNorm(width), ModulatedRMSNorm(width)
        self.attn = Attention(width, heads)
        # 8/3 of the width: three matrices with the FLOPs of the two of a plain MLP of ratio 4.
        self.mlp = Mlp(width, -(-8 * width // 3 // 64) * 64)
        self.dynamics = build_dynamics(kind, width)

    def forward(self, h, v, c, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c).chunk(6, dim=-1)
        branch = self.attn(self.norm1(h, shift1, scale1), cos, sin)
        if self.dynamics is not None:
            branch, v = self.dynamics(branch, v)
        h = ops.gated_residual(h, branch, gate1)
        return ops.gated_residual(h, self.mlp(self.norm2(h, shift2, scale2)), gate2), v


class Stack(nn.Module):
    """A sequence of blocks, each compiled; equal blocks share one compilation."""

    def __init__(self, width, depth, heads, kind, side, compiled):
        super().__init__()
        # Built before the dynamics draw random numbers, so all kinds have the same backbone.
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width, heads, "none") for _ in range(depth))
        for block in self.blocks:
            block.dynamics = build_dynamics(kind, width)
        cos, sin = rotary_2d(side, side, width // heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # kinds × first block or not
            for block in self.blocks:
                block.compile(fullgraph=True)

    def forward(self, h, c):
        v = None
        for block in self.blocks:
            h, v = block(h, v, c, self.cos, self.sin)
        return h


def batch_step(model, batch, dtype):
    """A function that trains the stack for one step on one batch."""
    h, c = batch

    def loss():
        with torch.autocast(h.device.type, dtype, enabled=dtype != torch.float32):
            return model(h, c).float().square().mean()

    return training_step(model, loss)
