"""What every test file shares: how Hypothesis draws its examples.

The same examples on every run, no deadline (a busy machine is not a bug). ``ci`` is the same, and
prints what is needed to repeat a failure; ``wide`` looks further, with fresh examples each time:
``make test ARGS='--hypothesis-profile=wide'``.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("ci", settings.get_profile("same"), print_blob=True)
settings.register_profile(
    "wide",
    derandomize=False,
    deadline=None,
    max_examples=2_000,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "same")
