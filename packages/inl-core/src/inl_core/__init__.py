"""INL dynamics, norms, rotary embeddings, routed MLPs and stability theory for PyTorch.

`inl_core.ops` has the operations as functions, `inl_core.reference` their definitions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inl_core import integrators, ops, reference, stability
    from inl_core.certificate import (
        Certificate,
        LoopCertificate,
        certify,
        certify_loop,
        certify_loops,
    )
    from inl_core.dynamics import (
        DYNAMICS_STATS,
        INLDynamics,
        INLDynamicsLite,
        apply_bounds,
        branch_epilogue,
        collect_dynamics_stats,
        defer_bounds,
    )
    from inl_core.looped import LoopedDynamics, LoopState, draw_num_loops
    from inl_core.norms import ModulatedRMSNorm, RMSNorm, is_plain, norm_and_rotate
    from inl_core.reference import bounded_clamp
    from inl_core.rotary import apply_rotary, rotary_1d, rotary_2d
    from inl_core.routing import (
        RoutingPlan,
        TokenRoutedMLP,
        build_routing_table,
        make_routing_plan,
    )
    from inl_core.stability import (
        is_stable,
        lyapunov,
        settling_steps,
        spectral_radius,
        transition_matrix,
    )
    from inl_core.watch import DYNAMICS_COLUMNS, dynamics_modules, read_dynamics

__version__ = "0.1.0"

# Imported on first use: `inl_core.run` and the help pages of the commands do not need torch.
_MODULES = ("integrators", "ops", "reference", "stability")
_HOMES = {
    "Certificate": "certificate",
    "certify": "certificate",
    "LoopCertificate": "certificate",
    "certify_loop": "certificate",
    "certify_loops": "certificate",
    "DYNAMICS_STATS": "dynamics",
    "INLDynamics": "dynamics",
    "INLDynamicsLite": "dynamics",
    "collect_dynamics_stats": "dynamics",
    "apply_bounds": "dynamics",
    "defer_bounds": "dynamics",
    "branch_epilogue": "dynamics",
    "LoopState": "looped",
    "LoopedDynamics": "looped",
    "draw_num_loops": "looped",
    "ModulatedRMSNorm": "norms",
    "RMSNorm": "norms",
    "is_plain": "norms",
    "norm_and_rotate": "norms",
    "bounded_clamp": "reference",
    "apply_rotary": "rotary",
    "rotary_1d": "rotary",
    "rotary_2d": "rotary",
    "RoutingPlan": "routing",
    "TokenRoutedMLP": "routing",
    "build_routing_table": "routing",
    "make_routing_plan": "routing",
    "is_stable": "stability",
    "lyapunov": "stability",
    "settling_steps": "stability",
    "spectral_radius": "stability",
    "transition_matrix": "stability",
    "DYNAMICS_COLUMNS": "watch",
    "dynamics_modules": "watch",
    "read_dynamics": "watch",
}

__all__ = [
    "DYNAMICS_COLUMNS",
    "DYNAMICS_STATS",
    "Certificate",
    "INLDynamics",
    "INLDynamicsLite",
    "LoopCertificate",
    "LoopState",
    "LoopedDynamics",
    "ModulatedRMSNorm",
    "RMSNorm",
    "RoutingPlan",
    "TokenRoutedMLP",
    "__version__",
    "apply_bounds",
    "apply_rotary",
    "bounded_clamp",
    "branch_epilogue",
    "build_routing_table",
    "certify",
    "certify_loop",
    "certify_loops",
    "collect_dynamics_stats",
    "defer_bounds",
    "draw_num_loops",
    "dynamics_modules",
    "integrators",
    "is_plain",
    "is_stable",
    "lyapunov",
    "make_routing_plan",
    "norm_and_rotate",
    "ops",
    "read_dynamics",
    "reference",
    "rotary_1d",
    "rotary_2d",
    "settling_steps",
    "spectral_radius",
    "stability",
    "transition_matrix",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # not called again for this name
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
