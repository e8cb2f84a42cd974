"""ComplexityDiT: a diffusion transformer whose layers carry INL dynamics.

In reading order: sizes and choices, patches, attention, feed-forward, block, model, and the checks
of its config. Shape suffixes: B batch · C channels · Y, X pixels · N tokens (in the middle of the
network the K kept ones, if some are dropped; with a text also the T tokens of it, after those of
the image) · D hidden · H heads · E head width · F label fields.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FasterCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 — looked up here by diffusers
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from complexity_dit.models.adapters import LabelAdapterMixin, LabelTables
from complexity_dit.models.loading import SafeModel
from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS, Carried, LayerState, TokenSubset
from inl_core import (
    INLDynamics,
    INLDynamicsLite,
    LoopedDynamics,
    ModulatedRMSNorm,
    RMSNorm,
    branch_epilogue,
    norm_and_rotate,
    ops,
    rotary_1d,
    rotary_2d,
)
from inl_core.run.json_files import without_retired

MIN_NOISE = 0.02
"""Least noise level at which a network that predicts the clean image is trained and used: its
velocity is divided by the level, which amplifies its errors."""

MAX_LAYERS = 1000
"""Most blocks of a network: a bound for configs that anyone may have written."""

_BACKEND_OF_ENVIRONMENT = "DIFFUSERS_ATTN_BACKEND" in os.environ

RETIRED = {"value_residual": False, "routing": "none", "num_experts": ..., "routing_edges": ...}
"""Config fields of earlier versions, for `without_retired`."""

PLACEMENTS = ("stream", "branch", "force", "force_mlp", "none")
ADAPTIVES = ("token", "channel", "layer", "lite")
NETWORK_OUTPUTS = ("target", "sample")

# name: (hidden_size, num_layers, num_attention_heads). S to XL are the sizes of DiT (Peebles & Xie,
# arXiv 2212.09748); nano to mini are for a CPU.
SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (128, 4, 4),
    "tiny": (192, 6, 6),
    "mini": (256, 8, 8),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}

# Defaults of the dynamics coefficients, per placement. The paper's values suit a layer that
# integrates a stream or a branch; a force must pass the sub-layer output nearly unchanged (dt = 1,
# gate ~ 1).
DYNAMICS_DEFAULTS: dict[str, dict[str, float]] = {
    "stream": {"alpha": 0.9, "beta": 0.1, "gate": 0.5, "dt": 0.1},
    "branch": {"alpha": 0.9, "beta": 0.1, "gate": 0.5, "dt": 0.1},
    "force": {"alpha": 0.5, "beta": 0.01, "gate": 0.99, "dt": 1.0},
    "force_mlp": {"alpha": 0.5, "beta": 0.01, "gate": 0.99, "dt": 1.0},
}


def patchify(x_BCYX: Tensor, patch: int) -> Tensor:
    """(B, C, Y, X) to (B, N, C * patch * patch), tokens in row-major order."""
    batch, channels, height, width = x_BCYX.shape
    x = x_BCYX.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(x_BND: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x_BND.unflatten(1, (rows, columns)).unflatten(3, (-1, patch, patch))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def canvas_positions(
    rows: int, columns: int, base: int, hidden_size: int, device: torch.device
) -> Tensor:
    """Absolute position embedding, (N, D): fixed sines and cosines of row and column.

    The rotary embedding encodes only distances between tokens; without absolute positions a token
    at the top is the same as one at the bottom. Coordinates are scaled so that every size covers
    the range of the training size (`base` tokens per side).
    """
    rates = 10000.0 ** (-torch.arange(hidden_size // 4, device=device) * 4 / hidden_size)
    tables = []
    for count in (rows, columns):
        angles = ((torch.arange(count, device=device) + 0.5) * (base / count))[:, None] * rates
        tables.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    y_ND = tables[0].repeat_interleave(columns, dim=0)
    x_ND = tables[1].repeat(rows, 1)
    return torch.cat([y_ND, x_ND], dim=-1)


class ComplexityDiTAttnProcessor:
    """Self-attention with QK-norm and rotary embedding, on the backend that is set."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ComplexityDiTAttention",
        x_BND: Tensor,
        cos_NE: Tensor,
        sin_NE: Tensor,
        mask_BN: Tensor | None = None,
    ) -> Tensor:
        mask = None if mask_BN is None else mask_BN[:, None, None]
        q_BNHE = attn.to_q(x_BND).unflatten(-1, (attn.heads, attn.head_dim))
        k_BNHE = attn.to_k(x_BND).unflatten(-1, (attn.kv_heads, attn.head_dim))
        v_BNHE = attn.to_v(x_BND).unflatten(-1, (attn.kv_heads, attn.head_dim))
        q_BNHE, k_BNHE = norm_and_rotate(q_BNHE, k_BNHE, attn.norm_q, attn.norm_k, cos_NE, sin_NE)
        if self._backend_is_named():
            out_BNHE = dispatch_attention_fn(
                q_BNHE,
                k_BNHE,
                v_BNHE,
                attn_mask=mask,
                enable_gqa=attn.kv_heads != attn.heads,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        else:
            out_BHNE = ops.attention(
                q_BNHE.transpose(1, 2), k_BNHE.transpose(1, 2), v_BNHE.transpose(1, 2), mask
            )
            out_BNHE = out_BHNE.transpose(1, 2)
        return attn.to_out[0](out_BNHE.flatten(-2))

    def _backend_is_named(self) -> bool:
        """Whether the user chose a backend of diffusers: per model, in a context, or by variable.

        diffusers' own default, torch's attention, is the one that `ops.attention` stands in for.
        """
        if self._attention_backend is not None or self._parallel_config is not None:
            return True
        active, _ = _AttentionBackendRegistry.get_active_backend()
        return _BACKEND_OF_ENVIRONMENT or active != AttentionBackendName.NATIVE


class ComplexityDiTAttention(nn.Module, AttentionModuleMixin):
    """Grouped-query self-attention with RMS-normalised queries and keys."""

    _default_processor_cls = ComplexityDiTAttnProcessor
    _available_processors: ClassVar[list] = [ComplexityDiTAttnProcessor]
    _supports_qkv_fusion = False
    processor: ComplexityDiTAttnProcessor
    is_cross_attention = False  # read by the caches of diffusers

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden_size // heads
        self.to_q = nn.Linear(hidden_size, heads * self.head_dim, bias=False)
        self.to_k = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.to_v = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=False)])
        self.norm_q = RMSNorm(self.head_dim, eps=eps)
        self.norm_k = RMSNorm(self.head_dim, eps=eps)
        self.set_processor(ComplexityDiTAttnProcessor())

    def forward(
        self, x_BND: Tensor, cos_NE: Tensor, sin_NE: Tensor, mask_BN: Tensor | None = None
    ) -> Tensor:
        """Return the output, (B, N, D); tokens where the mask is False are not attended to."""
        return self.processor(self, x_BND, cos_NE, sin_NE, mask_BN)


