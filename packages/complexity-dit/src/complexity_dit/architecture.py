"""The named sizes, what each placement of the dynamics starts from, and what fits together."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from inl_core import INLDynamics, INLDynamicsLite

PLACEMENTS = ("stream", "branch", "force", "force_mlp", "none")
ADAPTIVES = ("token", "channel", "layer", "lite")
NETWORK_OUTPUTS = ("target", "sample")
ROUTINGS = ("none", "timestep", "position")

# name: (hidden_size, num_layers, num_attention_heads); S to XL are the sizes of DiT (Peebles & Xie,
# arXiv 2212.09748), those above them are for a CPU.
SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (128, 4, 4),
    "tiny": (192, 6, 6),
    "mini": (256, 8, 8),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}

# What `None` means for a dynamics coefficient. The paper's values suit a layer that integrates a
# stream or a branch; as a force the sub-layer output must arrive nearly whole (dt = 1, gate ~ 1).
DYNAMICS_DEFAULTS: dict[str, dict[str, float]] = {
    "stream": {"alpha": 0.9, "beta": 0.1, "gate": 0.5, "dt": 0.1},
    "branch": {"alpha": 0.9, "beta": 0.1, "gate": 0.5, "dt": 0.1},
    "force": {"alpha": 0.5, "beta": 0.01, "gate": 0.99, "dt": 1.0},
    "force_mlp": {"alpha": 0.5, "beta": 0.01, "gate": 0.99, "dt": 1.0},
}


def swiglu_width(hidden_size: int, mlp_ratio: float) -> int:
    """Inner width of the SwiGLU MLP: ``mlp_ratio * hidden_size`` rounded up to a multiple of 64."""
    return -(-int(hidden_size * mlp_ratio) // 64) * 64


def build_dynamics(config: Mapping[str, Any]) -> INLDynamics | INLDynamicsLite:
    """One dynamics layer from the model's config (one each for attention and MLP in `force`)."""
    defaults = DYNAMICS_DEFAULTS[config["dynamics_placement"]]
    alpha, beta, gate, dt = (
        defaults[key] if config[f"dynamics_{key}"] is None else config[f"dynamics_{key}"]
        for key in ("alpha", "beta", "gate", "dt")
    )
    bounds = {
        "velocity_max": config["dynamics_velocity_max"],
        "mu_min": config["dynamics_mu_min"],
        "mu_max": config["dynamics_mu_max"],
    }
    # The controller draws its own random numbers. Forking keeps the outer stream where a model
    # without dynamics has it, so that all placements share the same backbone initialisation.
    with torch.random.fork_rng(devices=[]):
        if config["dynamics_adaptive"] == "lite":
            return INLDynamicsLite(config["hidden_size"], alpha, beta, gate, dt, **bounds)
        return INLDynamics(
            config["hidden_size"],
            init_alpha=alpha,
            init_beta=beta,
            init_gate=gate,
            dt=dt,
            beta_max=config["dynamics_beta_max"],
            adaptive=config["dynamics_adaptive"],
            controller_hidden=config["dynamics_controller_hidden"],
            **bounds,
        )


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse sizes and names that do not fit; the numbers are in the message."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
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
    if config["sample_size"] % config["patch_size"]:
        raise ValueError(
            f"sample_size {config['sample_size']} must be divisible by patch_size "
            f"{config['patch_size']}"
        )
    if config["dynamics_placement"] not in PLACEMENTS:
        raise ValueError(
            f"dynamics_placement {config['dynamics_placement']!r} must be one of {PLACEMENTS}"
        )
    if config["dynamics_adaptive"] not in ADAPTIVES:
        raise ValueError(
            f"dynamics_adaptive {config['dynamics_adaptive']!r} must be one of {ADAPTIVES}"
        )
    if config["network_output"] not in NETWORK_OUTPUTS:
        raise ValueError(
            f"network_output {config['network_output']!r} must be one of {NETWORK_OUTPUTS}"
        )
    _check_routing(config)
    _check_token_drop(config)
    fields, counts = config["label_fields"], config["num_classes"]
    if len(fields) != len(counts) or len(set(fields)) != len(fields):
        raise ValueError(
            f"label_fields {list(fields)} must be distinct names with one entry each in "
            f"num_classes {list(counts)}"
        )
    for field, count in zip(fields, counts, strict=True):
        if not field.isidentifier() or count < 1:
            raise ValueError(
                f"label field {field!r}: {count} must be a Python identifier with at least 1 label"
            )


def middle_blocks(config: Mapping[str, Any]) -> tuple[int, int]:
    """The blocks that dropped tokens bypass: from `start` up to, not including, `end`.

    None means all but the first and the last block. start >= end: there is no such block.
    """
    start, end = config["token_drop_start"], config["token_drop_end"]
    return 1 if start is None else start, config["num_layers"] - 1 if end is None else end


def _check_token_drop(config: Mapping[str, Any]) -> None:
    given = config["token_drop_start"] is not None or config["token_drop_end"] is not None
    start, end = middle_blocks(config)
    if given and not 0 <= start < end <= config["num_layers"]:
        raise ValueError(
            f"token_drop_start {start} and token_drop_end {end} must satisfy 0 <= start < end <= "
            f"num_layers {config['num_layers']}: dropped tokens bypass blocks start to end - 1"
        )
    if config["value_residual"] and start == 0:
        raise ValueError(
            f"token_drop_start {start} must be at least 1 with value_residual: every token needs "
            "its value in the first block"
        )


def _check_routing(config: Mapping[str, Any]) -> None:
    routing, experts = config["routing"], config["num_experts"]
    if routing not in ROUTINGS:
        raise ValueError(f"routing {routing!r} must be one of {ROUTINGS}")
    if routing == "none":
        return
    if experts < 2:
        raise ValueError(f"num_experts {experts} must be at least 2 with routing {routing}")
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    if routing == "position" and experts > tokens:
        raise ValueError(
            f"num_experts {experts} must be at most the {tokens} tokens of an image with routing "
            "position"
        )
    edges = config["routing_edges"]
    if edges is None:
        return
    if routing != "timestep":
        raise ValueError(f"routing_edges go with routing timestep, not {routing}")
    inside = [0.0, *edges, 1.0]
    if len(edges) != experts - 1 or any(a >= b for a, b in itertools.pairwise(inside)):
        raise ValueError(
            f"routing_edges {list(edges)} must be {experts - 1} rising noise levels in (0, 1), one "
            f"less than num_experts {experts}"
        )
