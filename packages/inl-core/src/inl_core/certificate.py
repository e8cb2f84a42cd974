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

`certify_loop` measures a block that is applied several times (`inl_core.LoopedDynamics`), as one
map of the state (h, v) in which block and dynamics count together; `certify_loops` does so for the
loops of a model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inl_core import ops
from inl_core.dynamics import INLDynamics, INLDynamicsLite
from inl_core.looped import LoopedDynamics, LoopState
from inl_core.reference import bounded_clamp
from inl_core.stability import is_stable, spectral_radius, transition_matrix
from inl_core.watch import dynamics_modules, run_watched

_MOST_ITERATIONS, _TOLERANCE = 200, 1e-5
"""Of the power iteration, whose estimate grows towards the singular value."""

_KRYLOV = 60
"""Dimensions in which the Arnoldi iteration looks for the largest eigenvalue."""

__all__ = [
    "Certificate",
    "LayerCertificate",
    "LoopCertificate",
    "certify",
    "certify_loop",
    "certify_loops",
]


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
    modules = {
        module: name
        for name, module in dynamics_modules(model).items()
        if isinstance(module, (INLDynamics, INLDynamicsLite))
    }
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

    Every operation is differentiated twice: with the reference operations and the plain attention
    of PyTorch.
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

    return _largest_singular_value(*_linear_maps(entry, last), entry)


def _linear_maps(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:
    """Products with the Jacobian of `outputs` by `inputs`, and with its transpose.

    J x is computed as the derivative of Jᵀu with respect to u.
    """

    def transposed(values: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs,
            inputs,
            values,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )

    with torch.enable_grad():
        dual = [torch.zeros_like(x, requires_grad=True) for x in outputs]
        product = transposed(dual, create_graph=True)

    def applied(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(product, dual, values, retain_graph=True, materialize_grads=True)

    return applied, transposed


def _start(shaped_like: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(e.shape, generator=generator, dtype=torch.float64).to(e) for e in shaped_like
    ]


def _largest_singular_value(
    applied: Callable, transposed: Callable, shaped_like: Sequence[Tensor]
) -> float:
    """By power iteration, from below."""
    x, norm = _start(shaped_like), 0.0
    for _ in range(_MOST_ITERATIONS):
        size = _size(x)
        if size == 0.0:
            return 0.0
        x = [e / size for e in x]
        images = applied(x)
        before, norm = norm, _size(images)
        if abs(norm - before) <= _TOLERANCE * norm:
            break
        x = transposed(images)
    return norm


def _spectral_radius_of(applied: Callable, shaped_like: Sequence[Tensor]) -> float:
    """Largest modulus of an eigenvalue, by Arnoldi iteration.

    The Krylov space has `_KRYLOV` dimensions, or as many as there are numbers in the state, and
    then the value is exact. The start has a share of every eigenvector, so that a pair of complex
    eigenvalues, which a power iteration never settles on, is found like a real one.
    """
    most = min(_KRYLOV, sum(e.numel() for e in shaped_like))
    x = _start(shaped_like)
    basis = [_flat(x) / _size(x)]
    hessenberg = torch.zeros(most, most, dtype=torch.float64)
    for k in range(most):
        image = _flat(applied(_unflat(basis[k], shaped_like)))
        for _ in range(2):  # twice is enough for orthogonality to rounding
            for i, vector in enumerate(basis):
                share = float(vector @ image)
                hessenberg[i, k] += share
                image = image - share * vector
        rest = float(image.norm())
        if k + 1 == most or rest <= 1e-12 * float(hessenberg[: k + 1, k].norm()):
            hessenberg = hessenberg[: k + 1, : k + 1]
            break
        hessenberg[k + 1, k] = rest
        basis.append(image / rest)
    return float(torch.linalg.eigvals(hessenberg).abs().max())


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().double().flatten().cpu() for value in values])


