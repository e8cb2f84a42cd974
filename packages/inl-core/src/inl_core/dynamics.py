"""INL dynamics as modules: `INLDynamics` learns its coefficients, `INLDynamicsLite` fixes them.

Both update (h, v) by equations (1)-(3) of `inl_core.reference`, with every coefficient bounded. All
learned tensors are parameters of the module itself, never children such as ``nn.Linear``: a parent
that re-initialises its linear sub-modules cannot reset them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inl_core import ops
from inl_core.norms import is_plain

Adaptive = Literal["token", "channel", "layer"]
"""What the coefficients depend on: the state of each token, the channel, or only the layer."""

DYNAMICS_STATS = (
    "mu_min", "mu_max", "mu_clip_fraction",
    "alpha_mean", "alpha_min", "alpha_max",
    "beta_mean", "beta_min", "beta_max", "beta_clip_fraction",
    "gate_mean", "gate_min", "gate_max",
    "velocity_abs_mean", "velocity_abs_max", "velocity_rms", "velocity_clip_fraction",
)  # fmt: skip
"""Names that `get_dynamics_stats` reports after a forward inside `collect_dynamics_stats`, in order
for the columns of a log."""


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def _ceiling(beta_max: float | None) -> float:
    """`beta_max` as a number; ValueError if it is not positive."""
    if beta_max is not None and not beta_max > 0.0:
        raise ValueError(f"beta_max must be positive, or None for no bound, got {beta_max}")
    return math.inf if beta_max is None else beta_max


class Dynamics(nn.Module):
    """Base of all dynamics modules: checks, statistics and deferred bounds."""

    def __init__(self, hidden_size: int, dt: float, velocity_max: float | None) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        if not 0.0 < dt < math.inf:
            raise ValueError(f"dt must be positive and finite, got {dt}")
        if velocity_max is not None and not velocity_max > 0.0:
            raise ValueError(
                f"velocity_max must be positive, or None for no bound, got {velocity_max}"
            )
        self.hidden_size = hidden_size
        self.dt = dt
        self.velocity_max = velocity_max
        self._collecting = False
        self._defers_bounds = False
        self._last_seen: dict[str, Tensor] = {}

    def _inside(self, raw: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
        """A bounded parameter as the operations get it; see `defer_bounds`."""
        if not self._defers_bounds:
            return raw
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return _passing(wide, torch.clamp(wide, minimum, maximum))

    def _apply_bounds(self) -> None:
        """Block the gradients that lead away from a bound; see `apply_bounds`."""
        raise NotImplementedError

    def get_dynamics_stats(self) -> dict[str, float]:
        """Statistics of the last collected forward; see `INLDynamics.get_dynamics_stats`."""
        values = [float(value) for value in self._last_seen.values()]
        return dict(zip(self._last_seen, values, strict=True))

    def _check_inputs(self, h: Tensor, v: Tensor | None, force: Tensor | None) -> None:
        if h.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"h has shape {tuple(h.shape)}, expected (..., {self.hidden_size}) for "
                f"hidden_size {self.hidden_size}"
            )
        for name, value in (("v", v), ("force", force)):
            if value is not None and value.shape != h.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, expected that of h, {tuple(h.shape)}"
                )

    @torch.no_grad()
    def _record(
        self, alpha: Tensor, beta: Tensor, gate: Tensor, beta_max: float | None, v_next: Tensor
    ) -> None:
        """Store 0-dimensional statistics; `beta` is not clipped yet."""
        if v_next.numel() == 0:
            return
        ceiling = math.inf if beta_max is None else beta_max
        seen = {"beta_clip_fraction": (beta > ceiling).float().mean()}
        for name, value in (("alpha", alpha), ("beta", beta.clamp(max=ceiling)), ("gate", gate)):
            seen[f"{name}_mean"] = value.mean()
            seen[f"{name}_min"] = value.min()
            seen[f"{name}_max"] = value.max()
        speed = v_next.detach().float().abs()
        seen["velocity_abs_mean"] = speed.mean()
        seen["velocity_abs_max"] = speed.max()
        seen["velocity_rms"] = speed.square().mean().sqrt()
        at_bound = torch.zeros_like(speed)
        if self.velocity_max is not None:
            # The bound rounded to the dtype of v: a clipped bf16 velocity equals it exactly.
            bound = torch.full((), self.velocity_max, dtype=v_next.dtype, device=v_next.device)
            at_bound = (speed >= bound.float()).float()
        seen["velocity_clip_fraction"] = at_bound.mean()
        self._last_seen = {name: value.float() for name, value in seen.items()}


class _Settling(Dynamics):
    """Dynamics with a learned equilibrium mu per channel."""

    def __init__(
        self,
        hidden_size: int,
        dt: float,
        velocity_max: float | None,
        mu_min: float | None,
        mu_max: float | None,
    ) -> None:
        super().__init__(hidden_size, dt, velocity_max)
        if mu_min is not None and mu_max is not None and not mu_min <= mu_max:
            raise ValueError(f"mu_min {mu_min} must not be above mu_max {mu_max}")
        self.mu_min = mu_min
        self.mu_max = mu_max
        self.mu = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self) -> None:
        """Set the equilibrium to 0."""
        nn.init.zeros_(self.mu)

    def _mu(self) -> Tensor:
        return self._inside(self.mu, self.mu_min, self.mu_max)

    def _apply_bounds(self) -> None:
        _block_outside(self.mu, self.mu_min, self.mu_max)

    def get_dynamics_stats(self) -> dict[str, float]:
        """Statistics of the parameters and of the last collected forward.

        Returns:
            Floats by name. Always ``mu_min`` and ``mu_max`` of the raw parameter and
            ``mu_clip_fraction``, the share of its channels outside the bounds (the update uses the
            clamped mu). After a forward inside `collect_dynamics_stats` also ``alpha_*``,
            ``beta_*`` and ``gate_*`` (mean, min, max), ``beta_clip_fraction`` (share of softplus
            outputs above beta_max), ``velocity_abs_mean``, ``velocity_abs_max``, ``velocity_rms``
            and ``velocity_clip_fraction`` (share of the new velocity at its bound). On an
            accelerator this call waits for the device; forward never does.
        """
        mu = self.mu.detach().float()
        outside = torch.zeros_like(mu, dtype=torch.bool)
        if self.mu_min is not None:
            outside = outside | (mu < self.mu_min)
        if self.mu_max is not None:
            outside = outside | (mu > self.mu_max)
        stats = {
            "mu_min": mu.min(),
            "mu_max": mu.max(),
            "mu_clip_fraction": outside.float().mean(),
            **self._last_seen,
        }
        values = torch.stack([value.to(mu.device) for value in stats.values()]).tolist()
        return dict(zip(stats, values, strict=True))

    def extra_repr(self) -> str:
        """Settings shown by ``print(module)``."""
        return (
            f"{self.hidden_size}, dt={self.dt}, velocity_max={self.velocity_max}, "
            f"mu_min={self.mu_min}, mu_max={self.mu_max}"
        )


class INLDynamics(_Settling):
    """Second-order dynamics with learned, bounded coefficients.

    With ``adaptive="token"`` a small controller reads the state of each token,
    (a, b, c) = W_o·silu(W_h·h + W_v·v + b_i) + b_o, and alpha = sigmoid(a),
    beta = min(softplus(b), beta_max), gate = sigmoid(c). W_o starts at 0, so every token starts
    with exactly the initial coefficients. ``"channel"`` learns a, b, c as vectors (D,) and
    ``"layer"`` as three numbers.

    A parent's init over its ``nn.Linear`` children does not affect this module. An init over all
    parameters must be followed by `reset_parameters`.

    Args:
        hidden_size: Channels D.
        init_alpha: Initial inertia, in (0, 1).
        init_beta: Initial correction strength, in (0, beta_max].
        init_gate: Initial gate, in (0, 1).
        dt: Time step.
        beta_max: Upper bound of beta; None for none.
        velocity_max: Bound of each velocity; None for none. The position uses the clipped one.
        mu_min: Lower bound of the equilibrium mu, which starts at 0; None for none.
        mu_max: Upper bound of mu; None for none.
        adaptive: "token", "channel" or "layer".
        controller_hidden: Width of the controller; used by "token" only.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        hidden_size: int,
        init_alpha: float = 0.9,
        init_beta: float = 0.1,
        init_gate: float = 0.5,
        dt: float = 0.1,
        beta_max: float | None = 2.0,
        velocity_max: float | None = 10.0,
        mu_min: float | None = 0.0,
        mu_max: float | None = 2.0,
        adaptive: Adaptive = "token",
        controller_hidden: int = 64,
    ) -> None:
        super().__init__(hidden_size, dt, velocity_max, mu_min, mu_max)
        ceiling = _ceiling(beta_max)
        for name, value in (("init_alpha", init_alpha), ("init_gate", init_gate)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        if not (0.0 < init_beta <= ceiling and math.isfinite(init_beta)):
            raise ValueError(f"init_beta must lie in (0, beta_max = {beta_max}], got {init_beta}")
        if adaptive not in get_args(Adaptive):
            raise ValueError(f"adaptive must be one of {get_args(Adaptive)}, got {adaptive!r}")
        if controller_hidden < 1:
            raise ValueError(f"controller_hidden must be at least 1, got {controller_hidden}")
        self.init_alpha = init_alpha
        self.init_beta = init_beta
        self.init_gate = init_gate
        self.beta_max = beta_max
        self.adaptive: Adaptive = adaptive
        self.controller_hidden = controller_hidden
        if adaptive == "token":
            # Not "weight_v": transformers renames that as an old weight norm.
            self.weight_in_h = nn.Parameter(torch.empty(controller_hidden, hidden_size))
            self.weight_in_v = nn.Parameter(torch.empty(controller_hidden, hidden_size))
            self.bias_in = nn.Parameter(torch.empty(controller_hidden))
            self.weight_out = nn.Parameter(torch.empty(3 * hidden_size, controller_hidden))
            self.bias_out = nn.Parameter(torch.empty(3 * hidden_size))
        else:
            # Shape (1,), not (): sharding wrappers require a dimension.
            size = hidden_size if adaptive == "channel" else 1
            self.alpha_raw = nn.Parameter(torch.empty(size))
            self.beta_raw = nn.Parameter(torch.empty(size))
            self.gate_raw = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset every parameter: exactly the initial coefficients, mu = 0."""
        super().reset_parameters()
        # Python floats are fp64: the only rounding is to the dtype of the parameter.
        raw = (_logit(self.init_alpha), _inverse_softplus(self.init_beta), _logit(self.init_gate))
        if self.adaptive == "token":
            # The range of nn.Linear over [h; v], whose 2·D inputs these two matrices split.
            bound = 1.0 / math.sqrt(2 * self.hidden_size)
            nn.init.uniform_(self.weight_in_h, -bound, bound)
            nn.init.uniform_(self.weight_in_v, -bound, bound)
            nn.init.zeros_(self.bias_in)
            nn.init.zeros_(self.weight_out)
            rows = self.bias_out.detach().chunk(3)
        else:
            rows = (self.alpha_raw, self.beta_raw, self.gate_raw)
        for row, value in zip(rows, raw, strict=True):
            nn.init.constant_(row, value)

    def forward(
        self, h: Tensor, v: Tensor | None = None, force: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Advance the state by one step.

        Args:
            h: Position (..., D).
            v: Velocity, shaped like `h`; None means zero.
            force: External force, shaped like `h`; None means zero.

        Returns:
            (h_next, v_next): h_next in the dtype of `h`, v_next in the dtype of `v` (of `h` if v is
            None).

        Raises:
            ValueError: If a shape does not fit.
        """
        self._check_inputs(h, v, force)
        bounds: dict[str, Any] = {
            "dt": self.dt,
            "beta_max": self.beta_max,
            "velocity_max": self.velocity_max,
            "mu_min": self.mu_min,
            "mu_max": self.mu_max,
        }
        if self.adaptive == "token":
            h_next, v_next = ops.inl_controlled_step(
                h,
                v,
                self._hidden(h, v),
                self.weight_out,
                self.bias_out,
                self._mu(),
                force,
                **bounds,
            )
        else:
            h_next, v_next = ops.inl_step(h, v, *self._raw(v), self._mu(), force, **bounds)
        # In this order the compiler stops at the constant and does not guard on the switch.
        if not torch.compiler.is_compiling() and self._collecting:
            self._collect(h, v, v_next)
        return h_next, v_next

    def _raw(self, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The learned coefficients as the operations get them; see `defer_bounds`."""
        gate = self.gate_raw if v is not None else idle_too(self.gate_raw, self.alpha_raw)
        beta = self.beta_raw
        if self._defers_bounds and self.beta_max is not None:
            beta = beta.to(torch.promote_types(beta.dtype, torch.float32))
            # Its softplus must not be above the bound by rounding: the operation would decide.
            ceiling = self.beta_max * (1 - 8 * torch.finfo(beta.dtype).eps)
            inside = beta.clamp(max=_inverse_softplus(ceiling))
            # With the bound in place, the slope of softplus is taken at the parameter.
            beta = _passing(beta, inside, (beta.sigmoid() / inside.sigmoid()).detach())
        return self.alpha_raw, beta, gate

    def _apply_bounds(self) -> None:
        super()._apply_bounds()
        if self.adaptive != "token" and self.beta_max is not None:
            wide = self.beta_raw.to(torch.promote_types(self.beta_raw.dtype, torch.float32))
            _block(self.beta_raw, F.softplus(wide) > self.beta_max, -1)

    def _hidden(self, h: Tensor, v: Tensor | None) -> Tensor:
        """Hidden state of the controller (..., controller_hidden)."""
        if v is None:
            return F.silu(_linear(h, self.weight_in_h, idle_too(self.bias_in, self.weight_in_v)))
        hidden = _linear(h, self.weight_in_h, self.bias_in)
        return F.silu(hidden + _linear(v.to(h.dtype), self.weight_in_v))

    def _coefficients(self, h: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Raw coefficients, as computed inside the step."""
        if self.adaptive != "token":
            return self._raw(v)
        raw = F.linear(self._hidden(h, v), self.weight_out, self.bias_out)
        alpha_raw, beta_raw, gate_raw = raw.chunk(3, dim=-1)
        return alpha_raw, beta_raw, gate_raw

    @torch.no_grad()
    def _collect(self, h: Tensor, v: Tensor | None, v_next: Tensor) -> None:
        raw = self._coefficients(h, v)
        self._record(*ops.inl_coefficients(*raw, beta_max=None), self.beta_max, v_next)

    def extra_repr(self) -> str:
        """Settings shown by ``print(module)``."""
        controller = f", controller_hidden={self.controller_hidden}"
        return (
            f"{super().extra_repr()}, init_alpha={self.init_alpha}, init_beta={self.init_beta}, "
            f"init_gate={self.init_gate}, beta_max={self.beta_max}, adaptive={self.adaptive!r}"
            f"{controller if self.adaptive == 'token' else ''}"
        )


class INLDynamicsLite(_Settling):
    """Second-order dynamics with fixed coefficients and a learned equilibrium mu (paper §8.1).

    With alpha = beta = 0, gate = dt = 1 and no bounds, ``force=f`` gives exactly h + f: the plain
    residual connection.

    Args:
        hidden_size: Channels D.
        alpha: Inertia, in [0, 1].
        beta: Correction strength, in [0, 2].
        gate: Share of the velocity that moves the position, in [0, 1].
        dt: Time step.
        velocity_max: Bound of each velocity; None for none. The position uses the clipped one.
        mu_min: Lower bound of the equilibrium mu, which starts at 0; None for none.
        mu_max: Upper bound of mu; None for none.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        hidden_size: int,
        alpha: float = 0.9,
        beta: float = 0.1,
        gate: float = 0.5,
        dt: float = 0.1,
        velocity_max: float | None = 10.0,
        mu_min: float | None = 0.0,
        mu_max: float | None = 2.0,
    ) -> None:
        super().__init__(hidden_size, dt, velocity_max, mu_min, mu_max)
        for name, value, top in (("alpha", alpha, 1.0), ("beta", beta, 2.0), ("gate", gate, 1.0)):
            if not 0.0 <= value <= top:
                raise ValueError(f"{name} must lie in [0, {top:g}], got {value}")
        self.alpha = alpha
        self.beta = beta
        self.gate = gate
        self.reset_parameters()

    def forward(
        self, h: Tensor, v: Tensor | None = None, force: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Advance the state by one step; arguments and results as in `INLDynamics.forward`."""
        self._check_inputs(h, v, force)
        h_next, v_next = ops.inl_update(
            h, v, self.alpha, self.beta, self.gate, self._mu(), force, dt=self.dt,
            velocity_max=self.velocity_max, mu_min=self.mu_min, mu_max=self.mu_max,
        )  # fmt: skip
        if not torch.compiler.is_compiling() and self._collecting:
            fixed = torch.tensor([self.alpha, self.beta, self.gate], device=v_next.device)
            self._record(fixed[0], fixed[1], fixed[2], None, v_next)
        return h_next, v_next

    def extra_repr(self) -> str:
        """Settings shown by ``print(module)``."""
        return f"{super().extra_repr()}, alpha={self.alpha}, beta={self.beta}, gate={self.gate}"


def defer_bounds(model: nn.Module, deferred: bool = True) -> None:
    """Leave the gradient rule of the bounds to `apply_bounds`, for gradients that come in parts.

    At a bound of mu, or of a beta per channel or layer, a gradient passes only if it leads back
    inside. Autograd decides that for each call of a module in a backward pass, which is exact if
    the call has the whole batch. With accumulated gradients, several processes or a module that is
    called repeatedly it sees a part; after this call all parts pass, and `apply_bounds` decides
    once, for their sum. The forward pass gives the same values, but for the rounding of a clipped
    beta.
    """
    for module in model.modules():
        if isinstance(module, Dynamics):
            module._defers_bounds = deferred


@torch.no_grad()
def apply_bounds(model: nn.Module) -> None:
    """Apply the gradient rule of the bounds to the gradients of a step, where it was deferred.

    To be called when the gradients are complete (accumulated and reduced), before they are clipped.
    """
    for module in model.modules():
        if isinstance(module, Dynamics) and module._defers_bounds:
            module._apply_bounds()


def idle_too(value: Tensor, idle: Tensor) -> Tensor:
    """The vector `value`, with a gradient of zero for the parameter `idle`.

    A step without velocity makes no use of the parameters that multiply it, and
    DistributedDataParallel waits for a gradient of every parameter.
    """
    if not (torch.is_grad_enabled() and idle.requires_grad):
        return value
    return torch.cat([value, idle.flatten()[:0].to(value.dtype)])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of operands that may differ in dtype, in the wider one; autocast has its own."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(x.dtype, weight.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return F.linear(x, weight, bias)


def _passing(raw: Tensor, inside: Tensor, slope: Tensor | float = 1.0) -> Tensor:
    """The value of `inside`, exactly, with the gradient `slope` with respect to `raw`."""
    return inside.detach() + (raw - raw.detach()) * slope


def _block_outside(parameter: nn.Parameter, minimum: float | None, maximum: float | None) -> None:
    """Apply the gradient rule of `bounded_clamp` to the gradient of a parameter."""
    if minimum is not None:
        _block(parameter, parameter < minimum, 1)
    if maximum is not None:
        _block(parameter, parameter > maximum, -1)


def _block(parameter: nn.Parameter, outside: Tensor, sign: int) -> None:
    """Set gradients of a sign, at entries beyond a bound, to 0."""
    if parameter.grad is not None:
        leads_away = outside & (sign * parameter.grad > 0)
        parameter.grad.copy_(torch.where(leads_away, 0.0, parameter.grad))


@contextmanager
def collect_dynamics_stats(model: nn.Module) -> Iterator[None]:
    """Let every dynamics module of `model` collect statistics; blocks may nest.

    Inside the block each eager forward stores a few 0-dimensional tensors on its device without
    waiting for it; `get_dynamics_stats` converts them to floats, also after the block. A compiled
    forward collects nothing, and a forward under a ``torch.func`` transform must not run inside.
    """
    modules = [module for module in model.modules() if isinstance(module, Dynamics)]
    before = [module._collecting for module in modules]
    for module in modules:
        module._collecting = True
    try:
        yield
    finally:
        for module, collecting in zip(modules, before, strict=True):
            module._collecting = collecting


def branch_epilogue(
    dynamics: INLDynamics | INLDynamicsLite,
    x: Tensor,
    v: Tensor | None,
    residual: Tensor,
    conditions: tuple[Tensor, Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `dynamics` to a sub-layer's output, add it to the residual stream, normalise the sum.

    With coefficients per channel or layer, or fixed ones, this is `ops.inl_branch_epilogue`, which
    a compiler fuses. With a token controller, or where a kernel computes the step, it is the step
    and then the norm of the sum: two kernels, which took less time than one for both in the rows. A
    subclass, whose step may differ, and a module with hooks (`is_plain`) are called.

    Args:
        dynamics: The module applied to `x`.
        x: Sub-layer output (B, ..., D).
        v: Velocity, shaped like `x`; None means zero.
        residual: Residual stream, shaped like `x`.
        conditions: (gate of the sum, shift, scale), each (B, D), of AdaLN; None for a plain sum.
        weight: Weight of the norm (D,), or None for ones.
        eps: Added to the mean square.

    Returns:
        (the normed sum in the dtype of `x`, the sum in the dtype of `residual`, the velocity).
    """
    collecting = not torch.compiler.is_compiling() and dynamics._collecting
    if (
        collecting
        or not is_plain(dynamics, INLDynamics, INLDynamicsLite)
        or (
            isinstance(dynamics, INLDynamics)
            and (dynamics.adaptive == "token" or ops.takes_kernel("inl_step", [x]))
        )
    ):
        x, v_next = dynamics(x, v)
        if conditions is None:
            return *ops.add_rms_norm(x, residual, weight, eps), v_next
        return *ops.gated_residual_norm(residual, x, *conditions, weight, eps), v_next
    if isinstance(dynamics, INLDynamics):
        coefficients = ops.inl_coefficients(*dynamics._raw(v), beta_max=dynamics.beta_max)
    else:
        coefficients = dynamics.alpha, dynamics.beta, dynamics.gate
    dynamics._check_inputs(x, v, None)
    return ops.inl_branch_epilogue(
        x, v, *coefficients, dynamics._mu(), residual, *(conditions or (None, None, None)), weight,
        eps, dt=dynamics.dt, velocity_max=dynamics.velocity_max,
        mu_min=dynamics.mu_min, mu_max=dynamics.mu_max,
    )  # fmt: skip
