"""Which optimizer moves which weights: AdamW for all, or Muon for the matrices of the blocks."""

import math
import re
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from complexity_dit.config import OptimConfig
from inl_core.run.errors import UserError

# The spike guard: a step whose gradient is far beyond the recent ones is not taken.

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


_HIDDEN_MATRIX = re.compile(r"blocks\.\d+\.(attn|mlp)\.")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer: one list of groups, one state, one `state_dict`.

    Args:
        adamw: Moves what Muon does not; its groups come first.
        muon: Moves the hidden matrices.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: torch.optim.Muon) -> None:
        self.parts = (adamw, muon)
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on our groups and our state: there is one truth, and a schedule sees it."""
        cut = len(self.parts[0].param_groups)
        self.parts[0].param_groups, self.parts[1].param_groups = (
            self.param_groups[:cut],
            self.param_groups[cut:],
        )
        for part in self.parts:
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a loaded state (torch's `load_state_dict` ends here)."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a config.

    Weight decay acts on matrices of the backbone only: not on norms and biases (vectors), label
    tables, or anything of the dynamics, whose resting values are not zero.

    Muon (Jordan et al., 2024) orthogonalises the update of a matrix, so it takes the two-
    dimensional weights of attention and MLP. AdamW keeps the rest: embeddings, the input and
    output layers, vectors, as Muon's authors advise; the AdaLN projections, which start at zero and
    are the output layers of the condition; stacked experts (three-dimensional); the dynamics.
    Its rate is scaled to the size of AdamW's updates (Liu et al., arXiv 2502.16982), so both may
    have the same.

    Raises:
        UserError: If a setting is out of range.
    """
    _check(config)
    decayed, plain, hidden = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # of the base, when an adapter is trained
            continue
        exempt = parameter.ndim < 2 or "label_embed" in name or "dynamics" in name
        matrix = parameter.ndim == 2 and _HIDDEN_MATRIX.match(name)
        if config.name == "muon" and matrix:
            hidden.append(parameter)
        else:
            (plain if exempt else decayed).append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.name == "adamw":
        return adamw
    muon = torch.optim.Muon(
        hidden,
        lr=config.lr if config.muon_lr is None else config.muon_lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(adamw, muon)


def _check(config: OptimConfig) -> None:
    if config.muon_lr is not None and not config.muon_lr > 0:
        raise UserError(f"muon_lr {config.muon_lr} must be positive, or null for the same as lr")
    if not 0 <= config.muon_momentum < 1:
        raise UserError(f"muon_momentum {config.muon_momentum} must be in [0, 1)")
