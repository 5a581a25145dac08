"""The trained system, for use after training.

An ONNX model is used without PyTorch, so what needs it is imported when it is
asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spkid.inference.opening import load
from spkid.inference.questions import (
    Identification,
    Questions,
    Verification,
)

if TYPE_CHECKING:
    from spkid.inference.identifier import WEIGHTS, SpeakerIdentifier

__all__ = [
    "Identification",
    "Questions",
    "SpeakerIdentifier",
    "Verification",
    "WEIGHTS",
    "load",
]


def __getattr__(name: str) -> Any:
    """Imports what needs PyTorch."""
    if name not in ("SpeakerIdentifier", "WEIGHTS"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("spkid.inference.identifier"), name)