def swiglu_width(hidden_size: int, mlp_ratio: float) -> int:
    """Inner width of the SwiGLU MLP, ``mlp_ratio * hidden_size`` rounded up to a multiple of 64."""
    return -(-int(hidden_size * mlp_ratio) // 64) * 64


def build_dynamics(config: Mapping[str, Any]) -> INLDynamics | INLDynamicsLite:
    """One dynamics layer from the model's config."""
    defaults = DYNAMICS_DEFAULTS[config["dynamics_placement"]]
    alpha, beta, gate, dt = (
        defaults[key] if config[f"dynamics_{key}"] is None else config[f"dynamics_{key}"]
        for key in ("alpha", "beta", "gate", "dt")
    )
    bounds = {name: config[f"dynamics_{name}"] for name in ("velocity_max", "mu_min", "mu_max")}
    # The controller draws random numbers. Forking leaves the outer random stream as it is in a
    # model without dynamics, so that all placements share the same backbone initialisation.
    with torch.random.fork_rng(devices=[]):
        if config["dynamics_adaptive"] == "lite":
            return INLDynamicsLite(config["hidden_size"], alpha, beta, gate, dt, **bounds)
        bounds |= {
            n: config[f"dynamics_{n}"] for n in ("beta_max", "adaptive", "controller_hidden")
        }
        start = {"init_alpha": alpha, "init_beta": beta, "init_gate": gate}
        return INLDynamics(config["hidden_size"], **start, dt=dt, **bounds)


class ComplexityDiTFeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, inner_size, bias=False)
        self.up = nn.Linear(hidden_size, inner_size, bias=False)
        self.down = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x_BND), self.up(x_BND)))


