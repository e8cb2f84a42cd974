"""Self-attention of the image model, open to diffusers' processors and backends.

Shape suffixes: B batch · N tokens · D hidden · H heads · E head width.
"""

from typing import ClassVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from inl_core import RMSNorm, ops


class ComplexityDiTAttnProcessor:
    """Self-attention: QK-norm and 2-D rotary, then whichever attention backend is set."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ComplexityDiTAttention",
        x_BND: Tensor,
        cos_NE: Tensor,
        sin_NE: Tensor,
        first_BNHE: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q_BNHE = attn.to_q(x_BND).unflatten(-1, (attn.heads, attn.head_dim))
        k_BNHE = attn.to_k(x_BND).unflatten(-1, (attn.kv_heads, attn.head_dim))
        v_BNHE = attn.to_v(x_BND).unflatten(-1, (attn.kv_heads, attn.head_dim))
        if attn.value_mix is not None and first_BNHE is not None:
            v_BNHE = v_BNHE + attn.value_mix.to(v_BNHE.dtype) * (first_BNHE - v_BNHE)
        q_BNHE, k_BNHE = ops.qk_norm_rope(
            q_BNHE, k_BNHE, attn.norm_q.weight, attn.norm_k.weight, cos_NE, sin_NE, attn.norm_q.eps
        )
        out_BNHE = dispatch_attention_fn(
            q_BNHE,
            k_BNHE,
            v_BNHE,
            enable_gqa=attn.kv_heads != attn.heads,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out_BNHE.flatten(-2)), v_BNHE


class ComplexityDiTAttention(nn.Module, AttentionModuleMixin):
    """Grouped-query self-attention with RMS-normalised queries and keys.

    With `mixes_values` the values are (1 - m) V + m V1, V1 those of the first block and m learned,
    0.5 at the start (value residual; Zhou et al., arXiv 2410.17897).
    """

    _default_processor_cls = ComplexityDiTAttnProcessor
    _available_processors: ClassVar[list] = [ComplexityDiTAttnProcessor]
    _supports_qkv_fusion = False
    processor: ComplexityDiTAttnProcessor

    def __init__(
        self, hidden_size: int, heads: int, kv_heads: int, eps: float, mixes_values: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden_size // heads
        self.to_q = nn.Linear(hidden_size, heads * self.head_dim, bias=False)
        self.to_k = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.to_v = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=False)])
        self.norm_q = RMSNorm(self.head_dim, eps=eps)
        self.norm_k = RMSNorm(self.head_dim, eps=eps)
        # Shape (1,), not (): sharding wrappers refuse parameters without a dimension.
        self.value_mix = nn.Parameter(torch.full((1,), 0.5)) if mixes_values else None
        self.set_processor(ComplexityDiTAttnProcessor())

    def forward(
        self,
        x_BND: Tensor,
        cos_NE: Tensor,
        sin_NE: Tensor,
        first_BNHE: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output (B, N, D) and the values that went into it (B, N, H, E)."""
        return self.processor(self, x_BND, cos_NE, sin_NE, first_BNHE)
