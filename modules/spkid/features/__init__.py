"""Log-mel features: from a recording to the encoder's input.

:class:`UtteranceNorm` and :class:`Preprocess` take SpeechBrain's relative
lengths; the augmentations take numbers of frames, and refuse fractions.
"""

from spkid.audio import SAMPLE_RATE
from spkid.features.augment import ChannelAugment, SpectrogramMasking
from spkid.features.frontend import (
    LogMel,
    load_features,
    log_mel_of_blocks,
    waveform_to_features,
)
from spkid.features.preprocess import (
    NORMALIZATIONS,
    Preprocess,
    UtteranceNorm,
    utterance_statistics,
)

__all__ = [
    "ChannelAugment",
    "LogMel",
    "NORMALIZATIONS",
    "Preprocess",
    "SAMPLE_RATE",
    "SpectrogramMasking",
    "UtteranceNorm",
    "load_features",
    "log_mel_of_blocks",
    "utterance_statistics",
    "waveform_to_features",
]
