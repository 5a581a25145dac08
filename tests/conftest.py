"""What all tests share."""

import torch
from hypothesis import settings
from speechbrain.utils.importutils import LazyModule

# hypothesis asks every loaded module for its file; SpeechBrain's lazy modules
# answer by importing what isn't installed, and the error ends the test run.
LazyModule.__file__ = None

# The same examples in every run: a red test must be red tomorrow.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