class ComplexityDiTBlock(nn.Module):
    """AdaLN-Zero block with second-order dynamics.

    The placement decides what the dynamics integrate: the residual stream after the MLP (`stream`),
    the attention output (`branch`), or position and velocity under the sub-layer outputs as an
    external force (`force`: attention and MLP; `force_mlp`: the MLP only). `none` has no dynamics.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden_size, eps = config["hidden_size"], config["norm_eps"]
        heads = config["num_attention_heads"]
        self.placement = config["dynamics_placement"]
        self.velocity_norm_eps = eps if config["dynamics_velocity_norm"] else None
        self.norm1 = ModulatedRMSNorm(hidden_size, eps=eps)
        self.attn = ComplexityDiTAttention(
            hidden_size, heads, config["num_key_value_heads"] or heads, eps
        )
        self.norm2 = ModulatedRMSNorm(hidden_size, eps=eps)
        inner = swiglu_width(hidden_size, config["mlp_ratio"])
        self.mlp = ComplexityDiTFeedForward(hidden_size, inner)
        self.adaln = nn.Linear(hidden_size, 6 * hidden_size)
        if self.placement != "none":
            self.dynamics = build_dynamics(config)
        if self.placement == "force":
            self.dynamics_mlp = build_dynamics(config)

    def forward(
        self,
        hidden_states: Tensor,
        v_BND: Tensor | None,
        c_BD: Tensor,
        cos_NE: Tensor,
        sin_NE: Tensor,
        mask_BN: Tensor | None = None,
        carried: Carried | None = None,
    ) -> LayerState | Tensor:
        """Map hidden state and velocity to those after this block.

        The velocity is None in the first block and without dynamics. `c_BD` is the activated
        condition (time, labels and text); the rotary tables are (B, N, E) if each image keeps its
        own subset of tokens. Tokens where the mask is False are not attended to. With `carried`,
        the velocity is read from it and written into it, and the hidden state alone is returned.
        """
        h_BND = hidden_states
        if carried is not None:
            v_BND = carried.velocity
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c_BD).chunk(6, dim=-1)

        normed_BND = self.norm1(h_BND, shift1, scale1)
        branch_BND = self.attn(normed_BND, cos_NE, sin_NE, mask_BN)
        # The residual sum is fused with the norm after it, and with the dynamics step of a branch.
        conditions, eps = (gate1, shift2, scale2), self.norm2.eps
        if self.placement == "force":
            h_BND, v_BND = self._pushed(self.dynamics, h_BND, v_BND, branch_BND, gate1)
            normed_BND = self.norm2(h_BND, shift2, scale2)
        elif self.placement == "branch":
            normed_BND, h_BND, v_BND = branch_epilogue(
                self.dynamics, branch_BND, v_BND, h_BND, conditions, eps=eps
            )
        else:
            normed_BND, h_BND = ops.gated_residual_norm(h_BND, branch_BND, *conditions, eps=eps)

        branch_BND = self.mlp(normed_BND)
        if self.placement in ("force", "force_mlp"):
            dynamics = self.dynamics if self.placement == "force_mlp" else self.dynamics_mlp
            h_BND, v_BND = self._pushed(dynamics, h_BND, v_BND, branch_BND, gate2)
        else:
            h_BND = ops.gated_residual(h_BND, branch_BND, gate2)
            if self.placement == "stream":
                h_BND, v_BND = self.dynamics(h_BND, v_BND)
        if carried is not None:
            carried.velocity = v_BND
            return h_BND
        return h_BND, v_BND

    def _pushed(
        self,
        dynamics: nn.Module,
        h_BND: Tensor,
        v_BND: Tensor | None,
        branch_BND: Tensor,
        gate_BD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One step of the dynamics with the sub-layer output as the force f of equation (2)."""
        if v_BND is not None and self.velocity_norm_eps is not None:
            v_BND = ops.rms_norm(v_BND, None, self.velocity_norm_eps)
        return dynamics(h_BND, v_BND, force=gate_BD[:, None] * branch_BND)


@dataclass
class ComplexityDiTOutput(Transformer2DModelOutput):
    """The output of the network; `auxiliary` is None unless it was asked for.

    Args:
        sample: Prediction of the last block, (B, out_channels, Y, X).
        auxiliary: That of block `auxiliary_layer`, likewise.
    """

    auxiliary: Tensor | None = None


