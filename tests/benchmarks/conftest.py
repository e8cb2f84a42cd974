"""Fixtures that tests of the benchmarks share."""

import pytest
from transformers.utils import logging as transformers_logging

from dit.conftest import command, folders, own_cache, pipe, small_run, weights_cache

__all__ = ["command", "folders", "own_cache", "pipe", "small_run", "weights_cache"]


@pytest.fixture(autouse=True, scope="module")
def no_data():
    """The studies name a folder of data, which no test here reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLEXITY_DATA", "nowhere")
        yield


@pytest.fixture(autouse=True)
def own_verbosity():
    """Studies make transformers quiet in their process, whose Trainer prints otherwise then."""
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)
