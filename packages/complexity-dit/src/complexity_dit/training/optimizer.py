"""The optimizer of a run: AdamW, or Muon for the matrices of the blocks; and the spike guard."""

import math
import re
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from complexity_dit.config import OptimConfig
from inl_core.run.errors import UserError

_HIDDEN_MATRIX = re.compile(r"(network\.)?blocks\.\d+\.(attn|mlp)\.")
_TABLES = ("label_embed", "caption_null", "embed_tokens")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a config, for the trainable parameters of a model.

    Weight decay acts on matrices of the backbone only: not on norms and biases (vectors), tables of
    labels and tokens, or the dynamics, whose resting values are not zero.

    Muon (Jordan et al., 2024) orthogonalises the update of a matrix, so it gets the two-dimensional
    weights of attention and MLP. AdamW keeps the rest: embeddings, the input and output layers and
    vectors, as Muon's authors advise; the AdaLN projections, which start at zero and are the output
    layers of the condition; the dynamics. Muon's rate is scaled to the size of AdamW's updates (Liu
    et al., arXiv 2502.16982), so both can use the same.
    """
    decayed, plain, hidden = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # of the base of an adapter
            continue
        exempt = parameter.ndim < 2 or any(part in name for part in (*_TABLES, "dynamics"))
        if config.name == "muon" and parameter.ndim == 2 and _HIDDEN_MATRIX.match(name):
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
    muon = StackedMuon(
        hidden,
        lr=config.lr if config.muon_lr is None else config.muon_lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
    )
    return MuonWithAdamW(adamw, muon)


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` that updates all matrices of equal shape at once.

    torch's own runs 29 operations per matrix, one after the other, and a GPU waits for Python in
    between. Here the matrices of a shape are stacked: the 84 matrices of S/2 have three shapes.
    Groups and state are those of torch's, and so are the results but for the rounding of batched
    products. A step holds a few copies of the largest stack, after the activations are freed.

    Sharded matrices (FSDP2) are gathered whole, each in one of the processes, which orthogonalises
    it. A matrix that stacks several projections would have to be split first, since they are
    orthogonalised by themselves; the networks here have none.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(
            params, lr, weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """One step; matrices without a gradient stay."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            stacks: dict[tuple, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = (parameter.shape, parameter.dtype, parameter.device)
                    stacks.setdefault(kind, []).append(parameter)
            for parameters in stacks.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights = [_local(p) for p in parameters]
        gradients = [_local(p.grad) for p in parameters]
        averages = [_local(self.state[p]["momentum_buffer"]) for p in parameters]

        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # as Nesterov's
        stack = _in_whole_matrices(
            lambda x: orthogonalise(x, group["ns_coefficients"], group["ns_steps"], group["eps"]),
            torch.stack(ahead).bfloat16(), parameters[0], len(parameters),
        ).to(weights[0].dtype)  # fmt: skip
        rate = 0.2 * math.sqrt(max(parameters[0].shape)) * group["lr"]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, stack.unbind(), alpha=-rate)


def orthogonalise(
    stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices with the singular vectors of given ones and singular values near 1.

    With A = X Xᵀ, each step of Newton and Schulz is X <- aX + (bA + cA²)X, which maps the singular
    values s of X to as + bs³ + cs⁵. The first X has unit Frobenius norm.

    Args:
        stack: (matrices, rows, columns); computed in its dtype.
        coefficients: (a, b, c).
        steps: Number of steps.
        eps: Least norm that a matrix is divided by.
    """
    a, b, c = coefficients
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x.mT if tall else x


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _in_whole_matrices(
    work: Callable[[Tensor], Tensor], stack: Tensor, like: Tensor, count: int
) -> Tensor:
    """Apply `work` to a stack of `count` matrices, each of them sharded as `like` is.

    If it is, each process gets whole matrices in exchange for its parts of the others.
    """
    if not isinstance(like, DTensor):
        return work(stack)
    parts = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]
    whole = [Shard(0) if isinstance(p, Shard) else p for p in like.placements]
    shape, stride = (count, *like.shape), (like.numel(), *like.stride())

    def sharded(local: Tensor, placements: list) -> DTensor:
        return DTensor.from_local(
            local, like.device_mesh, placements, shape=torch.Size(shape), stride=stride
        )

    own = sharded(stack, parts).redistribute(placements=whole).to_local()
    return sharded(work(own).contiguous(), whole).redistribute(placements=parts).to_local()


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer with shared groups, state and `state_dict`.

    The groups of AdamW come first.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: torch.optim.Muon) -> None:
        self.parts = (adamw, muon)
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make both use the groups and the state of this optimizer, which a schedule changes."""
        adamw, muon = self.parts
        cut = len(adamw.param_groups)
        adamw.param_groups, muon.param_groups = self.param_groups[:cut], self.param_groups[cut:]
        adamw.state = muon.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set a loaded state (`load_state_dict` of torch ends here)."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss


_QUANTILE = 0.9
"""Summary of recent norms: high, so that ordinary noise is far from a spike."""


class SpikeGuard:
    """Decides from the gradient norm whether an update is applied.

    An update is skipped if its norm exceeds `spike_factor` times the 0.9 quantile of the last
    `spike_window` norms, once there are that many. Finite norms enter the window whether skipped or
    not, so a lasting change of level is accepted after a tenth of the window. A norm that is not
    finite is always skipped and never enters; more than `spike_limit` of those in a row end the
    run. The norm is global and equal in every process, and so is the decision.
    """

    def __init__(self, config: OptimConfig) -> None:
        self.factor, self.limit = config.spike_factor, config.spike_limit
        self.norms: deque[float] = deque(maxlen=config.spike_window)
        self._broken_in_a_row = 0

    def admits(self, norm: float) -> bool:
        """Whether the update with this gradient norm is applied."""
        finite = math.isfinite(norm)
        good = finite and not norm > self.threshold()
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
        """The largest norm that is not a spike; infinite until the window is full."""
        if len(self.norms) < (self.norms.maxlen or 0):
            return math.inf
        return self.factor * sorted(self.norms)[math.ceil(_QUANTILE * len(self.norms)) - 1]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the JSON of a checkpoint."""
        return {"norms": list(self.norms), "broken_in_a_row": self._broken_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; of a longer window the latest norms are kept."""
        self.norms.clear()
        self.norms.extend(state["norms"])
        self._broken_in_a_row = state["broken_in_a_row"]