class ComplexityDiTTransformer2DModel(
    LabelAdapterMixin, SafeModel, ConfigMixin, AttentionMixin, CacheMixin
):
    """A diffusion transformer over patches with INL dynamics in every block.

    The condition is the sum of a timestep embedding and one embedding per label field. Each field's
    table has one row more than labels, the *null row*, which means "not given" (missing in the
    data, dropped for guidance, or not requested).

    A network with `caption_channels` also reads a text, as the hidden states of a text encoder. Its
    tokens join those of the image in one sequence, and their mean joins the condition. A learned
    token, the *null text*, stands for an empty one.

    Args:
        sample_size: Default height and width of the input, in pixels or latent cells.
        patch_size: Side of a square patch; one patch is one token.
        in_channels: Channels of the input.
        out_channels: Channels of the output; None means `in_channels`.
        hidden_size: Width of a token.
        num_layers: Number of blocks.
        num_attention_heads: Attention heads; must divide `hidden_size`, head width a multiple of 4.
        num_key_value_heads: Heads of keys and values (GQA); None means as many as query heads.
        mlp_ratio: Inner width of the SwiGLU over `hidden_size`, rounded up to a multiple of 64.
        label_fields: Names of the label fields, e.g. `["style", "genre"]`; the order is that of the
            columns of `class_labels` (two lists, because diffusers sorts the keys of a dict).
        num_classes: Number of labels of each field, without the null row, e.g. `[8, 10]`.
        norm_eps: Epsilon of every RMS norm.
        rope_theta: Base of the rotary frequencies.
        dynamics_placement: `stream`, `branch`, `force`, `force_mlp` or `none`.
        dynamics_adaptive: Coefficients per `token`, `channel` or `layer`, or fixed (`lite`).
        dynamics_alpha: Initial inertia; None means the placement's default (`DYNAMICS_DEFAULTS`).
        dynamics_beta: Initial correction, likewise.
        dynamics_gate: Initial gate, likewise.
        dynamics_dt: Integration step, likewise.
        dynamics_controller_hidden: Width of the token controller.
        dynamics_beta_max: Upper bound of beta; None switches it off.
        dynamics_velocity_max: Bound of the velocity; None switches it off.
        dynamics_mu_min: Lower bound of the equilibrium; None switches it off.
        dynamics_mu_max: Upper bound of the equilibrium; None switches it off.
        dynamics_velocity_norm: `force` and `force_mlp` only: RMS-normalise the incoming velocity.
        network_output: What the last layer predicts: `target` is the objective's target itself;
            `sample` (flow matching only) is the clean image x, and the model returns the velocity
            (x_t - x) / t towards it (x-prediction; Li & He, arXiv 2511.13720), which is easier for
            a small network because images lie on a low-dimensional manifold and noise does not.
        token_drop_start: First of the middle blocks, which dropped tokens bypass when `forward` is
            given `kept_tokens`; None means block 1, the second.
        token_drop_end: The block where dropped tokens rejoin; None means the last one.
        auxiliary_layer: Number of blocks after which a second output layer predicts the same
            target, for internal guidance (arXiv 2512.24176); 0 is none. Take the first third of
            the depth: in the second half it harms.
        num_loops: How often the blocks `loop_start` to `loop_end` - 1 are applied, with the same
            weights, where a call gives no other number. 1 is the plain stack.
        loop_start: First block of the loop. None means no loop if `num_loops` is 1, otherwise the
            second block (the first if there are fewer than three).
        loop_end: The block after the last one of the loop, likewise; None leaves the last block
            outside (no block if there are fewer than three).
        loop_dynamics: Whether the loop carries a velocity from one repetition to the next
            (`inl_core.LoopedDynamics`), with the input of the loop as its equilibrium.
        loop_alpha: Initial inertia of that velocity, in [0, 1]; 0 starts as the plain loop.
        loop_spring: Whether a learned spring pulls the loop towards its input as well. It costs
            accuracy beyond the repetitions of the training (docs/results/tables/loops.md).
        loop_tolerance: Outside of training an image stops where its velocity, and the change of
            it, is at most this share of its position, and the loop ends when all have stopped;
            None computes all repetitions. Needs `loop_dynamics`.
        caption_channels: Width of the hidden states of the text encoder; 0 is a network without.

    Raises:
        ValueError: If sizes do not fit each other or a name is unknown.
    """

    shim: ClassVar[str] = "modeling_complexity_dit"
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ComplexityDiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["ComplexityDiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "patch_embed", "norm", "dynamics", "label_embed", "caption",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        out_channels: int | None = None,
        hidden_size: int = 192,
        num_layers: int = 6,
        num_attention_heads: int = 6,
        num_key_value_heads: int | None = None,
        mlp_ratio: float = 8 / 3,
        label_fields: Sequence[str] = (),
        num_classes: Sequence[int] = (),
        norm_eps: float = 1e-6,
        rope_theta: float = 100.0,
        dynamics_placement: str = "branch",
        dynamics_adaptive: str = "token",
        dynamics_alpha: float | None = None,
        dynamics_beta: float | None = None,
        dynamics_gate: float | None = None,
        dynamics_dt: float | None = None,
        dynamics_controller_hidden: int = 64,
        dynamics_beta_max: float | None = 2.0,
        dynamics_velocity_max: float | None = 10.0,
        dynamics_mu_min: float | None = 0.0,
        dynamics_mu_max: float | None = 2.0,
        dynamics_velocity_norm: bool = False,
        network_output: str = "target",
        token_drop_start: int | None = None,
        token_drop_end: int | None = None,
        auxiliary_layer: int = 0,
        num_loops: int = 1,
        loop_start: int | None = None,
        loop_end: int | None = None,
        loop_dynamics: bool = True,
        loop_alpha: float = 0.5,
        loop_spring: bool = False,
        loop_tolerance: float | None = None,
        caption_channels: int = 0,
    ) -> None:
        super().__init__()
        config = self.config
        check_config(config)
        patch_dim = patch_size * patch_size

        self.patch_embed = nn.Linear(in_channels * patch_dim, hidden_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, hidden_size)
        # The last row of each table is the null row.
        self.label_embed = LabelTables(
            {
                field: nn.Embedding(count + 1, hidden_size)
                for field, count in zip(label_fields, num_classes, strict=True)
            }
        )
        self.blocks = nn.ModuleList([ComplexityDiTBlock(config) for _ in range(num_layers)])
        if loop_dynamics and looped_blocks(config):
            self.dynamics_loop = LoopedDynamics(
                hidden_size, loop_alpha, velocity_max=dynamics_velocity_max, spring=loop_spring,
                beta_max=dynamics_beta_max,
            )  # fmt: skip
        self.norm_out = ModulatedRMSNorm(hidden_size, eps=norm_eps)
        self.adaln_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, (out_channels or in_channels) * patch_dim)
        if auxiliary_layer:
            # Forked, and the last below, so that the rest starts as it does without.
            with torch.random.fork_rng(devices=[]):
                self.norm_out_aux = ModulatedRMSNorm(hidden_size, eps=norm_eps)
                self.adaln_out_aux = nn.Linear(hidden_size, 2 * hidden_size)
                self.proj_out_aux = nn.Linear(hidden_size, self.proj_out.out_features)
        if caption_channels:
            with torch.random.fork_rng(devices=[]):
                # Encoders differ in the scale of their hidden states.
                self.caption_norm = RMSNorm(caption_channels, eps=norm_eps)
                self.caption_embed = nn.Linear(caption_channels, hidden_size)
                self.caption_null = nn.Embedding(1, hidden_size)
                self.caption_pool = nn.Linear(hidden_size, hidden_size)

        self.gradient_checkpointing = False
        self._init_weights()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As in diffusers; configs of earlier versions have fields that this one does not."""
        return super().extract_init_dict(without_retired(config_dict, RETIRED), **kwargs)

    def _init_weights(self) -> None:
        """AdaLN-Zero: each block starts as the identity, and the output at zero.

        Dynamics keep the values that `inl_core` initialised them with.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        outputs = [self.adaln_out, self.proj_out]
        if self.config.auxiliary_layer:
            outputs += [self.adaln_out_aux, self.proj_out_aux]
        for zero in [block.adaln for block in self.blocks] + outputs:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    @classmethod
    def from_size(cls, name: str, **overrides: Any) -> "ComplexityDiTTransformer2DModel":
        """Build a model of a named size (a row of `SIZES`), with any config field overridden.

        Raises:
            ValueError: If the size is unknown; the message lists the names.
        """
        if name not in SIZES:
            raise ValueError(f"unknown size {name!r}; sizes are {', '.join(SIZES)}")
        names = ("hidden_size", "num_layers", "num_attention_heads")
        return cls(**(dict(zip(names, SIZES[name], strict=True)) | overrides))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | Sequence[Any] | None = None,
        kept_tokens: Tensor | None = None,
        label_embeds: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        return_auxiliary: bool = False,
        num_loops: int | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> ComplexityDiTOutput | tuple[Tensor, ...]:
        """Predict the target of the objective (flow velocity, noise, or v) for a noisy input.

        Args:
            hidden_states: Noisy images or latents, (B, C, Y, X); Y and X divisible by the patch.
            timestep: Noise level in [0, 1000], (B,) or a scalar tensor, as in diffusers'
                schedulers (flow matching: 1000 times sigma).
            class_labels: Label ids, (B, F) in the order of `label_fields` ((B,) for one field), as
                a tensor or a list; -1 means missing. None means that all are missing.
            kept_tokens: For training: indices of the tokens, (B, K) int64 and ascending, that go
                through the middle blocks; the others bypass them. None keeps all.
            label_embeds: Label embeddings, (B, D), as `embed_labels` returns them, or a blend of
                several; in place of ids.
            return_dict: False returns a plain tuple.
            attention_kwargs: `{"scale": s}` multiplies the strength of the adapters in this call.
            return_auxiliary: Also return the prediction of block `auxiliary_layer`.
            num_loops: Repetitions of the loop; None means those of the config.
            encoder_hidden_states: The text, (B, T, caption_channels); None is the null text.
            encoder_attention_mask: True or 1 at the tokens of the text and False or 0 at padding,
                (B, T); a row without tokens is the null text. None means no padding.

        Returns:
            `ComplexityDiTOutput` with `sample` of shape (B, out_channels, Y, X), and `auxiliary`
            of the same shape or None; as a tuple, one tensor or two.

        Raises:
            ValueError: If the size is not divisible by the patch, labels, text or kept tokens have
                the wrong shape, the network reads no text and there is one, tokens are dropped in a
                network without middle blocks, there is no auxiliary output to return, or
                `num_loops` is below 1, or above it in a network without a loop.
        """
        if attention_kwargs is not None:
            if unknown := attention_kwargs.keys() - {"scale"}:
                raise ValueError(f"attention_kwargs has {min(unknown)!r}: only scale is known")
            scale = attention_kwargs.get("scale", 1.0)
            scale_lora_layers(self, scale)
            try:
                return self.forward(
                    hidden_states, timestep, class_labels, kept_tokens, label_embeds, return_dict,
                    return_auxiliary=return_auxiliary, num_loops=num_loops,
                    encoder_hidden_states=encoder_hidden_states,
                    encoder_attention_mask=encoder_attention_mask,
                )  # fmt: skip
            finally:
                unscale_lora_layers(self, scale)
        early = self.config.auxiliary_layer
        if return_auxiliary and not early:
            raise ValueError("this network has no auxiliary output: its auxiliary_layer is 0")
        if class_labels is not None and label_embeds is not None:
            raise ValueError("give class_labels or label_embeds, not both")
        if isinstance(class_labels, list | tuple):
            class_labels = torch.tensor(class_labels, device=hidden_states.device)
        loops = check_num_loops(self.config, num_loops)
        batch, _, height, width = hidden_states.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"input of {height}x{width} must be divisible by patch_size {patch} in both sides"
            )
        rows, columns = height // patch, width // patch

        x_BND = self.patch_embed(patchify(hidden_states, patch))
        x_BND = x_BND + canvas_positions(
            rows, columns, self.config.sample_size // patch, x_BND.shape[-1], x_BND.device
        ).to(x_BND.dtype)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos_NE, sin_NE = rotary_2d(
            rows, columns, head_dim, theta=self.config.rope_theta, device=x_BND.device
        )
        timestep = timestep.expand(batch)
        c_BD = self.time_embed(self.time_proj(timestep).to(hidden_states.dtype))
        labels: Tensor | float | None = label_embeds
        if labels is None:
            labels = self._embed_labels(class_labels, batch, x_BND.device)
        c_BD = c_BD + labels
        tokens, mask_BN = rows * columns, None
        if self.config.caption_channels:
            text_BTD, text_mask_BT, pooled_BD = self._embed_text(
                encoder_hidden_states, encoder_attention_mask, x_BND
            )
            c_BD = c_BD + pooled_BD
            x_BND = torch.cat([x_BND, text_BTD], dim=1)
            mask_BN = nn.functional.pad(text_mask_BT, (tokens, 0), value=True)
            cos_TE, sin_TE = rotary_1d(text_BTD.shape[1], head_dim, device=x_BND.device)
            cos_NE, sin_NE = torch.cat([cos_NE, cos_TE]), torch.cat([sin_NE, sin_TE])
        elif encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError("this network reads no text: its caption_channels is 0")
        c_BD = nn.functional.silu(c_BD)

        state: LayerState = (x_BND, None)
        cuts, subset = {0, early, len(self.blocks)}, None
        if kept_tokens is not None:
            check_bypass(self.config)
            start, end = middle_blocks(self.config)
            cuts |= {start, end}
            TokenSubset(kept_tokens, batch, tokens)  # checks them: the text has no part in it
            text = torch.arange(tokens, x_BND.shape[1], device=kept_tokens.device)
            kept = torch.cat([kept_tokens, text.expand(batch, -1)], dim=1)
            subset = TokenSubset(kept, batch, x_BND.shape[1])
            cos_BKE, sin_BKE = cos_NE[kept], sin_NE[kept]
            mask_BK = None if mask_BN is None else mask_BN.gather(1, kept)
        early_BND = x_BND
        for first, last in itertools.pairwise(sorted(cuts)):
            some = range(first, last)
            if subset is not None and start <= first < end:
                part = subset.take(state)
                part = self._through(some, part, loops, c_BD, cos_BKE, sin_BKE, mask_BK)
                state = subset.put_back(part, state)
            else:
                state = self._through(some, state, loops, c_BD, cos_NE, sin_NE, mask_BN)
            if last == early:
                early_BND = state[0]

        def output(h_BND: Tensor, norm: nn.Module, adaln: nn.Module, proj: nn.Module) -> Tensor:
            shift_BD, scale_BD = adaln(c_BD).chunk(2, dim=-1)
            normed_BND = norm(h_BND[:, :tokens], shift_BD, scale_BD)
            sample = unpatchify(proj(normed_BND), patch, rows, columns)
            if self.config.network_output == "sample":
                sample = velocity_towards(sample, hidden_states, timestep)
            return sample

        found = [output(state[0], self.norm_out, self.adaln_out, self.proj_out)]
        if return_auxiliary:
            second = (self.norm_out_aux, self.adaln_out_aux, self.proj_out_aux)
            found.append(output(early_BND, *second))
        return ComplexityDiTOutput(*found) if return_dict else tuple(found)

    def _embed_text(
        self, states_BTC: Tensor | None, mask_BT: Tensor | None, x_BND: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the text, (B, T, D), where they are, and their part of the condition, (B, D).

        `x_BND` gives batch, dtype and device. A row without tokens gets the null text as its only
        one, padding becomes zero.
        """
        batch, width = len(x_BND), self.config.caption_channels
        if states_BTC is None:
            if mask_BT is not None:
                raise ValueError("encoder_attention_mask needs encoder_hidden_states")
            states_BTC = x_BND.new_zeros(batch, 1, width)
            mask_BT = torch.zeros(batch, 1, dtype=torch.bool, device=x_BND.device)
        shape = tuple(states_BTC.shape)
        if len(shape) != 3 or shape[0] != batch or shape[1] < 1 or shape[2] != width:
            raise ValueError(
                f"encoder_hidden_states of shape {shape} must be ({batch}, T, {width}): a text for "
                "each image, of at least one token, from the encoder that the network was trained "
                "with"
            )
        if mask_BT is None:
            mask_BT = states_BTC.new_ones(shape[:2])
        if tuple(mask_BT.shape) != shape[:2]:
            raise ValueError(
                f"encoder_attention_mask of shape {tuple(mask_BT.shape)} must be {shape[:2]}"
            )
        mask_BT = mask_BT.bool()
        text_BTD = self.caption_embed(self.caption_norm(states_BTC.to(x_BND)))
        is_null_BT = ~mask_BT.any(dim=1, keepdim=True) & (
            torch.arange(shape[1], device=mask_BT.device) == 0
        )
        null_D = self.caption_null(torch.zeros((), dtype=torch.long, device=x_BND.device))
        text_BTD = torch.where(mask_BT[..., None], text_BTD, 0.0)
        text_BTD = torch.where(is_null_BT[..., None], null_D, text_BTD).to(x_BND.dtype)
        mask_BT = mask_BT | is_null_BT
        mean_BD = text_BTD.sum(dim=1) / mask_BT.sum(dim=1, keepdim=True)
        return text_BTD, mask_BT, self.caption_pool(mean_BD.to(x_BND.dtype))

    def _through(
        self, blocks: range, state: LayerState, num_loops: int, *inputs: Tensor | None
    ) -> LayerState:
        """Apply blocks by number; those of the loop, if they are among them, several times."""
        loop = looped_blocks(self.config)
        if not loop or loop[0] not in blocks:
            return self._once(blocks, state, *inputs)
        state = self._once(range(blocks.start, loop.start), state, *inputs)
        state = self._repeat(loop, state, num_loops, *inputs)
        return self._once(range(loop.stop, blocks.stop), state, *inputs)

    def _once(self, blocks: range, state: LayerState, *inputs: Tensor | None) -> LayerState:
        """Apply blocks in turn, with gradient checkpointing if it is enabled."""
        if self.is_cache_enabled:
            h_BND, carried = state[0], Carried(state[1])
            for index in blocks:
                h_BND = self.blocks[index](h_BND, None, *inputs, carried)
            return h_BND, carried.velocity
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        for index in blocks:
            block = self.blocks[index]
            if checkpointing:
                state = self._gradient_checkpointing_func(block, *state, *inputs)  # pyright: ignore
            else:
                state = block(*state, *inputs)
        return state

    def _repeat(
        self, blocks: range, state: LayerState, num_loops: int, *inputs: Tensor | None
    ) -> LayerState:
        """Apply the blocks of the loop.

        Each repetition starts with the position that the one before left, and with the velocity of
        the blocks with which the loop was entered.
        """
        h_BND, v_BND = state

        def force(h_BND: Tensor) -> tuple[Tensor, Tensor | None]:
            next_BND, last_v_BND = self._once(blocks, (h_BND, v_BND), *inputs)
            return next_BND - h_BND.to(next_BND.device), last_v_BND

        if self.config.loop_dynamics:
            tolerance = None if self.training else self.config.loop_tolerance
            end = self.dynamics_loop.loop(force, h_BND, num_loops, tolerance=tolerance)
            return end.h, end.other
        for _ in range(num_loops):
            state = self._once(blocks, (state[0], v_BND), *inputs)
        return state

    def enable_cache(self, config: Any) -> None:
        """As in diffusers: skip work that hardly changes from one denoising step to the next.

        With `FirstBlockCacheConfig` call the model inside `cache_context`, as the pipeline does.
        `FasterCacheConfig` takes a batch of images without labels followed by the same ones with
        them, as the pipeline makes it, and needs `tensor_format="BCHW"`.

        Raises:
            ValueError: Another cache is on, FasterCache would read images in another format, or the
                network repeats blocks: a cache takes every call of a block for the next step.
        """
        if looped_blocks(self.config):
            raise ValueError("this network repeats blocks (loop_start): no cache knows that")
        TransformerBlockRegistry.register(
            ComplexityDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0)
        )
        if isinstance(config, FasterCacheConfig):
            if config.tensor_format != "BCHW" and not config.is_guidance_distilled:
                raise ValueError(f"tensor_format is {config.tensor_format!r}; images are 'BCHW'")
            split = "_unconditional_conditional_input_kwargs_identifiers"
            config = replace(
                config, **{split: (*getattr(config, split), "class_labels", "label_embeds")}
            )
        super().enable_cache(config)

    def embed_labels(self, class_labels: Tensor) -> Tensor:
        """Sum of the embeddings of labels.

        Args:
            class_labels: Label ids, (B, F) as for `forward`; -1 is the null row.

        Returns:
            (B, D), all zeros for a model without label fields.
        """
        batch, device = len(class_labels), class_labels.device
        zeros = torch.zeros(batch, self.config.hidden_size, device=device, dtype=self.dtype)
        # Outside of the forward nothing has moved the tables to the device of the labels, unless
        # a hook does when a table is called; its weights are then on meta in between.
        tables = next(self.label_embed.parameters(), zeros).device
        if tables.type != "meta":
            class_labels = class_labels.to(tables)
        embedded = self._embed_labels(class_labels, batch, class_labels.device)
        return zeros + torch.as_tensor(embedded, device=device)

    def _embed_labels(
        self, class_labels: Tensor | None, batch: int, device: torch.device
    ) -> Tensor | float:
        """As `embed_labels`, but None means all missing, and 0.0 stands for all zeros."""
        fields = len(self.label_embed)
        if class_labels is None:
            class_labels = torch.full((batch, fields), -1, device=device, dtype=torch.long)
        elif class_labels.dim() == 1 and fields == 1:
            class_labels = class_labels[:, None]
        if class_labels.shape != (batch, fields):
            raise ValueError(
                f"class_labels of shape {tuple(class_labels.shape)} must be ({batch}, {fields}): "
                f"one column per label field ({', '.join(self.label_embed) or 'none'})"
            )
        total: Tensor | float = 0.0
        for ids_B, table in zip(class_labels.unbind(1), self.label_embed.values(), strict=True):
            null_row = cast(nn.Embedding, table).num_embeddings - 1
            total = total + table(torch.where(ids_B < 0, null_row, ids_B))
        return total


def velocity_towards(clean: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """The flow velocity from a noisy image straight to a clean one.

    x_t = (1 - t) x + t eps gives dx_t/dt = eps - x = (x_t - x) / t (Li & He, arXiv 2511.13720); t
    is clamped to at least `MIN_NOISE`.
    """
    t = (timestep / NUM_TRAIN_TIMESTEPS).clamp(min=MIN_NOISE).view(-1, 1, 1, 1)
    return (noisy - clean) / t.to(clean)


def middle_blocks(config: Mapping[str, Any]) -> tuple[int, int]:
    """Range (start, end) of the blocks that dropped tokens bypass; empty if start >= end.

    None in the config means all but the first and the last block.
    """
    start, end = config["token_drop_start"], config["token_drop_end"]
    return 1 if start is None else start, config["num_layers"] - 1 if end is None else end


def check_bypass(config: Mapping[str, Any]) -> None:
    """Check that dropped tokens have blocks to bypass, which no loop enters or leaves.

    Raises:
        ValueError: They have not.
    """
    middle, loop = range(*middle_blocks(config)), looped_blocks(config)
    if not middle:
        raise ValueError(
            f"{config['num_layers']} blocks have no middle ones to bypass: use 3 or more, or set "
            "token_drop_start and token_drop_end"
        )
    if len({block in middle for block in loop}) > 1:
        raise ValueError(
            f"the loop over blocks {loop[0]} to {loop[-1]} enters or leaves those that dropped "
            f"tokens bypass, {middle[0]} to {middle[-1]}: set token_drop_start and token_drop_end, "
            "or loop_start and loop_end"
        )


def looped_blocks(config: Mapping[str, Any]) -> range:
    """Numbers of the blocks that are repeated; empty without a loop."""
    start, end, layers = config["loop_start"], config["loop_end"], config["num_layers"]
    if config["num_loops"] == 1 and start is None and end is None:
        return range(0)
    inner = layers > 2
    return range(
        (1 if inner else 0) if start is None else start,
        (layers - 1 if inner else layers) if end is None else end,
    )


def check_num_loops(config: Mapping[str, Any], num_loops: int | None) -> int:
    """The repetitions of a call, by default those of the config.

    Raises:
        ValueError: If the number is below 1, or above it in a network without a loop.
    """
    count = config["num_loops"] if num_loops is None else num_loops
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_loops must be a whole number of at least 1, got {count!r}")
    if count > 1 and not looped_blocks(config):
        raise ValueError(
            f"num_loops {count}: this network has no loop; make it with num_loops above 1 (or "
            "loop_start and loop_end) in its config"
        )
    return count


def check_config(config: Mapping[str, Any]) -> None:
    """Check sizes, names and what depends on them."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
    size, patch = config["sample_size"], config["patch_size"]
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} must be divisible by num_attention_heads {heads}")
    if (hidden // heads) % 4:
        raise ValueError(
            f"head width {hidden // heads} (hidden_size {hidden} / num_attention_heads {heads}) "
            "must be a multiple of 4 for the 2-D rotary embedding"
        )
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} must be divisible by num_key_value_heads {kv_heads}"
        )
    if config["num_layers"] > MAX_LAYERS:
        raise ValueError(f"num_layers {config['num_layers']} must be at most {MAX_LAYERS}")
    if size % patch:
        raise ValueError(f"sample_size {size} must be divisible by patch_size {patch}")
    if not 0 <= config["auxiliary_layer"] < config["num_layers"]:
        raise ValueError(
            f"auxiliary_layer {config['auxiliary_layer']} must be 0 (off) or a number of blocks "
            f"below num_layers {config['num_layers']}, best a third of it"
        )
    for name, choices in (
        ("dynamics_placement", PLACEMENTS),
        ("dynamics_adaptive", ADAPTIVES),
        ("network_output", NETWORK_OUTPUTS),
    ):
        if config[name] not in choices:
            raise ValueError(f"{name} {config[name]!r} must be one of {choices}")
    start, end = middle_blocks(config)
    given = config["token_drop_start"] is not None or config["token_drop_end"] is not None
    if given and not 0 <= start < end <= config["num_layers"]:
        raise ValueError(
            f"token_drop_start {start} and token_drop_end {end} must satisfy 0 <= start < end <= "
            f"num_layers {config['num_layers']}: dropped tokens bypass blocks start to end - 1"
        )
    _check_loop(config)
    if config["caption_channels"] < 0:
        raise ValueError(f"caption_channels {config['caption_channels']} must be at least 0")
    fields, counts = config["label_fields"], config["num_classes"]
    if len(fields) != len(counts) or len(set(fields)) != len(fields):
        raise ValueError(
            f"label_fields {list(fields)} must be distinct names with one entry each in "
            f"num_classes {list(counts)}"
        )
    for field, count in zip(fields, counts, strict=True):
        if not isinstance(field, str) or not field.strip() or not field.isprintable() or count < 1:
            raise ValueError(
                f"label field {field!r}: {count} must be a printable name with at least 1 label"
            )


