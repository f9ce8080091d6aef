"""Hypothesis profiles. `repeatable` (the default, and CI's) tries the same examples every time; `search` looks for new
ones: `pytest --hypothesis-profile search tests/property`.
"""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("search", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("repeatable")
