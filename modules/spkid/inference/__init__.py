"""The trained system, for use after training."""

from spkid.inference.identifier import WEIGHTS, SpeakerIdentifier

__all__ = ["WEIGHTS", "SpeakerIdentifier"]
