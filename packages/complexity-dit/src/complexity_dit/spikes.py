"""The spike guard: a step whose gradient is far beyond the recent ones is not taken."""

import math
from collections import deque
from typing import Any

from complexity_dit.config import OptimConfig
from inl_core.run.errors import UserError

QUANTILE = 0.9
"""What recent norms are summed up by: high, so that ordinary noise is far from a spike."""


class SpikeGuard:
    """Decides from gradient norms, one by one, whether a step may be taken.

    A step is skipped when its norm exceeds `spike_factor` times the 0.9-quantile of the last
    `spike_window` norms, once there are that many. Finite norms enter the window whether their step
    is taken or not, so a lasting change of level is accepted after a tenth of the window. A
    norm that is not finite is always skipped and never enters; more than `spike_limit` of those in
    a row end the run.

    The norm is the global one, equal on every process, and so is the decision.

    Attributes:
        skipped: Steps skipped so far.
    """

    def __init__(self, config: OptimConfig) -> None:
        self.factor, self.limit = config.spike_factor, config.spike_limit
        self.norms: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = self._broken_in_a_row = 0

    def admits(self, norm: float) -> bool:
        """Whether the step of this gradient norm may be taken; counts it if not.

        Raises:
            UserError: After too many norms in a row that are not finite.
        """
        finite = math.isfinite(norm)
        good = finite and not norm > self.threshold()
        self.skipped += not good
        self._broken_in_a_row = 0 if finite else self._broken_in_a_row + 1
        if self._broken_in_a_row > self.limit:
            raise UserError(
                f"gradient norm {norm}, and not finite for {self._broken_in_a_row} steps in a row "
                f"(spike_limit is {self.limit}): lower --optim.lr or raise --optim.warmup_steps, "
                "then --resume auto"
            )
        if finite:
            self.norms.append(norm)
        return good

    def threshold(self) -> float:
        """The largest norm that is no spike; infinite until the window is full."""
        if len(self.norms) < (self.norms.maxlen or 0):
            return math.inf
        return self.factor * sorted(self.norms)[math.ceil(QUANTILE * len(self.norms)) - 1]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint's JSON."""
        return {
            "norms": list(self.norms),
            "skipped": self.skipped,
            "broken_in_a_row": self._broken_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; a longer window than ours keeps its latest norms."""
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.skipped, self._broken_in_a_row = state["skipped"], state["broken_in_a_row"]


def build_guard(config: OptimConfig, mixed_precision: str) -> SpikeGuard | None:
    """The guard of a config; None when it is off.

    Raises:
        UserError: If a setting is out of range, or the guard is asked for with fp16.
    """
    if not config.spike_factor:
        return None
    if not (math.isfinite(config.spike_factor) and config.spike_factor >= 1):
        raise UserError(
            f"spike_factor {config.spike_factor} must be 0 (off) or a number of at least 1: how "
            "many times the usual gradient norm is a spike"
        )
    if config.spike_window < 2 or config.spike_limit < 0:
        raise UserError(
            f"spike_window {config.spike_window} must be at least 2, and spike_limit "
            f"{config.spike_limit} at least 0"
        )
    if mixed_precision == "fp16":
        raise UserError(
            f"spike_factor {config.spike_factor} does not go with mixed_precision fp16, whose "
            "gradient scaler skips steps of its own: use bf16, or spike_factor 0"
        )
    return SpikeGuard(config)
