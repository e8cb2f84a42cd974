"""The language model with dynamics in other places or of other kinds.

The name of the variant is a field of the config, so checkpoints and model folders load as the same
network in programs that import this module.
"""

import copy

import torch
from benchmarks.study.loop_arms import LoopArm
from benchmarks.study.loops_report import ARMS
from benchmarks.study.variants import SWAPS
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM

from complexity_lm import DeepConfig, DeepForCausalLM
from complexity_lm.modeling_complexity import DeepDecoderLayer
from complexity_lm.train import build_model


class MLPBranch(DeepDecoderLayer):
    """Placement `branch` on the MLP instead of attention."""

    def forward(self, h_BND, v_BND=None, plan=None, **kwargs):
        branch_BND, _ = self.self_attn(self.input_layernorm(h_BND), **kwargs)
        h_BND = h_BND + branch_BND
        branch_BND = self.mlp(self.post_attention_layernorm(h_BND))
        branch_BND, v_BND = self.dynamics(branch_BND, v_BND)
        return h_BND + branch_BND, v_BND


class BothBranches(DeepDecoderLayer):
    """Placement `branch` on attention and on the MLP, one velocity through both."""

    def forward(self, h_BND, v_BND=None, plan=None, **kwargs):
        branch_BND, _ = self.self_attn(self.input_layernorm(h_BND), **kwargs)
        branch_BND, v_BND = self.dynamics(branch_BND, v_BND)
        h_BND = h_BND + branch_BND
        branch_BND = self.mlp(self.post_attention_layernorm(h_BND))
        branch_BND, v_BND = self.dynamics_mlp(branch_BND, v_BND)
        return h_BND + branch_BND, v_BND


class AcrossLayers(DeepDecoderLayer):
    """Momentum across layers only: the force is the change made by the whole plain layer."""

    def forward(self, h_BND, v_BND=None, plan=None, **kwargs):
        after_BND, _ = super().forward(h_BND, None, plan, **kwargs)
        return self.dynamics(h_BND, v_BND, force=after_BND - h_BND)


class LookAhead(DeepDecoderLayer):
    """`force` with attention and MLP evaluated ahead of the state (Nesterov; not in the paper).

    Their input is h + dt g α v with the initial coefficients: where inertia alone would move h.
    """

    def forward(self, h_BND, v_BND=None, plan=None, **kwargs):
        ahead_BND = self._ahead(self.dynamics, h_BND, v_BND)
        branch_BND, _ = self.self_attn(self.input_layernorm(ahead_BND), **kwargs)
        h_BND, v_BND = self._push(self.dynamics, h_BND, v_BND, branch_BND)
        ahead_BND = self._ahead(self.dynamics_mlp, h_BND, v_BND)
        branch_BND = self.mlp(self.post_attention_layernorm(ahead_BND))
        return self._push(self.dynamics_mlp, h_BND, v_BND, branch_BND)

    def _ahead(self, dynamics, h_BND, v_BND):
        if v_BND is None:
            return h_BND
        return h_BND + dynamics.dt * dynamics.init_gate * dynamics.init_alpha * v_BND


def _needs(layers, placement):
    if layers[0].placement != placement:
        raise ValueError(f"this swap is for placement {placement}, not {layers[0].placement}")


def mlp_branch(model):
    _needs(model.model.layers, "branch")
    for layer in model.model.layers:
        layer.__class__ = MLPBranch


def both_branches(model):
    _needs(model.model.layers, "branch")
    for layer in model.model.layers:
        layer.dynamics_mlp = copy.deepcopy(layer.dynamics)
        layer.__class__ = BothBranches


def across_layers(model):
    _needs(model.model.layers, "stream")
    for layer in model.model.layers:
        layer.placement = "none"  # of the inner layer; AcrossLayers adds the dynamics around it
        layer.__class__ = AcrossLayers


def look_ahead(model):
    _needs(model.model.layers, "force")
    for layer in model.model.layers:
        layer.__class__ = LookAhead


def loop_arm(arm):
    """A variant that repeats the layers of the loop in another manner."""

    def swap(model):
        if not hasattr(model.model, "dynamics_loop"):
            raise ValueError("the model has no loop with dynamics to replace: set num_loops")
        config = model.config
        model.model.dynamics_loop = LoopArm(arm, config.hidden_size, config.num_loops)

    return swap


LM_SWAPS = {
    **{name: lambda model, swap=swap: swap(model.model.layers) for name, swap in SWAPS.items()},
    "mlp-branch": mlp_branch,
    "both-branches": both_branches,
    "across-layers": across_layers,
    "look-ahead": look_ahead,
    **{f"loop, {arm}": loop_arm(arm) for arm in ARMS},
}


@strict
class VariedConfig(DeepConfig):
    """`DeepConfig` with the name of a swap, one of `LM_SWAPS` or None."""

    model_type = "complexity-deep-varied"
    swap: str | None = None


class VariedForCausalLM(DeepForCausalLM):
    """`DeepForCausalLM` with the swap applied when it is built."""

    config_class = VariedConfig
    _auto_class = None  # saved folders carry no code

    def __init__(self, config):
        super().__init__(config)
        if config.swap is not None:
            LM_SWAPS[config.swap](self)


AutoConfig.register(VariedConfig.model_type, VariedConfig)
AutoModelForCausalLM.register(VariedConfig, VariedForCausalLM)


def varied_build(swap):
    """A build function for `complexity_lm.train`: the network of the config with `swap` applied."""
    if swap is None:
        return build_model
    if swap not in LM_SWAPS:
        raise ValueError(f"unknown swap {swap!r}, choose from: {', '.join(LM_SWAPS)}")

    def build(config, tokenizer, tokens):
        plain = build_model(config, tokenizer, tokens)
        settings = plain.config.to_dict() | {"swap": swap, "model_type": VariedConfig.model_type}
        torch.manual_seed(config.seed)  # the random numbers of the plain network
        return VariedForCausalLM(VariedConfig.from_dict(settings)).to(plain.dtype)

    return build
