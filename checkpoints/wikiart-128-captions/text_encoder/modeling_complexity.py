"""The complexity language model: a decoder-only transformer with INL dynamics in its layers.

`DeepForCausalLM` is a transformers model, and so are three heads that classify texts or tokens or
answer questions. Importing this file registers them with transformers. The velocity of the dynamics
is zero for each token at the first layer and is carried through depth only, never from one token to
the next.

Shape suffixes: B batch · N new tokens · M all tokens seen · D hidden · H query heads · K key and
value heads · E head width · V vocabulary; `h_BND` has shape (B, N, D).

A saved model folder contains a copy of this file and of `configuration_complexity.py`, which
transformers finds by the relative import.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.hub import cached_file
from transformers.utils.output_capturing import capture_outputs

from inl_core import (
    INLDynamics,
    INLDynamicsLite,
    LoopedDynamics,
    RMSNorm,
    norm_and_rotate,
    ops,
)
from inl_core.rotary import stored
from inl_core.routing import RoutingPlan, TokenRoutedMLP, build_routing_table, make_routing_plan
from inl_core.run.files import merged_folder
from inl_core.run.hub import download_weights
from inl_core.run.weights import weights_fit
from inl_core.tracing import transformed

from .configuration_complexity import DeepConfig

# Of a model that attends to earlier tokens, and of one that attends to all.
_MASKS = {
    "full_attention": (create_causal_mask, create_bidirectional_mask),
    "sliding_attention": (
        create_sliding_window_causal_mask,
        create_bidirectional_sliding_window_mask,
    ),
}


class DeepRotaryEmbedding(nn.Module):
    """Rotary angles of `config.rope_parameters`, for every RoPE type of transformers."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: DeepConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]  # pyright: ignore
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        initial_parameters = ROPE_INIT_FUNCTIONS | {"default": self.compute_default_rope_parameters}
        inv_freq, self.attention_scaling = initial_parameters[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DeepConfig, **kwargs: Any) -> tuple[Tensor, float]:
        """Frequencies theta^(-2i/E) for i = 0 … E/2 - 1, and a scaling of 1."""
        assert config.head_dim is not None
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0  # pyright: ignore

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, N, E/2) in fp32 for positions (B, N), on the device of `x`."""
        # In fp64, q·k depends on the offset alone at large positions too; MPS has no fp64.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(x.device, dtype)
        scaling = self.attention_scaling
        return stored((angles.cos() * scaling).float()), stored((angles.sin() * scaling).float())

    def _apply(self, fn: Callable, recurse: bool = True) -> "DeepRotaryEmbedding":
        # `model.to(torch.bfloat16)` must move the frequencies without rounding them: at position
        # 1000 a bf16 frequency is off by several full turns.
        before = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            if getattr(self, name).dtype != exact.dtype:
                setattr(self, name, exact.to(getattr(self, name).device))
        return self


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
    """Attention in plain PyTorch, softmax(q·kᵀ·scaling + mask)·v.

    The mask is broadcastable to (B, H, N, M). Returns the output (B, N, H, E) and the weights
    (B, H, N, M). As in transformers, except that fp64 scores stay fp64.
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