def _unflat(vector: Tensor, shaped_like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([e.numel() for e in shaped_like])
    return [part.view(e.shape).to(e) for part, e in zip(parts, shaped_like, strict=True)]


@dataclass(frozen=True)
class LoopCertificate:
    """Measures of a loop along the states that it visited.

    Attributes:
        spectral_radius: For each repetition, the largest modulus of an eigenvalue of the Jacobian
            of the whole map (h, v) to (h', v'), block and dynamics, at the state it started from.
            Below 1 the frozen map contracts in the long run; for a map that varies from state to
            state it certifies nothing. Found by Arnoldi iteration, from within the spectrum.
        contraction: For each repetition but the first, |change of (h, v)| over that of the
            repetition before. Below 1 from some repetition on, the loop converges.
        response: The largest singular value of the Jacobian of all repetitions together, from the
            first (h, v) to the last: the most that a small disturbance of the start has grown.
    """

    spectral_radius: tuple[float, ...]
    contraction: tuple[float, ...]
    response: float

    @property
    def frozen_stable(self) -> bool:
        """Whether the frozen map is stable at every state that was visited."""
        return all(radius < 1.0 for radius in self.spectral_radius)

    def __str__(self) -> str:
        """A table with one line per repetition, and the response below it."""
        lines = ["repetition  radius  contraction"]
        ratios = ("-", *(f"{ratio:.4f}" for ratio in self.contraction))
        for i, (radius, ratio) in enumerate(zip(self.spectral_radius, ratios, strict=True), 1):
            lines.append(f"{i:10d} {radius:7.4f} {ratio:>12}")
        lines.append(f"response of the last state to the first: {self.response:.3f}")
        return "\n".join(lines)


def certify_loop(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    h: Tensor,
    v: Tensor | None = None,
    num_loops: int = 8,
) -> LoopCertificate:
    """Measure the stability of a loop along real inputs, block and dynamics together.

    Args:
        step: One repetition, (h, v) to (h', v'), shaped like its arguments: for a block `f` and
            `dynamics` of class `LoopedDynamics`, ``lambda h, v: dynamics(h, v, f(h), mu)``. It must
            be differentiable twice; attention and our operations are run in forms that are.
        h: Start of the loop (..., D).
        v: First velocity, shaped like `h`; None means zero.
        num_loops: Repetitions to follow, at least 1.

    Returns:
        The measures; `print` shows them as a table.

    Raises:
        ValueError: If `num_loops` is below 1.
    """
    if num_loops < 1:
        raise ValueError(f"num_loops must be at least 1, got {num_loops}")
    state = [h.detach(), torch.zeros_like(h) if v is None else v.detach()]
    radii, changes = [], []
    with ops.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        first = [x.clone().requires_grad_() for x in state]
        with torch.enable_grad():
            last: Sequence[Tensor] = first
            for _ in range(num_loops):
                last = step(*last)
        response = _largest_singular_value(*_linear_maps(first, last), first)
        for _ in range(num_loops):
            point = [x.clone().requires_grad_() for x in state]
            with torch.enable_grad():
                reached = step(*point)
            radii.append(_spectral_radius_of(_linear_maps(point, reached)[0], point))
            changes.append(_size([a.detach() - b for a, b in zip(reached, state, strict=True)]))
            state = [x.detach() for x in reached]
    ratios = [after / before if before else 0.0 for before, after in itertools.pairwise(changes)]
    return LoopCertificate(tuple(radii), tuple(ratios), response)


def certify_loops(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], num_loops: int = 8
) -> dict[str, LoopCertificate]:
    """Measure every loop of a model where the forward of real inputs enters it.

    Args:
        model: Any module that calls `LoopedDynamics.loop`.
        inputs: Arguments of one forward of the model, as in `certify`.
        num_loops: Repetitions to follow, at least 1, however many the forward computes.

    Returns:
        `certify_loop` of each loop by the name of its dynamics.

    Raises:
        ValueError: If the model has no loop with dynamics, or the forward did not run it.
    """
    loops = {n: m for n, m in dynamics_modules(model).items() if isinstance(m, LoopedDynamics)}
    if not loops:
        raise ValueError(f"{type(model).__name__} has no LoopedDynamics to certify")
    found: dict[str, LoopCertificate] = {}

    def watched(name: str, module: LoopedDynamics) -> Callable[..., LoopState]:
        def loop(
            block: Callable, x: Tensor, count: int, v: Tensor | None = None, **kwargs: Any
        ) -> LoopState:
            mu = module.equilibrium(x).detach()

            def step(h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                out = block(h)
                return module(h, v, out[0] if isinstance(out, tuple) else out, mu)

            found[name] = certify_loop(step, x, v, num_loops)
            return type(module).loop(module, block, x, count, v, **kwargs)

        return loop

    for name, module in loops.items():
        module.loop = watched(name, module)
    try:
        run_watched(model, inputs)
    finally:
        for module in loops.values():
            del module.loop
    if idle := sorted(loops.keys() - found.keys()):
        raise ValueError(f"the forward of these inputs did not run {', '.join(idle)}")
    return found


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
