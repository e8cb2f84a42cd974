"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """A test that draws without a seed of its own draws the same each time, in any order."""
    torch.manual_seed(0)
