"""Dynamics with one part replaced, for ablations.

A kind is a subclass of `INLDynamics` with the same parameters, so a module of a built model can be
turned into it (`turn_into`) without new random numbers: all variants of a seed start from the same
weights. `variants_lm` and `variants_dit` define the variants of each model.

All of it is plain PyTorch on the definitions of `inl_core`, so step times are those of unfused
code.
"""

import torch
from torch import nn

from inl_core import INLDynamics, bounded_clamp, integrators, ops


class OpenDynamics(INLDynamics):
    """`INLDynamics` with `coefficients`, `equilibrium` and `move` as methods to override."""

    def forward(self, h, v=None, force=None):
        self._check_inputs(h, v, force)
        if v is None:
            v = torch.zeros_like(h)
        alpha, beta, gate = self.coefficients(h, v, self.beta_max)
        h_next, v_next = self.move(h, v, alpha, beta, gate, self.equilibrium(h), force)
        if self._collecting:
            self._record(*self.coefficients(h, v, None), self.beta_max, v_next)
        return h_next, v_next

    def coefficients(self, h, v, beta_max):
        return ops.inl_coefficients(*self._coefficients(h, v), beta_max=beta_max)

    def equilibrium(self, h):
        return bounded_clamp(self.mu, self.mu_min, self.mu_max)

    def move(self, h, v, alpha, beta, gate, mu, force):
        """Equations (1)-(3) of `inl_core.reference`."""
        v_next = alpha * v - beta * (h - mu)
        v_next = self.clipped(v_next if force is None else v_next + force)
        return h + self.dt * gate * v_next, v_next

    def clipped(self, v):
        return v if self.velocity_max is None else v.clamp(-self.velocity_max, self.velocity_max)


class _Integrated(OpenDynamics):
    """Another integrator of the same equation; v is clipped after the step."""

    integrator = ""

    def move(self, h, v, alpha, beta, gate, mu, force):
        if force is not None:
            raise ValueError(f"{self.integrator} takes no force: use placement stream or branch")
        step = integrators.INTEGRATORS[self.integrator]
        h_next, v_next = step(h, v, alpha, beta, gate, mu, self.dt)
        return h_next, self.clipped(v_next)


class Leapfrog(_Integrated):
    integrator = "leapfrog"


class RK4(_Integrated):
    integrator = "rk4"


class Exact(_Integrated):
    integrator = "exact"


class ZeroSpring(OpenDynamics):
    """beta = clamp(b, 0, beta_max) instead of softplus, with b = 0 at the start.

    Together with v = 0 the layer is the identity in the first step of training. The gradient of
    `bounded_clamp` lets b return from below 0.
    """

    def start(self):
        rows = self.bias_out.chunk(3)[1] if self.adaptive == "token" else self.beta_raw
        nn.init.zeros_(rows.detach())

    def coefficients(self, h, v, beta_max):
        alpha_raw, beta_raw, gate_raw = self._coefficients(h, v)
        low = None if beta_max is None else 0.0  # None: the unclipped value
        return alpha_raw.sigmoid(), bounded_clamp(beta_raw, low, beta_max), gate_raw.sigmoid()


class Critical(OpenDynamics):
    """Critical damping (not in the paper): alpha = (1 - sqrt(p))² with p = dt gate beta.

    At this alpha the eigenvalues of the transition matrix, with trace 1 + alpha - p and determinant
    alpha, are equal: the fastest return to mu without overshoot. The controller's alpha is unused.
    """

    def coefficients(self, h, v, beta_max):
        _, beta, gate = super().coefficients(h, v, beta_max)
        pull = (self.dt * gate * beta).clamp(1e-8, 1.0)
        return (1 - pull.sqrt()).square(), beta, gate


class NoCarry(OpenDynamics):
    """No memory: every layer starts from v = 0, which leaves the spring and the gate."""

    def forward(self, h, v=None, force=None):
        return super().forward(h, None, force)


class Anchored(OpenDynamics):
    """An equilibrium per token (not in the paper): mu + the state that enters the network.

    The paper's mu is one point for all tokens; here the spring pulls towards the token's state
    before the first layer, as residual connections from the embedding do.
    """

    def equilibrium(self, h):
        return super().equilibrium(h) + self.anchor[0]


class PlainResidual(nn.Module):
    """Replaces a dynamics module under `force`: h + force, with v unchanged."""

    def forward(self, h, v=None, force=None):
        return h + force, v


def turn_into(module, kind):
    """Change the class of `module` to `kind` and keep its parameters."""
    if type(module) is not INLDynamics:
        raise ValueError(f"{type(module).__name__} cannot become {kind.__name__}: adaptive is lite")
    module.__class__ = kind
    if kind is ZeroSpring:
        module.start()


def dynamics_of(layers):
    """The dynamics modules of layers in execution order."""
    found = [
        getattr(layer, name)
        for layer in layers
        for name in ("dynamics", "dynamics_mlp")
        if hasattr(layer, name)
    ]
    if not found:
        raise ValueError("the network has no dynamics to replace: set dynamics_placement")
    return found


def kind_swap(kind):
    """A variant that turns every dynamics module into `kind`."""

    def swap(layers):
        for module in dynamics_of(layers):
            turn_into(module, kind)

    return swap


def anchor_swap(layers):
    """Anchored dynamics; a hook keeps the input of the first layer during a forward pass."""
    anchor = [None]
    for module in dynamics_of(layers):
        turn_into(module, Anchored)
        module.anchor = anchor

    def keep(layer, inputs):
        anchor[0] = inputs[0]

    layers[0].register_forward_pre_hook(keep)


def plain_swap(name):
    """A variant of `force` in which the sub-layer of dynamics module `name` is a plain residual."""

    def swap(layers):
        for layer in layers:
            if not hasattr(layer, name):
                raise ValueError(f"a layer has no {name}: use placement force")
            setattr(layer, name, PlainResidual())

    return swap


def scale_mlps(layers):
    """No dynamics: MLP outputs times a learned factor per channel (LayerScale, 2103.17239).

    Under `force` with alpha = 1/2 a branch is added 1 + 1/2 + 1/4 + ... = 2 times in total. The
    factor starts at 2, which shows how much of the effect comes from it.
    """
    for layer in layers:
        if layer.placement != "none":
            raise ValueError(f"layer-scale is for placement none, not {layer.placement}")
        width = next(layer.mlp.parameters()).shape[-1]
        layer.mlp.scale = nn.Parameter(torch.full((width,), 2.0))
        layer.mlp.register_forward_hook(lambda mlp, _, added: mlp.scale * added)


SWAPS = {
    "leapfrog": kind_swap(Leapfrog),
    "rk4": kind_swap(RK4),
    "exact": kind_swap(Exact),
    "zero-spring": kind_swap(ZeroSpring),
    "critical": kind_swap(Critical),
    "no-carry": kind_swap(NoCarry),
    "anchored": anchor_swap,
    "plain-attention": plain_swap("dynamics"),
    "plain-mlp": plain_swap("dynamics_mlp"),
    "layer-scale": scale_mlps,
}
"""Swaps that need only the list of layers, for both models."""