def _check_loop(config: Mapping[str, Any]) -> None:
    start, end, layers = config["loop_start"], config["loop_end"], config["num_layers"]
    loop = looped_blocks(config)
    given = start is not None or end is not None
    if given and not 0 <= loop.start < loop.stop <= layers:
        raise ValueError(
            f"loop_start {loop.start} and loop_end {loop.stop} must satisfy 0 <= loop_start < "
            f"loop_end <= num_layers {layers}: the loop repeats the blocks loop_start to "
            "loop_end - 1"
        )
    if loop and loop.start < config["auxiliary_layer"] < loop.stop:
        raise ValueError(
            f"auxiliary_layer {config['auxiliary_layer']} is inside the loop over blocks "
            f"{loop.start} to {loop.stop - 1}: set loop_start, or another auxiliary_layer"
        )
    if check_num_loops(config, None) > MAX_LAYERS:
        raise ValueError(f"num_loops {config['num_loops']} must be at most {MAX_LAYERS}")
    if not 0 <= config["loop_alpha"] <= 1:
        raise ValueError(f"loop_alpha {config['loop_alpha']} must be in [0, 1]")
    tolerance = config["loop_tolerance"]
    if tolerance is not None and not (tolerance > 0 and loop and config["loop_dynamics"]):
        raise ValueError(
            f"loop_tolerance {tolerance} must be positive, and needs a loop with loop_dynamics: "
            "the velocity says when to stop"
        )
