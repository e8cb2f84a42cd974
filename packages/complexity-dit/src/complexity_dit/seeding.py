"""Seeds as pure functions of their purpose.

Every random number of a run comes from a generator seeded by (run seed, purpose, position). Nothing
depends on how many numbers were drawn before, so a resumed run, another batch size or another world
size draws the same numbers, and there is no generator state to save.
"""

import hashlib

import numpy as np
import torch

SEEDING = 2
"""Version of the random numbers of a run. A checkpoint names it, and a run that is resumed goes on
with its own; checkpoints of 0.1.0 name none and have version 1."""


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Derive a 63-bit seed for one purpose at one position.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, e.g. "noise"; separates streams of equal position.
        position: Integers such as the training step or the image index.
    """
    digest = hashlib.sha256(_key(seed, purpose, *position)).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform(seed: int, purpose: str, *position: int) -> float:
    """A random number in [0, 1), with the arguments of `derive_seed`."""
    return (derive_seed(seed, purpose, *position) >> 10) * 2.0**-53


def generator_for(
    seed: int, purpose: str, *position: int, version: int = SEEDING
) -> torch.Generator:
    """A generator for one purpose at one position, with the arguments of `derive_seed`.

    It is on the CPU, so that all devices get the same numbers. `manual_seed` takes only 32 bits
    there: of 100,000 pictures of a set one would be another once more. So from version 2 on the
    whole state is derived.
    """
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, purpose, *position))
    return generator if version == 1 else with_state(generator, _key(seed, purpose, *position))


def with_state(generator: torch.Generator, key: bytes) -> torch.Generator:
    """Fill the state of a newly seeded CPU generator from a key, by SHAKE-256."""
    words = np.frombuffer(hashlib.shake_256(key).digest(4 * _WORDS), "<u4").astype("<u8")
    state = generator.get_state()
    state[_OFFSET : _OFFSET + 8 * _WORDS] = torch.from_numpy(words.view(np.uint8))
    return generator.set_state(state)


def _key(seed: int, purpose: str, *position: int) -> bytes:
    return ",".join([purpose, str(seed), *map(str, position)]).encode()


_WORDS, _OFFSET = 624, 24
"""Words of the state of a Mersenne Twister, each as 8 bytes, and where torch keeps them."""
