"""What holds for every test."""

import pytest
import torch

from inl_core import cpu_attention


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """A test that draws without a seed of its own draws the same each time, in any order."""
    torch.manual_seed(0)


@pytest.fixture
def product_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the queries that attention by products in bf16 was called with."""
    seen, own = [], cpu_attention.attention
    monkeypatch.setattr(
        cpu_attention, "attention", lambda q, *a, **k: seen.append(q.shape) or own(q, *a, **k)
    )
    return seen
