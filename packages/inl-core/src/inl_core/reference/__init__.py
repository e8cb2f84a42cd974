"""Every operation in plain PyTorch: the definition that any faster implementation must match.

Arithmetic is fp32, or fp64 if a tensor argument is fp64; results are rounded once, to the dtype of
the argument they replace. Numbers in parentheses are the equations of INL dynamics:

    e  = h - mu                                                        (1)
    v' = clip(alpha * v - beta * e + f, -velocity_max, velocity_max)   (2)
    h' = h + dt * gate * v'                                            (3)

Shape letters: B batch, N tokens, H heads, D channels, Dh channels of one head.
"""

from inl_core.reference.bounds import BoundedClamp, bounded_clamp
from inl_core.reference.dynamics import (
    inl_branch_epilogue,
    inl_coefficients,
    inl_controlled_step,
    inl_step,
    inl_update,
    looped_step,
)
from inl_core.reference.layers import (
    add_rms_norm,
    attention,
    gated_residual,
    gated_residual_norm,
    modulated_rms_norm,
    qk_norm_rope,
    rms_norm,
    rotate,
    swiglu,
)
from inl_core.segments import routed_mlp

__all__ = [
    "BoundedClamp",
    "add_rms_norm",
    "attention",
    "bounded_clamp",
    "gated_residual",
    "gated_residual_norm",
    "inl_branch_epilogue",
    "inl_coefficients",
    "inl_controlled_step",
    "inl_step",
    "inl_update",
    "looped_step",
    "modulated_rms_norm",
    "qk_norm_rope",
    "rms_norm",
    "rotate",
    "routed_mlp",
    "swiglu",
]
