"""Fixtures of the image model that tests of its benchmarks share."""

from dit.conftest import pipe, small_run

__all__ = ["pipe", "small_run"]
