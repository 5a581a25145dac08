"""From embeddings to speakers: the back-end, in NumPy alone.

It is fitted by :func:`spkid.backend.fit.fit_backend`, which needs
scikit-learn.
"""

from spkid.backend.scoring import Backend, Calibration, Tail, log_softmax, unit

__all__ = ["Backend", "Calibration", "Tail", "log_softmax", "unit"]
