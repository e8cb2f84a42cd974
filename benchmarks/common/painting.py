"""Sampling settings of the benchmarks."""

from dataclasses import replace

from benchmarks.common.timing import DEVICE

from complexity_dit.config import EvalSampleConfig

ON_A_GPU = 256
"""Images per call of the network on a GPU, which the default of 16 leaves idle. The bits of a set
depend on it, its distances only by rounding."""


def painting(**settings):
    """The sampling of an evaluation, unguided unless told otherwise; large batches on a GPU."""
    config = EvalSampleConfig(**settings)
    if DEVICE == "cpu":
        return config
    return replace(config, batch_size=ON_A_GPU, chunk_size=ON_A_GPU)
