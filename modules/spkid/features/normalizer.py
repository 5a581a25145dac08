"""What SpeechBrain's interfaces do to a recording that they load."""

from __future__ import annotations

import torch

from spkid.audio import speech


class SpeechNormalizer:
    """Speech of a recording at 16 kHz, as :func:`spkid.audio.read_speech`.

    SpeechBrain's ``load_audio`` calls it if it is ``audio_normalizer`` in a
    model's hyperparams.yaml.

    Arguments
    ---------
    silence : str
        "vad" or "hw4"; see :func:`spkid.audio.speech_blocks`.

    Example
    -------
    >>> stereo = torch.ones(44100, 2)
    >>> SpeechNormalizer("hw4")(stereo, 44100).shape
    torch.Size([16000])
    """

    def __init__(self, silence: str = "vad") -> None:
        self.silence = silence

    def __call__(self, audio: torch.Tensor, sample_rate: int) -> torch.Tensor:
        """Maps [time] or [time, channels] to [samples].

        Raises
        ------
        ValueError
            If there is no speech, or a sample isn't finite.
        """
        kept = speech(audio.T.cpu().numpy(), sample_rate, self.silence)
        return torch.from_numpy(kept).to(audio.device)
