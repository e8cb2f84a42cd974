"""Fixtures of the image model that tests of its benchmarks share."""

from dit.conftest import command, folders, own_cache, pipe, small_run, weights_cache

__all__ = ["command", "folders", "own_cache", "pipe", "small_run", "weights_cache"]
