"""Encoders, poolings and classifiers, all exact under padding.

An utterance's embedding doesn't depend on what shares its batch.
:class:`SpeakerEmbedding` takes SpeechBrain's relative lengths; every other
module takes numbers of frames, and refuses fractions.
"""

from spkid.models.conformer import ConformerEncoder
from spkid.models.embedding import SpeakerEmbedding
from spkid.models.margin import (
    AAMSoftmax,
    AMSoftmax,
    Cosines,
    LinearSoftmax,
)
from spkid.models.pooling import (
    AttentiveStatisticsPooling,
    FirstFramePooling,
    MeanPooling,
    SelfAttentivePooling,
)
from spkid.models.transformer import TransformerEncoder
from spkid.models.whitened import WhitenedCosine

__all__ = [
    "AAMSoftmax",
    "AMSoftmax",
    "AttentiveStatisticsPooling",
    "ConformerEncoder",
    "Cosines",
    "FirstFramePooling",
    "LinearSoftmax",
    "MeanPooling",
    "SelfAttentivePooling",
    "SpeakerEmbedding",
    "TransformerEncoder",
    "WhitenedCosine",
]
