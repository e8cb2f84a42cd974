"""One layer of the complexity language model: attention, MLP, and INL dynamics between them.

Shape suffixes: B batch · N tokens · D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from inl_core import INLDynamics, INLDynamicsLite, RMSNorm, ops
from inl_core.routing import RoutingPlan, TokenRoutedMLP

from .attention_complexity import ComplexityAttention
from .configuration_complexity import DeepConfig


class DeepMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        # `_init_weights` asks for this: it sees one module alone.
        self.down_proj.writes_to_stream = True  # pyright: ignore[reportArgumentType]

    def forward(self, x_BND: Tensor) -> Tensor:
        """Transform each token of (B, N, D) by itself."""
        return self.down_proj(ops.swiglu(self.gate_proj(x_BND), self.up_proj(x_BND)))


def _build_mlp(config: DeepConfig) -> DeepMLP | TokenRoutedMLP:
    if config.num_experts == 0:
        return DeepMLP(config.hidden_size, config.intermediate_size)
    assert config.expert_intermediate_size is not None
    return TokenRoutedMLP(
        config.hidden_size,
        config.expert_intermediate_size,
        config.num_experts,
        config.shared_intermediate_size,
    )


@contextmanager
def _own_random_stream() -> Iterator[None]:
    """Random numbers drawn inside do not move those drawn outside.

    So a model with dynamics and one without start from the same backbone. The stream inside begins
    elsewhere too: a mere fork would repeat the numbers that the next matrix outside is made of.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        seed = int(torch.randint(2**62, (), device="cpu"))
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def _build_dynamics(config: DeepConfig) -> INLDynamics | INLDynamicsLite:
    coefficients: list[Any] = [
        config.dynamics_alpha,
        config.dynamics_beta,
        config.dynamics_gate,
        config.dynamics_dt,
    ]
    bounds: dict[str, Any] = {
        "velocity_max": config.dynamics_velocity_max,
        "mu_min": config.dynamics_mu_min,
        "mu_max": config.dynamics_mu_max,
    }
    with _own_random_stream():
        if config.dynamics_adaptive == "lite":
            return INLDynamicsLite(config.hidden_size, *coefficients, **bounds)
        return INLDynamics(
            config.hidden_size,
            *coefficients,
            **bounds,
            beta_max=config.dynamics_beta_max,
            adaptive=config.dynamics_adaptive,
            controller_hidden=config.dynamics_controller_hidden,
        )


class DeepDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP on a residual stream, with INL dynamics where the config places it.

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
        self.mlp = _build_mlp(config)
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
        """One layer of depth.

        Args:
            h_BND: Hidden states ("position").
            v_BND: Velocity from the layer below; `None` means zero.
            plan: Which expert each token goes to; `None` with the dense MLP.
            **kwargs: What `ComplexityAttention.forward` takes.

        Returns:
            The next hidden states and velocity; the velocity is `None` without dynamics.
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


def start_dynamics(module: INLDynamics | INLDynamicsLite) -> None:
    """Give every parameter its exact start, except those that a checkpoint filled.

    transformers marks the filled ones; `reset_parameters` writes through views, which have no mark.
    """
    filled = {
        name: parameter.clone()
        for name, parameter in module.named_parameters(recurse=False)
        if getattr(parameter, "_is_hf_initialized", False)
    }
    with _own_random_stream():
        module.reset_parameters()
    for name, value in filled.items():
        module.get_parameter(name).copy_(value)


__all__ = ["DeepDecoderLayer", "DeepMLP", "start_dynamics"]
