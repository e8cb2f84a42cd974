"""Seeds as pure functions of their purpose.

Every random number of a run comes from a generator seeded by (run seed, purpose, position). Nothing
depends on how many numbers were drawn before, so a resumed run, another batch size or another world
size draws the same numbers, and there is no generator state to save.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Derive a 63-bit seed for one purpose at one position.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, e.g. "noise"; separates streams of equal position.
        position: Integers such as the training step or the image index.
    """
    key = ",".join([purpose, str(seed), *map(str, position)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Seed a generator by `derive_seed`, on the CPU so that all devices get the same numbers."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, purpose, *position))
