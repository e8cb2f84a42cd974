"""Stability of the dynamics of a model: four measures, none of which implies another.

1. *Frozen points*: whether each (alpha, beta, gate) that a layer uses is stable when held constant
   (`inl_core.stability`). For coefficients that vary from layer to layer this certifies nothing.
2. *Reach*: with a velocity clip no layer moves a channel by more than dt * gate * velocity_max,
   and all layers together by no more than the sum. Valid for any input; usually loose.
3. *Gain* along given inputs: the factor by which each layer, including its clip, stretches the
   pairs (h - mu, v) of these inputs, and the norm of the product of the frozen matrices along the
   path of each token. Forces are external and left out, and so are attention and MLP: with
   `branch`, h is another branch in every layer, and no state follows that product.
4. *Response* along given inputs: the largest growth of a small disturbance of the state (h, v) from
   the first dynamics module to the last, through everything that the model computes in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inl_core import ops
from inl_core.dynamics import INLDynamics, INLDynamicsLite
from inl_core.reference import bounded_clamp
from inl_core.stability import is_stable, spectral_radius, transition_matrix
from inl_core.watch import dynamics_modules, run_watched

_MOST_ITERATIONS, _TOLERANCE = 200, 1e-5
"""Of the power iteration, whose estimate grows towards the singular value."""

__all__ = ["Certificate", "LayerCertificate", "certify"]


@dataclass(frozen=True)
class LayerCertificate:
    """Measures of one dynamics module.

    Attributes:
        name: The module's name in the model.
        points: Number of frozen points examined.
        stable_share: Share of them that is stable by Jury's test.
        spectral_radius: The largest of them.
        always_stable: Whether every point within the module's bounds is stable, in exact
            arithmetic. In fp32 a sigmoid beyond about 17 is 1, which is marginal: `stable_share`
            counts such a point as not stable.
        reach: dt * gate * velocity_max, with the largest possible gate; infinite without a velocity
            clip.
        gain: The largest |(h' - mu, v')| / |(h - mu, v)| over tokens, without a force; None without
            inputs.
    """

    name: str
    points: int
    stable_share: float
    spectral_radius: float
    always_stable: bool
    reach: float
    gain: float | None


@dataclass(frozen=True)
class Certificate:
    """Measures of a model.

    Attributes:
        layers: One entry per dynamics module, in order of execution.
        frozen_product: The largest spectral norm, over tokens and channels, of the product of the
            frozen matrices in that order; None without inputs or if shapes differ between layers.
            It is how a disturbance of (h, v) would grow if it met these matrices alone; the
            network's own growth is `response`, which may be larger or smaller.
        response: The largest singular value of the Jacobian of the network, from the (h, v) that
            its first dynamics module receives to the (h, v) that its last one returns, along these
            inputs; None without inputs. Found by power iteration, so from below, to about 1e-3.
    """

    layers: tuple[LayerCertificate, ...]
    frozen_product: float | None
    response: float | None

    @property
    def frozen_stable(self) -> bool:
        """Whether every examined frozen point is stable."""
        return all(layer.stable_share == 1.0 for layer in self.layers)

    @property
    def reach(self) -> float:
        """The sum of the layers' reach."""
        return sum(layer.reach for layer in self.layers)

    def summary(self) -> dict[str, Any]:
        """Measures by name, as plain values; gains only if there were inputs."""
        result: dict[str, Any] = {
            "frozen_points_stable": self.frozen_stable,
            "largest_spectral_radius": max(layer.spectral_radius for layer in self.layers),
            "stable_whatever_the_coefficients": all(layer.always_stable for layer in self.layers),
            "reach": self.reach,
        }
        gains = [layer.gain for layer in self.layers if layer.gain is not None]
        if gains:
            result["largest_gain_of_a_layer"] = max(gains)
            result["norm_of_the_frozen_product"] = self.frozen_product
            result["response_of_the_network"] = self.response
        return result

    def __str__(self) -> str:
        """A table with one line per layer, and the measures of the model below it."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}   points  stable  radius  always   reach    gain"]
        for layer in self.layers:
            gain = "-" if layer.gain is None else f"{layer.gain:.3f}"
            lines.append(
                f"{layer.name:{width}} {layer.points:8d} {layer.stable_share:7.1%} "
                f"{layer.spectral_radius:7.4f} {'yes' if layer.always_stable else 'no':>7} "
                f"{layer.reach:7.3f} {gain:>7}"
            )
        product, response = (
            "not measured" if value is None else f"{value:.3f}"
            for value in (self.frozen_product, self.response)
        )
        lines += [
            f"frozen points stable: {'all' if self.frozen_stable else 'not all'}",
            f"reach of all layers: {self.reach:.3f}",
            f"norm of the product of the frozen matrices: {product}",
            f"response of the network to a disturbance of its state: {response}",
        ]
        return "\n".join(lines)


def certify(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | None = None
) -> Certificate:
    """Measure the stability of every dynamics module of a model.

    Args:
        model: Any module with `INLDynamics` or `INLDynamicsLite` in it.
        inputs: Arguments of one forward of the model: keywords as a mapping, or positional ones as
            a sequence. It runs in eval mode without gradients. None uses the parameters alone; for
            a token controller that is the single point at which its hidden layer is zero.

    Returns:
        The measures; `print` shows them as a table.

    Raises:
        ValueError: If the model has no dynamics, or the forward did not run one of them.
    """
    modules = {module: name for name, module in dynamics_modules(model).items()}
    if not modules:
        raise ValueError(f"{type(model).__name__} has no INLDynamics or INLDynamicsLite to certify")
    with torch.no_grad():
        if inputs is None:
            layers = (_layer(name, m, _point(m), None) for m, name in modules.items())
            return Certificate(tuple(layers), None, None)
        return _along_inputs(model, modules, inputs)


def _along_inputs(
    model: nn.Module, modules: dict[Any, str], inputs: Mapping[str, Any] | Sequence[Any]
) -> Certificate:
    layers: list[LayerCertificate] = []
    product: list[Tensor | None] = []

    def measure(module: Any, args: tuple[Any, ...], kwargs: dict, outputs: Any) -> None:
        given = dict(zip(("h", "v", "force"), args, strict=False)) | kwargs
        h, v = given["h"], given.get("v")
        point = _point(module, h, v)
        if given.get("force") is not None:
            outputs = module.forward(h, v)  # a call would run this hook again
        layers.append(_layer(modules[module], module, point, _gain(module, h, v, outputs)))
        alpha, beta, gate = (x.expand(h.shape) for x in point)
        matrix = transition_matrix(alpha, beta, gate, module.dt)
        if not product:
            product.append(matrix)
        elif product[0] is not None:
            same = product[0].shape == matrix.shape
            product[0] = matrix @ product[0] if same else None

    handles = [module.register_forward_hook(measure, with_kwargs=True) for module in modules]
    try:
        run_watched(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    idle = sorted(set(modules.values()) - {layer.name for layer in layers})
    if idle:
        raise ValueError(f"the forward of these inputs did not run {', '.join(idle)}")
    path = product[0]
    norm = None if path is None else float(torch.linalg.matrix_norm(path, ord=2).max())
    return Certificate(tuple(layers), norm, _response(model, list(modules), inputs))


def _response(
    model: nn.Module, modules: Sequence[nn.Module], inputs: Mapping[str, Any] | Sequence[Any]
) -> float:
    """The largest singular value of the Jacobian between the first and the last dynamics module.

    J x is computed as the derivative of Jᵀu with respect to u, so every operation is differentiated
    twice: with the reference operations and the plain attention of PyTorch.
    """
    entry: list[Tensor] = []
    last: list[Tensor] = []

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict) -> tuple[tuple, dict] | None:
        if entry:
            return None
        given = dict(zip(("h", "v", "force"), args, strict=False)) | kwargs
        h = given["h"].detach().clone()
        v = given.get("v")
        v = torch.zeros_like(h) if v is None else v.detach().clone()
        entry.extend((h.requires_grad_(), v.requires_grad_()))
        return (), given | {"h": h, "v": v}

    def leave(module: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        last[:] = outputs

    handles: list[Any] = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        with ops.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
            run_watched(model, inputs, gradients=True)
    finally:
        for handle in handles:
            handle.remove()

    def transposed(values: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            last,
            entry,
            values,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )

    with torch.enable_grad():
        dual = [torch.zeros_like(x, requires_grad=True) for x in last]
        product = transposed(dual, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(e.shape, generator=generator, dtype=torch.float64).to(e) for e in entry]
    norm = 0.0
    for _ in range(_MOST_ITERATIONS):
        size = _size(x)
        if size == 0.0:
            return 0.0
        x = [e / size for e in x]
        images = torch.autograd.grad(product, dual, x, retain_graph=True, materialize_grads=True)
        before, norm = norm, _size(images)
        if abs(norm - before) <= _TOLERANCE * norm:
            break
        x = list(transposed(images))
    return norm


def _size(values: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def _point(module: Any, h: Tensor | None = None, v: Tensor | None = None) -> list[Tensor]:
    """The activated coefficients (alpha, beta, gate), in fp64, that the module uses for a state.

    Without a state a token controller is taken where its hidden layer is zero.
    """
    if isinstance(module, INLDynamicsLite):
        values = [module.alpha, module.beta, module.gate]
        return list(module.mu.new_tensor(values, dtype=torch.float64))
    if h is None and module.adaptive == "token":
        raw = module.bias_out.chunk(3)
    else:
        raw = module._coefficients(h, v)
    return [x.double() for x in ops.inl_coefficients(*raw, beta_max=module.beta_max)]


def _gain(module: Any, h: Tensor, v: Tensor | None, outputs: tuple[Tensor, Tensor]) -> float:
    mu = bounded_clamp(module.mu.double(), module.mu_min, module.mu_max)
    before = (h.double() - mu).square().sum(-1)
    if v is not None:
        before = before + v.double().square().sum(-1)
    h_next, v_next = outputs
    after = (h_next.double() - mu).square().sum(-1) + v_next.double().square().sum(-1)
    moved = before > 0  # a token at rest at mu has no gain
    return float((after[moved] / before[moved]).max().sqrt()) if bool(moved.any()) else 1.0


def _layer(name: str, module: Any, point: list[Tensor], gain: float | None) -> LayerCertificate:
    alpha, beta, gate = torch.broadcast_tensors(*point)
    learned = isinstance(module, INLDynamics)
    # A token controller can reach any gate below 1, also beyond those of these inputs.
    gate_max = 1.0 if learned and module.adaptive == "token" else float(gate.max())
    clip = math.inf if module.velocity_max is None else module.velocity_max
    stable = is_stable(alpha, beta, gate, module.dt)
    if learned:
        # 0 < alpha, gate < 1 and 0 < beta <= beta_max, so dt gate beta < dt beta_max; the least
        # bound 2 (1 + alpha) is 2.
        always = module.beta_max is not None and module.dt * module.beta_max <= 2.0
    else:
        always = bool(stable.all())
    return LayerCertificate(
        name=name,
        points=stable.numel(),
        stable_share=float(stable.double().mean()),
        spectral_radius=float(spectral_radius(alpha, beta, gate, module.dt).max()),
        always_stable=always,
        reach=module.dt * gate_max * clip,
        gain=gain,
    )
