"""A checkpoint in the layout of the authors' research code."""

import torch

D, HEADS, KV, PATCH, C, GRID = 32, 4, 2, 2, 4, 3
E = D // HEADS


def checkpoint(routed=True, layers=2):
    """Random tensors under their names."""
    draw = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(*shape, generator=draw) * 0.2

    t = {"patch_embed.proj.weight": r(D, C, PATCH, PATCH), "patch_embed.proj.bias": r(D),
         "t_embed.mlp.0.weight": r(4 * D, D), "t_embed.mlp.0.bias": r(4 * D),
         "t_embed.mlp.2.weight": r(D, 4 * D), "t_embed.mlp.2.bias": r(D),
         "rope.inv_freq": r(E // 4), "null_embedding": r(1, 77, 16),
         "final_layer.norm.weight": 1 + r(D), "final_layer.adaLN_modulation.1.weight": r(2 * D, D),
         "final_layer.adaLN_modulation.1.bias": r(2 * D),
         "final_layer.linear.weight": r(PATCH * PATCH * C, D),
         "final_layer.linear.bias": r(PATCH * PATCH * C)}  # fmt: skip
    for i in range(layers):
        b = f"blocks.{i}."
        for name, rows in (("q", D), ("k", KV * E), ("v", KV * E), ("out", D)):
            t[f"{b}self_attn.{name}_proj.weight"] = r(rows, D)
        for name in "kqv":
            t[f"{b}self_attn.mu_to_{name}.weight"] = r(D if name == "q" else KV * E, D)
        for name in "qk":
            t[f"{b}self_attn.{name}_norm.weight"] = 1 + r(E)
        for name in ("norm1", "norm2", "norm3"):
            t[f"{b}{name}.weight"] = 1 + r(D)
        t[f"{b}norm_context.weight"] = r(16)
        t[f"{b}cross_attn.q_proj.weight"] = r(D, D)
        t[f"{b}dynamics.mu"] = r(D)
        t[f"{b}dynamics.controller.0.weight"] = r(8, 2 * D)
        t[f"{b}dynamics.controller.0.bias"] = r(8)
        t[f"{b}dynamics.controller.2.weight"] = r(3 * D, 8)
        t[f"{b}dynamics.controller.2.bias"] = r(3 * D)
        t[f"{b}dynamics.mu_proj.weight"] = r(D, D)
        t[f"{b}adaLN_modulation.1.weight"] = r(6 * D, D)
        t[f"{b}adaLN_modulation.1.bias"] = r(6 * D)
        if routed:
            t[f"{b}mlp.router.weight"] = r(4, D)
            t[f"{b}mlp.experts_gate.0.weight"] = r(4 * D, D)
        else:
            t[f"{b}mlp.gate_proj.weight"], t[f"{b}mlp.up_proj.weight"] = r(4 * D, D), r(4 * D, D)
            t[f"{b}mlp.down_proj.weight"] = r(D, 4 * D)
    return t
