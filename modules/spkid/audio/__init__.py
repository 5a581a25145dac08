"""Recordings: from a sound file to the speech in it, without torch."""

from spkid.audio.facts import AudioFacts, audio_facts
from spkid.audio.reading import SAMPLE_RATE
from spkid.audio.silence import remove_silence
from spkid.audio.speech import (
    PEAK,
    SILENCES,
    read_speech,
    speech,
    speech_blocks,
    speech_windows,
)

__all__ = [
    "AudioFacts",
    "PEAK",
    "SAMPLE_RATE",
    "SILENCES",
    "audio_facts",
    "read_speech",
    "remove_silence",
    "speech",
    "speech_blocks",
    "speech_windows",
]
