"""What all tests share."""

from collections import Counter

import torch
from hypothesis import settings
from speechbrain.utils.importutils import LazyModule

# hypothesis asks every loaded module for its file; SpeechBrain's lazy modules
# answer by importing what isn't installed, and the error ends the test run.
LazyModule.__file__ = None

# The same examples in every run: a red test must be red tomorrow. No deadline:
# nothing is timed in a test.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first, so that both processes end at
    about the same time."""
    slow = Counter(
        item.path for item in items if item.get_closest_marker("slow")
    )
    items.sort(key=lambda item: -slow[item.path])
