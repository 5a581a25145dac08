"""From embeddings to speakers: the back-end, in NumPy alone.

It is fitted by :func:`spkid.backend.fit.fit_backend`, which needs
scikit-learn.
"""

from spkid.backend.scoring import (
    MOST,
    MOST_PAIRS,
    Backend,
    Calibration,
    Tail,
    check_rate,
    log_softmax,
    unit,
)

__all__ = [
    "Backend",
    "Calibration",
    "MOST",
    "MOST_PAIRS",
    "Tail",
    "check_rate",
    "log_softmax",
    "unit",
]
