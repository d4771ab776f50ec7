"""Settings and helpers of the tests with random input.

SHUNTED_LIT_LONG=1 tries thousands of examples instead of tens, as the README says.
"""

import os

from hypothesis import HealthCheck, settings

LONG = os.environ.get("SHUNTED_LIT_LONG") == "1"


def examples(few, many):
    """Return hypothesis settings for `few` examples, or for `many` in a long run."""
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(deadline=None, max_examples=many if LONG else few, suppress_health_check=suppressed)


def key_paths(content, path=()):
    """Yield the path of each key and index of nested dictionaries and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from key_paths(value, (*path, key))
