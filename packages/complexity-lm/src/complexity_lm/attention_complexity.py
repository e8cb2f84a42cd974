"""Causal attention of the complexity language model, and its rotary angles.

Shape suffixes: B batch · N new tokens · M all tokens seen · D hidden · H query heads · K key and
value heads · E head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inl_core import RMSNorm, ops

from .configuration_complexity import DeepConfig


def eager_attention(
    module: nn.Module,
    q_BHNE: Tensor,
    k_BKME: Tensor,
    v_BKME: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: softmax(q·kᵀ·scaling + mask)·v, which also gives the weights.

    Args:
        module: The attention layer.
        q_BHNE: Queries.
        k_BKME: Keys; each serves H / K query heads.
        v_BKME: Values.
        attention_mask: Added to the scores, broadcastable to (B, H, N, M).
        scaling: Factor of the scores.
        dropout: Probability to drop a weight.
        **kwargs: Settings of other backends.

    Returns:
        Output (B, N, H, E) and weights (B, H, N, M).
    """
    groups = q_BHNE.shape[1] // k_BKME.shape[1]
    k_BHME = k_BKME.repeat_interleave(groups, dim=1)
    v_BHME = v_BKME.repeat_interleave(groups, dim=1)
    scores_BHNM = (q_BHNE @ k_BHME.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores_BHNM = scores_BHNM + attention_mask
    dtype = torch.float64 if scores_BHNM.dtype == torch.float64 else torch.float32
    weights_BHNM = scores_BHNM.softmax(dim=-1, dtype=dtype).to(q_BHNE.dtype)
    weights_BHNM = F.dropout(weights_BHNM, dropout, module.training)
    return (weights_BHNM @ v_BHME).transpose(1, 2).contiguous(), weights_BHNM


class DeepRotaryEmbedding(nn.Module):
    """Rotary angles of `config.rope_parameters`, of any type that transformers knows."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: DeepConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]  # pyright: ignore
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        start = self.compute_default_rope_parameters
        if self.rope_type != "default":
            start = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = start(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DeepConfig, **kwargs: Any) -> tuple[Tensor, float]:
        """Frequencies theta^(-2i/E) for i = 0 … E/2 - 1, and the scaling 1 of cosines and sines."""
        assert config.head_dim is not None
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0  # pyright: ignore

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, N, E/2) in fp32 of positions (B, N), on the device of `x`."""
        # fp64 keeps q·k a function of the offset alone at large positions; MPS has no fp64.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(x.device, dtype)
        scaling = self.attention_scaling
        return (angles.cos() * scaling).float(), (angles.sin() * scaling).float()

    def _apply(self, fn: Callable, recurse: bool = True) -> "DeepRotaryEmbedding":
        # `model.to(torch.bfloat16)` must move the frequencies but not round them: at position 1000
        # a bf16 frequency is off by whole turns.
        before = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            if getattr(self, name).dtype != exact.dtype:
                setattr(self, name, exact.to(getattr(self, name).device))
        return self


class ComplexityAttention(nn.Module):
    """Causal grouped-query attention; each query and key head is RMS-normalised, then rotated."""

    def __init__(self, config: DeepConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, kv_heads, head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        assert kv_heads is not None
        assert head_dim is not None
        assert config.layer_types is not None
        # The names that transformers' attention backends read.
        self.head_dim = head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = head_dim**-0.5
        self.is_causal = True
        slides = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if slides else None

        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        # `_init_weights` asks for this: it sees one module alone.
        self.o_proj.writes_to_stream = True  # pyright: ignore[reportArgumentType]
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x_BND: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to this and the earlier tokens.

        Args:
            x_BND: Normalised hidden states.
            position_embeddings: Cosines and sines, each (B, N, E/2).
            attention_mask: What the mask function of the backend made; `None` where it needs none.
            past_key_values: Cache that is read and extended.
            **kwargs: Passed on to the backend.

        Returns:
            The output (B, N, D) and, from the eager backend, the weights (B, H, N, M).
        """
        q_BNHE = self.q_proj(x_BND).unflatten(-1, (-1, self.head_dim))
        k_BNKE = self.k_proj(x_BND).unflatten(-1, (-1, self.head_dim))
        v_BKNE = self.v_proj(x_BND).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_BNHE, k_BNKE = ops.qk_norm_rope(
            q_BNHE,
            k_BNKE,
            self.q_norm.weight,
            self.k_norm.weight,
            *position_embeddings,
            eps=self.q_norm.eps,
        )
        q_BHNE, k_BKNE = q_BNHE.transpose(1, 2), k_BNKE.transpose(1, 2)
        if past_key_values is not None:
            k_BKNE, v_BKNE = past_key_values.update(k_BKNE, v_BKNE, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # pyright: ignore[reportArgumentType]
            eager_attention,
        )
        out_BNHE, weights_BHNM = attend(
            self,
            q_BHNE,
            k_BKNE,
            v_BKNE,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out_BNHE.flatten(-2)), weights_BHNM


__all__ = ["ComplexityAttention", "DeepRotaryEmbedding", "eager_attention"]
