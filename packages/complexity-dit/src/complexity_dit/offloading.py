"""Which of diffusers' ways to save memory fit a network that reads weights without calling layers.

Our fused operations take the weights of norms and dynamics as tensors. An offloading that brings a
weight to the device when the forward of *its own* layer is called would never bring those.
"""

from typing import Any

from inl_core.run.errors import UserError

_WHY = (
    "the fused operations read the weights of norms and dynamics without calling these layers, so "
    "their weights would stay behind"
)


def refuse_leaf_level(offload_type: Any) -> None:
    """Refuse group offloading layer by layer.

    Raises:
        UserError: Naming what works.
    """
    if str(getattr(offload_type, "value", offload_type)) == "leaf_level":
        raise UserError(
            f"group offloading by leaf_level cannot work here: {_WHY}. Use "
            'offload_type="block_level", num_blocks_per_group=1'
        )


class OffloadingMixin:
    """For a pipeline: the one that cannot work is refused."""

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it offloads layer by layer.

        Raises:
            UserError: Always, naming what works.
        """
        raise UserError(
            f"sequential offloading cannot work here: {_WHY}. Use enable_model_cpu_offload(), or "
            'enable_group_offload(..., offload_type="block_level", num_blocks_per_group=1)'
        )
