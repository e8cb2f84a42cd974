"""The named sizes, what each placement of the dynamics starts from, and what fits together."""

from collections.abc import Mapping
from typing import Any

PLACEMENTS = ("stream", "branch", "force", "none")
ADAPTIVES = ("token", "channel", "layer", "lite")
NETWORK_OUTPUTS = ("target", "sample")

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
}


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
