"""Fixtures that tests of the benchmarks share."""

import pytest

from dit.conftest import command, folders, own_cache, pipe, small_run, weights_cache

__all__ = ["command", "folders", "own_cache", "pipe", "small_run", "weights_cache"]


@pytest.fixture(autouse=True, scope="module")
def no_data():
    """The studies name a folder of data, which no test here reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLEXITY_DATA", "nowhere")
        yield
