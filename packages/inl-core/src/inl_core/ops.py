"""One public name per operation: the only place that chooses an implementation.

Modules call ``ops.inl_step(...)`` and know nothing of backends. Today every device runs the
definition in `inl_core.reference`: plain PyTorch, transparent to the compiler, which fuses it with
its neighbours. Triton kernels arrive behind this same switch, under the same names and signatures.
Nothing here keeps state.
"""

from __future__ import annotations

from inl_core.reference import (
    add_rms_norm,
    bounded_clamp,
    gated_residual,
    inl_coefficients,
    inl_step,
    inl_update,
    modulated_rms_norm,
    qk_norm_rope,
    rms_norm,
    rotate,
    swiglu,
)

__all__ = [
    "add_rms_norm",
    "bounded_clamp",
    "gated_residual",
    "inl_coefficients",
    "inl_step",
    "inl_update",
    "modulated_rms_norm",
    "qk_norm_rope",
    "rms_norm",
    "rotate",
    "swiglu",
]
