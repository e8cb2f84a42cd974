"""How benchmarks paint what they measure."""

from dataclasses import replace

from benchmarks.common.timing import DEVICE

from complexity_dit.config import SampleConfig

ON_A_GPU = 256
"""Pictures in one call of the network there: sixteen, the default, leave it idle. A set's bits
depend on it, its distances only by rounding."""


def painting(**settings):
    """A `SampleConfig` whose calls are large where there is a GPU."""
    config = SampleConfig(**settings)
    if DEVICE == "cpu":
        return config
    return replace(config, batch_size=ON_A_GPU, chunk_size=ON_A_GPU)
