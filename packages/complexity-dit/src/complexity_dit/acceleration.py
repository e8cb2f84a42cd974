"""The `Accelerator` of a run: what is ours to say about precision, DDP and FSDP2."""

import os

from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from complexity_dit.config import TrainConfig
from complexity_dit.trackers import check_tracker
from inl_core.run.errors import UserError


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Processes and devices come from the launcher; precision and tracker from the config.

    Raises:
        UserError: If the tracker is not installed, or FSDP of another version is asked for.
    """
    check_tracker(config.report_to)
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.out,
        # The first layer has no incoming velocity: that part of its controller gets no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        fsdp_plugin=sharding_plugin(),
    )


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """How `accelerate launch` with FSDP shards, None without.

    accelerate's own policy would cast the inputs to bf16, where a timestep of 1000 has steps of 4.
    Here weights are gathered in fp32 and the forward runs under autocast, as with DDP.

    Raises:
        UserError: For FSDP 1, whose flat parameters have no names to save.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"fsdp_version is {version}; set fsdp_version: 2 in the accelerate config, as "
            "configs/accelerate/fsdp2.yaml does"
        )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
    )
