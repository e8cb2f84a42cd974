"""Which weights fit which network: to go on from a checkpoint, or to start from a pipeline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inl_core.run.errors import UserError

MEANING = (
    "num_attention_heads", "num_key_value_heads", "norm_eps", "rope_theta", "network_output",
    "routing", "routing_edges",
    "dynamics_placement", "dynamics_adaptive", "dynamics_dt", "dynamics_beta_max",
    "dynamics_velocity_max", "dynamics_mu_min", "dynamics_mu_max", "dynamics_velocity_norm",
)  # fmt: skip
"""Fields of the network's config that say what its weights mean without changing their shapes."""


def check_meaning(saved: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Refuse weights of another network whose shapes happen to fit.

    Args:
        saved: The config that the weights were trained with.
        own: The config of the network that is to have them.
        source: What they come from, for the message.

    Raises:
        UserError: Naming the fields that differ.
    """
    differing = [
        f"{name} is {saved[name]!r} there and {own[name]!r} here"
        for name in MEANING
        if name in saved and name in own and saved[name] != own[name]
    ]
    if differing:
        raise UserError(
            f"{source} is of another model: {'; '.join(differing)}; use the config it was trained "
            "with"
        )


def check_labels(
    saved: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]], checkpoint: Path
) -> None:
    """Refuse to go on with data whose labels are not those of the checkpoint, in their order.

    Args:
        saved: Names by field, in id order, that the checkpoint was trained with.
        now: Those of the data.
        checkpoint: For the message.

    Raises:
        UserError: Naming what was added and removed, and how to start from the old weights.
    """
    if {field: list(names) for field, names in saved.items()} == {
        field: list(names) for field, names in now.items()
    }:
        return
    changes = [f"label field {field} was added" for field in now if field not in saved]
    changes += [f"label field {field} was removed" for field in saved if field not in now]
    for field in (field for field in saved if field in now):
        added = [name for name in now[field] if name not in saved[field]]
        removed = [name for name in saved[field] if name not in now[field]]
        if added:
            changes.append(f"{field} has new names: {_few(added)}")
        if removed:
            changes.append(f"{field} lacks {_few(removed)}")
    raise UserError(
        f"the data's labels are not those that {checkpoint} was trained with: "
        f"{'; '.join(changes) or 'they are in another order'}. To train on with these labels, "
        f"start a new run from its weights: --init_from {checkpoint / 'pipeline'} --out NEW_FOLDER"
    )


def _few(names: Sequence[str], shown: int = 5) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
