"""Hypothesis profiles; COMPLEXITY_HYPOTHESIS=long tries 50 times as many cases."""

import os

from hypothesis import HealthCheck, settings

QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "short", max_examples=40, deadline=None, database=None, derandomize=True,
    suppress_health_check=QUIET,
)  # fmt: skip
settings.register_profile(
    "long", max_examples=2000, deadline=None, database=None, suppress_health_check=QUIET
)
settings.load_profile(os.environ.get("COMPLEXITY_HYPOTHESIS", "short"))