def default_attention(
    module: nn.Module,
    q_BHNE: Tensor,
    k_BKME: Tensor,
    v_BKME: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`ops.attention` where it is not torch's own, else the function of transformers.

    Used where the user named no `attn_implementation`. The output is (B, N, H, E).
    """
    causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)
    plain = not any(kwargs.get(name) is not None for name in ("cache", "position_bias", "softcap"))
    # transformers aligns a causal mask of unequal lengths at the first key, `ops.attention` at the
    # last one.
    aligned = not causal or q_BHNE.shape[2] == k_BKME.shape[2]
    if plain and aligned and ops.takes_cpu_attention(q_BHNE, k_BKME, v_BKME, attention_mask):
        out_BHNE = ops.attention(
            q_BHNE, k_BKME, v_BKME, attention_mask, causal=bool(causal), scale=scaling
        )
        return out_BHNE.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module,
        q_BHNE,
        k_BKME,
        v_BKME,
        attention_mask,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


class ComplexityAttention(nn.Module):
    """Grouped-query attention; each query and key head is RMS-normalised, then rotated."""

    def __init__(self, config: DeepConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hidden, heads, kv_heads = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        head_dim, layer_types = config.head_dim, config.layer_types
        assert kv_heads and head_dim and layer_types  # noqa: PT018
        # The attention backends of transformers read these names.
        self.head_dim = head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = head_dim**-0.5
        slides = layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if slides else None

        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        # Read by `_init_weights`, which gets single modules without their names.
        self.o_proj.writes_to_stream = True  # pyright: ignore[reportArgumentType]
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)

    @property
    def is_causal(self) -> bool:
        return not self.config.use_bidirectional_attention

    def forward(
        self,
        x_BND: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the current and all earlier tokens, or to all of the text.

        `position_embeddings` are cosines and sines (B, N, E/2); mask and `kwargs` are those of the
        attention backend. Returns the output (B, N, D) and, from the eager backend, the weights.
        """
        q_BNHE = self.q_proj(x_BND).unflatten(-1, (-1, self.head_dim))
        k_BNKE = self.k_proj(x_BND).unflatten(-1, (-1, self.head_dim))
        v_BKNE = self.v_proj(x_BND).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_BNHE, k_BNKE = norm_and_rotate(
            q_BNHE, k_BNKE, self.q_norm, self.k_norm, *position_embeddings
        )
        q_BHNE, k_BKNE = q_BNHE.transpose(1, 2), k_BNKE.transpose(1, 2)
        if past_key_values is not None:
            k_BKNE, v_BKNE = past_key_values.update(k_BKNE, v_BKNE, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # pyright: ignore[reportArgumentType]
            eager_attention,
        )
        if attend is sdpa_attention_forward and not self.config.attention_is_named:
            attend = default_attention
        out_BNHE, weights_BHNM = attend(
            self, q_BHNE, k_BKNE, v_BKNE, attention_mask,
            dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(out_BNHE.flatten(-2)), weights_BHNM


class DeepMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.down_proj.writes_to_stream = True  # pyright: ignore[reportArgumentType]

    def forward(self, x_BND: Tensor) -> Tensor:
        """Transform each token of (B, N, D) independently."""
        return self.down_proj(ops.swiglu(self.gate_proj(x_BND), self.up_proj(x_BND)))


@contextmanager
def _own_random_stream() -> Iterator[None]:
    """Keep random numbers drawn inside from moving the generators outside.

    A model with dynamics and one without thus start from the same backbone. The inner stream gets
    a seed of its own: a plain fork would repeat the numbers of the next matrix outside.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        draw = torch.randint(2**62, (), device="cpu")
        seed = int(draw) if type(draw) is Tensor else 0  # one of FakeTensorMode has no value
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def _build_dynamics(config: DeepConfig) -> INLDynamics | INLDynamicsLite:
    def settings(*names: str) -> dict[str, Any]:
        return {name: getattr(config, f"dynamics_{name}") for name in names}

    coefficients = settings("alpha", "beta", "gate", "dt").values()
    bounds = settings("velocity_max", "mu_min", "mu_max")
    with _own_random_stream():
        if config.dynamics_adaptive == "lite":
            return INLDynamicsLite(config.hidden_size, *coefficients, **bounds)
        more = settings("beta_max", "adaptive", "controller_hidden")
        return INLDynamics(config.hidden_size, *coefficients, **bounds, **more)


class DeepDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP on a residual stream, with INL dynamics where the config places them.

    ========  ====================================================================================
    stream    h += attn(norm h);  h += mlp(norm h);  (h, v) = INL(h, v)
    branch    a = attn(norm h);  (a, v) = INL(a, v);  h += a;  h += mlp(norm h)
    force     (h, v) = INL(h, v, force = attn(norm h));  (h, v) = INL'(h, v, force = mlp(norm h))
    force_mlp h += attn(norm h);  (h, v) = INL(h, v, force = mlp(norm h))
    none      h += attn(norm h);  h += mlp(norm h)
    ========  ====================================================================================
    """

    def __init__(self, config: DeepConfig, layer_idx: int) -> None:
        super().__init__()
        self.placement = config.dynamics_placement
        self.velocity_norm_eps = config.rms_norm_eps if config.dynamics_velocity_norm else None
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = ComplexityAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.num_experts == 0:
            self.mlp = DeepMLP(config.hidden_size, config.intermediate_size)
        else:
            assert config.expert_intermediate_size is not None
            self.mlp = TokenRoutedMLP(
                config.hidden_size, config.expert_intermediate_size, config.num_experts,
                config.shared_intermediate_size,
            )  # fmt: skip
        if self.placement != "none":
            self.dynamics = _build_dynamics(config)
        if self.placement == "force":
            self.dynamics_mlp = _build_dynamics(config)

    def forward(
        self,
        h_BND: Tensor,
        v_BND: Tensor | None = None,
        plan: RoutingPlan | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next hidden states ("position") and velocity; `None` is a zero velocity.

        `plan` assigns tokens to experts; `None` with the dense MLP. `kwargs` are for the attention.
        """
        branch_BND, _ = self.self_attn(self.input_layernorm(h_BND), **kwargs)
        if self.placement == "force":
            h_BND, v_BND = self._push(self.dynamics, h_BND, v_BND, branch_BND)
        else:
            if self.placement == "branch":
                branch_BND, v_BND = self.dynamics(branch_BND, v_BND)
            h_BND = h_BND + branch_BND

        x_BND = self.post_attention_layernorm(h_BND)
        branch_BND = self.mlp(x_BND) if plan is None else self.mlp(x_BND, plan)
        if self.placement in ("force", "force_mlp"):
            dynamics = self.dynamics if self.placement == "force_mlp" else self.dynamics_mlp
            return self._push(dynamics, h_BND, v_BND, branch_BND)
        h_BND = h_BND + branch_BND
        if self.placement == "stream":
            h_BND, v_BND = self.dynamics(h_BND, v_BND)
        return h_BND, v_BND

    def _push(
        self, dynamics: nn.Module, h_BND: Tensor, v_BND: Tensor | None, force_BND: Tensor
    ) -> tuple[Tensor, Tensor]:
        if v_BND is not None and self.velocity_norm_eps is not None:
            v_BND = ops.rms_norm(v_BND, None, self.velocity_norm_eps)
        return dynamics(h_BND, v_BND, force=force_BND)


def _check_size(source: Any, options: dict[str, Any]) -> None:
    """Look at a folder, or a Hub id whose safetensors it downloads, as `from_pretrained` finds it.

    Without a config or safetensors there (an adapter, another format) transformers says the rest.
    """
    names = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
    given = {name: options[name] for name in names if options.get(name) is not None}
    path = cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **given)
    if path is None:
        return
    if not Path(source).is_dir():
        download_weights(source, options)
        options["force_download"] = False  # they are new
    weights_fit(Path(path).parent, lambda config: DeepModel(DeepConfig.from_dict(config)))


class DeepPreTrainedModel(PreTrainedModel):
    """Base of all models of this file: initial weights, saving, loading, the routing table."""

    config: DeepConfig
    config_class = DeepConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepDecoderLayer"]  # noqa: RUF012 — transformers' way to declare these
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepDecoderLayer,
        "attentions": ComplexityAttention,
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the config is compared with the weights before a network is built.

        Raises:
            UserError: The config of the folder or Hub id describes more than its weights can fill.
        """
        if pretrained_model_name_or_path is not None:
            _check_size(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """As in transformers; notes in the config whether the user named the implementation.

        The base model inside another one is built with a config that is resolved already.
        """
        named = self.config.attention_is_named
        if requested_attention is None:
            named = False
        elif named is None or not is_init_check:
            named = True
        self.config.attention_is_named = named
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, also for the implementation that is in use."""
        super().set_attn_implementation(*args, **kwargs)
        self.config.attention_is_named = True

    @wraps(PreTrainedModel.save_pretrained, assigned=())  # diffusers reads the signature
    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; the files replace those of a folder together, see `merged_folder`.

        The config of the folder names every model of this file, so that each Auto class loads it,
        and has `use_cache` on: Trainer switches it off in the model that it trains.
        """
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        # Several processes may call this together, with a share of the weights each: one writes.
        writes = self.should_save_on_this_rank(is_main_process)
        together = writes and not kwargs.get("distributed_checkpoint")
        target = Path(save_directory)
        if type(self).__module__ == __name__:
            file = __name__.rpartition(".")[2]
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = known | {
                auto.__name__: f"{file}.{model.__name__}" for auto, model, _ in _AUTO_CLASSES
            }
        use_cache, self.config.use_cache = self.config.use_cache, True
        try:
            with merged_folder(target) if together else nullcontext(target) as folder:
                super().save_pretrained(folder, is_main_process, *args, **kwargs)
        finally:
            self.config.use_cache = use_cache
        # The folder is complete where this returns.
        self.barrier_after_gathered_checkpoint_save(
            getattr(self.config, "distributed_config", None)
        )

    @classmethod
    def maybe_distribute_model(
        cls, model: nn.Module, distributed_config: Any, mesh_manager: Any
    ) -> nn.Module:
        """As in transformers, for a number of processes by which the heads can be divided.

        Raises:
            ValueError: They cannot be divided.
        """
        size = 1 if mesh_manager is None else distributed_config.tp_size
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(model.config, name)
            if heads % size:
                raise ValueError(
                    f"tp_size {size} must divide {name} {heads}: each process gets whole heads"
                )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the weights of `module` that no checkpoint filled.

        Matrices and the embedding are normal with `initializer_range`; those that write to the
        residual stream are smaller by sqrt(2 · layers), as in GPT-2, so that the variance of the
        stream does not grow with depth; a layer in a loop counts once per repetition. Dynamics
        start at exactly the coefficients of the config.
        """
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.unrolled().num_hidden_layers)
        if isinstance(module, (INLDynamics, INLDynamicsLite, LoopedDynamics)):
            # `reset_parameters` writes through views, which lack transformers' mark of parameters
            # that a checkpoint filled: put those back.
            filled = {
                name: parameter.clone()
                for name, parameter in module.named_parameters(recurse=False)
                if getattr(parameter, "_is_hf_initialized", False)
            }
            with _own_random_stream():
                module.reset_parameters()
            for name, value in filled.items():
                module.get_parameter(name).copy_(value)
        elif isinstance(module, TokenRoutedMLP):
            for name, parameter in module.named_parameters(recurse=False):
                is_down = name in ("down", "shared_down")
                nn.init.normal_(parameter, std=residual_std if is_down else std)
        elif isinstance(table := getattr(module, "routing_table", None), Tensor):
            if getattr(table, "_is_hf_initialized", False):
                return
            if self.config.routing_scheme == "balanced":
                raise ValueError(
                    "a balanced routing table needs the token counts of a corpus: make the model "
                    "with routing_scheme='modulo', then call model.balance_experts(counts)"
                )
            table.copy_(build_routing_table(self.config.vocab_size, self.config.num_experts))
        elif getattr(module, "writes_to_stream", False):
            nn.init.normal_(module.weight, std=residual_std)  # pyright: ignore[reportArgumentType]
        else:
            super()._init_weights(module)

    @staticmethod
    def _load_pretrained_model(
        model: "DeepPreTrainedModel",
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load weights as transformers does, with an error that names tensors of another shape."""
        info, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            name, saved, expected = min(info.mismatched_keys)
            raise RuntimeError(  # as transformers, whose message has no sizes
                f"{len(info.mismatched_keys)} tensors of the checkpoint do not fit the "
                f"configuration, among them {name}: {tuple(saved)} in the checkpoint, "
                f"{tuple(expected)} by the configuration; use the config.json saved with it"
            )
        return info, offloaded

    def balance_experts(self, counts: Tensor | Sequence[float]) -> None:
        """Assign token ids to experts so that each expert gets an equal share of a corpus.

        Call it before training: it changes which expert a token uses.

        Args:
            counts: Occurrences of each token id in the corpus (V,).

        Raises:
            ValueError: The model has no experts, or `counts` does not match its vocabulary.

        Warns:
            UserWarning: One id makes up more than 1 / num_experts of the corpus; the message names
                it.
        """
        table = self.base_model.routing_table
        if not isinstance(table, Tensor):
            raise ValueError("balance_experts needs a model with experts, num_experts is 0")
        size, experts = self.config.vocab_size, self.config.num_experts
        table.copy_(build_routing_table(size, experts, "balanced", counts))
        self.config.routing_scheme = "balanced"

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the size of the vocabulary as in transformers, and of the routing table with it.

        Remaining ids keep their expert; new ids go to expert id modulo `num_experts`.
        """
        embedding = super().resize_token_embeddings(*args, **kwargs)
        table = self.base_model.routing_table
        if isinstance(table, Tensor):
            new = torch.arange(embedding.num_embeddings, device=table.device)
            new = new % self.config.num_experts
            new[: table.shape[0]] = table[: new.shape[0]]
            self.base_model.routing_table = new
        return embedding


class _UnrolledCache:
    """The cache of the unrolled stack, as layers that are applied several times see it.

    A layer has its keys and values `shift` entries behind its own index. `last` has those that each
    layer wrote last.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache, self.shift = cache, 0
        self.last: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k_BKNE: Tensor, v_BKNE: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.last[layer_idx] = k_BKNE, v_BKNE
        return self.cache.update(k_BKNE, v_BKNE, layer_idx + self.shift)


class DeepModel(DeepPreTrainedModel):
    """The decoder without a head: token ids to normalised hidden states.

    With a loop (`config.loop_start`), the layers before it run once, those in it `num_loops` times,
    and those after it once. Each repetition starts with the position that the one before left, and
    with the velocity of the layers with which the loop was entered.

    With experts, `routing_table` (V,) holds the expert of each token id. It is shared by all layers
    and saved with the weights.
    """

    routing_table: Tensor | None

    def __init__(self, config: DeepConfig) -> None:
        super().__init__(config)
        # Where texts are padded with the token that separates them, that token has to learn: a
        # padding index of `nn.Embedding` stays zero and gets no gradient.
        padding, ends = config.pad_token_id, config.eos_token_id
        if padding in (config.bos_token_id, *(ends if isinstance(ends, list) else [ends])):
            padding = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.layers = nn.ModuleList(
            [DeepDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        if config.loop_start is not None and config.loop_dynamics:
            self.dynamics_loop = LoopedDynamics(
                config.hidden_size, config.loop_alpha, spring=config.loop_spring,
                velocity_max=config.dynamics_velocity_max, beta_max=config.dynamics_beta_max,
            )  # fmt: skip
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepRotaryEmbedding(config)
        experts = config.num_experts
        table = build_routing_table(config.vocab_size, experts) if experts else None
        self.register_buffer("routing_table", table)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        routing_ids: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: Token ids (B, N).
            attention_mask: (B, M), 1 at tokens and 0 at padding; `None` means no padding. Also the
                masks by layer type that `generate` prepares.
            position_ids: Positions (B, N); `None` continues from the cache. Without an attention
                mask and a cache, a position that does not follow the one before it begins a new
                document, and attention does not look across: the form of
                `DataCollatorWithFlattening` and TRL's packing.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: Embeddings (B, N, D) instead of `input_ids`.
            routing_ids: Token ids (B, N) that select the experts; `None` means `input_ids`. Fewer
                ids than embeddings belong to the last ones, and those before are virtual tokens, as
                PEFT's prompt tuning puts them there. Unused by a dense model.
            use_cache: Whether to return the cache; `None` means `config.use_cache`.
            num_loops: Repetitions of the loop; `None` means `config.num_loops`. A cache is used
                with the number that it was begun with.
            **kwargs: `output_hidden_states`, `output_attentions`, and settings of the attention
                backend.

        Returns:
            `last_hidden_state` (B, N, D) and, on request, `past_key_values`, `hidden_states` and
            `attentions`.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds` are given, a routed model
                has no ids to route by, or an id is outside the vocabulary (checked in eager mode
                on the CPU only: elsewhere the check would wait for the device); `num_loops` is
                below 1, the model has no loop, or the cache is that of another number; there is a
                cache and the model attends in both directions.
        """
        if self.config.use_bidirectional_attention:
            if past_key_values is not None:
                raise ValueError(
                    "use_bidirectional_attention: the model reads whole texts, it cannot generate"
                )
            use_cache = False
        unrolled = self.config.unrolled(num_loops)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        plan = self._plan(input_ids, routing_ids, inputs_embeds)
        # An empty cache of our own is unknown to the mask: beside a cache, transformers takes all
        # of a row for one document.
        masked_cache = past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=unrolled)
        if self.config.loop_start is not None:
            self._check_cache(past_key_values, unrolled.num_hidden_layers, **kwargs)
        given_positions = position_ids  # others are looked through for the beginnings of documents
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start
            position_ids = position_ids[None]

        masks = attention_mask
        if not isinstance(masks, dict):
            masks = {
                kind: _MASKS[kind][self.config.use_bidirectional_attention](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=masked_cache,
                    position_ids=given_positions,
                )
                for kind in set(self.config.layer_types or [])
            }
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        def through(
            layers: Iterable[int], h_BND: Tensor, v_BND: Tensor | None, cache: Any
        ) -> tuple[Tensor, Tensor | None]:
            assert self.config.layer_types is not None
            for index in layers:
                h_BND, v_BND = self.layers[index](
                    h_BND, v_BND, plan, attention_mask=masks[self.config.layer_types[index]],
                    position_embeddings=position_embeddings, position_ids=position_ids,
                    past_key_values=cache, use_cache=use_cache, **kwargs,
                )  # fmt: skip
            return h_BND, v_BND

        layers, (start, end) = (
            range(len(self.layers)),
            (self.config.loop_start, self.config.loop_end),
        )
        # The velocity starts at None, a zero that costs nothing.
        state = through(layers[:start], inputs_embeds, None, past_key_values)
        if start is not None:
            cache = None if past_key_values is None else _UnrolledCache(past_key_values)
            state = self._repeat(partial(through, layers[start:end]), *state, cache, num_loops)
            state = through(layers[end:], *state, cache)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(state[0]),
            past_key_values=past_key_values if use_cache else None,
        )

    def _repeat(
        self,
        core: Callable[..., tuple[Tensor, Tensor | None]],
        h_BND: Tensor,
        v_BND: Tensor | None,
        cache: _UnrolledCache | None,
        num_loops: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layers of the loop; leaves `cache` at the entries of the layers after them."""
        config, count = self.config, num_loops or self.config.num_loops
        assert config.loop_start is not None
        assert config.loop_end is not None
        size = config.loop_end - config.loop_start

        def repetition(h_BND: Tensor) -> tuple[Tensor, Tensor | None]:
            state = core(h_BND, v_BND, cache)
            if cache is not None:
                cache.shift += size
            return state

        def force(h_BND: Tensor) -> tuple[Tensor, Tensor | None]:
            next_BND, last_v_BND = repetition(h_BND)
            return next_BND - h_BND.to(next_BND.device), last_v_BND

        last_v_BND = v_BND
        if config.loop_dynamics:
            tolerance = None if self.training else config.loop_tolerance
            h_BND, _, _, last_v_BND = self.dynamics_loop.loop(
                force, h_BND, count, tolerance=tolerance, sample_dims=2
            )
        else:
            for _ in range(count):
                h_BND, last_v_BND = repetition(h_BND)
        if cache is not None:
            # After an early exit: tokens that have stopped keep their keys and values.
            for shift in range(cache.shift, count * size, size):
                for index, (k_BKNE, v_BKNE) in cache.last.items():
                    cache.cache.update(k_BKNE, v_BKNE, index + shift)
            cache.shift = (count - 1) * size
        return h_BND, last_v_BND

    @staticmethod
    def _check_cache(past_key_values: Cache | None, layers: int, **kwargs: Any) -> None:
        if kwargs.get("cache") is not None:
            raise ValueError(
                "continuous batching has one cache entry per layer, and this model needs one per "
                "repetition: use generate"
            )
        entries = 0 if past_key_values is None else len(past_key_values)
        if entries not in (0, layers):
            raise ValueError(
                f"the cache has {entries} layers, and num_loops asks for {layers}: give each call "
                "of a text the same num_loops, and make a cache from config.unrolled(num_loops)"
            )

    def _plan(
        self, input_ids: Tensor | None, routing_ids: Tensor | None, inputs_embeds: Tensor
    ) -> RoutingPlan | None:
        """Group the tokens of the batch by expert, once for all layers; `None` without experts."""
        table = self.routing_table
        if table is None:
            return None
        ids = input_ids if routing_ids is None else routing_ids
        if ids is None:
            raise ValueError(
                "this model routes each token by its id: give routing_ids (B, N) in addition to "
                f"inputs_embeds of shape {tuple(inputs_embeds.shape)}"
            )
        if input_ids is None and ids.ndim == 2:  # virtual tokens are routed as id 0
            ids = F.pad(ids, (max(0, inputs_embeds.shape[1] - ids.shape[1]), 0))
        if ids.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"routing_ids of shape {tuple(ids.shape)} must be {tuple(inputs_embeds.shape[:2])},"
                " one id per token"
            )
        if table.shape != (self.config.vocab_size,):
            raise ValueError(
                f"the routing table is for {table.shape[0]} token ids, the vocabulary has "
                f"{self.config.vocab_size}: resize_token_embeddings changes both"
            )
        if ids is not input_ids:
            self._check_ids(ids)
        return make_routing_plan(table[ids], self.config.num_experts)

    def _check_ids(self, ids: Tensor) -> None:
        if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
            return
        if type(ids) is not Tensor or transformed():  # FakeTensorMode, torch.func: no values
            return
        low, high = int(ids.min()), int(ids.max())
        size = self.config.vocab_size
        if low < 0 or high >= size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {size} ids (0 "
                f"to {size - 1}): check that the tokenizer belongs to the model"
            )


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of each token given the tokens before it, in nats.

    As transformers computes it for causal language models, except that fp64 logits stay fp64.
    `shift_labels` (B, N) are already shifted left by one; `None` means made from `labels`. The sum
    is divided by `num_items_in_batch` (from `Trainer`), or by the number of labels that count.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    return fixed_cross_entropy(
        logits.reshape(-1, vocab_size), targets, num_items_in_batch, ignore_index
    )


class DeepForCausalLM(DeepPreTrainedModel, GenerationMixin):
    """The decoder with an output head: next-token logits, loss, generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012  # pyright: ignore

    def __init__(self, config: DeepConfig) -> None:
        super().__init__(config)
        self.model = DeepModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        routing_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits and, with labels, the loss.

        `labels` are token ids (B, N), usually `input_ids` themselves: they are shifted by one here,
        and -100 does not count. `logits_to_keep` is the number of last positions, or a tensor of
        positions, that get logits; 0 means all. The other arguments are those of
        `DeepModel.forward` and of the loss (`num_items_in_batch`, `shift_labels`).

        Returns:
            `logits` (B, N, V), `loss` (nats per token) if `labels` are given, and the outputs of
            the decoder.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, routing_ids=routing_ids,
            use_cache=use_cache, num_loops=num_loops, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """As in transformers, for the number of repetitions of this call."""
        config = self.config
        self.config = config.unrolled(model_kwargs.get("num_loops"))
        try:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # pyright: ignore
        finally:
            self.config = config

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        routing_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one step of `generate` as transformers does, with the ids to route by.

        `input_ids` are the ids so far, without those of a prompt that was given as embeddings.
        `routing_ids` (B, N) route the prompt; generated tokens are routed by their own ids. A
        routed model gets them in any case: PEFT replaces the `input_ids` of a prompt by embeddings.
        """
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, *args, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if routing_ids is not None:
            prompt = 0 if inputs_embeds is not None else routing_ids.shape[1]
            all_ids = torch.cat([routing_ids, input_ids[:, prompt:]], dim=1)
            fed = inputs["input_ids"]
            fed = inputs["inputs_embeds"] if fed is None else fed
            start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            inputs["routing_ids"] = all_ids[:, start : start + fed.shape[1]]
        elif self.config.num_experts and inputs["input_ids"] is not None:
            inputs["routing_ids"] = inputs["input_ids"]
        return inputs


class _WithDecoder:
    """A head of transformers, which builds its decoder by `AutoModel` from the config.

    transformers copies the file of a config alone and the file of a model with those it imports:
    the config of a folder is of the first copy, which only the Auto class in use has been told of.
    """

    def __init__(self, config: DeepConfig) -> None:
        AutoModel.register(type(config), DeepModel, exist_ok=True)
        super().__init__(config)  # pyright: ignore[reportCallIssue]


class DeepForSequenceClassification(
    _WithDecoder, GenericForSequenceClassification, DeepPreTrainedModel
):
    """The decoder with a label for each text, read at its last token that is not padding."""


class DeepForTokenClassification(_WithDecoder, GenericForTokenClassification, DeepPreTrainedModel):
    """The decoder with a label for each token."""


class DeepForQuestionAnswering(_WithDecoder, GenericForQuestionAnswering, DeepPreTrainedModel):
    """The decoder with the first and last token of an answer within the text."""


# The tables of names are what Trainer (which labels to shift), lm-eval and pipelines ask.
_AUTO_CLASSES: tuple[tuple[Any, type[DeepPreTrainedModel], dict[str, str]], ...] = (
    (AutoModel, DeepModel, modeling_auto.MODEL_MAPPING_NAMES),
    (AutoModelForCausalLM, DeepForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        AutoModelForSequenceClassification,
        DeepForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForTokenClassification,
        DeepForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForQuestionAnswering,
        DeepForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
)
for _auto, _model, _names in _AUTO_CLASSES:
    _auto.register(DeepConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)
    _names[DeepConfig.model_type] = _model.__name__


__all__ = [
    "ComplexityAttention",
    "DeepDecoderLayer",
    "DeepForCausalLM",
    "DeepForQuestionAnswering",
    "DeepForSequenceClassification",
    "DeepForTokenClassification",
    "DeepMLP",
    "DeepModel",
    "DeepPreTrainedModel",
    "DeepRotaryEmbedding",
    "causal_lm_loss",
    "eager_attention",
]
