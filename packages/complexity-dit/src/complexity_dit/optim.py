"""Which optimizer moves which weights: AdamW for all, or Muon for the matrices of the blocks."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from complexity_dit.config import OptimConfig
from inl_core.run.errors import UserError

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
