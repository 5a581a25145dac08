"""From a recording to log-mels, as in the HW4 feature files.

:mod:`spkid.audio` makes speech at 16 kHz of a recording, with its peak at -3
dB and without its silences; 40 log-mel bands are computed here, 100 frames a
second. The mean is left in: :class:`spkid.features.UtteranceNorm` removes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torchaudio.transforms import MelSpectrogram

from spkid.audio import SAMPLE_RATE, speech, speech_blocks

CHUNK = 30 * SAMPLE_RATE  # samples that are transformed at once


class LogMel(torch.nn.Module):
    """Natural logarithm of torchaudio's mel power spectrogram.

    SpeechBrain's ``Fbank`` isn't used because it gives decibels, and limits
    them to a range below the maximum.

    Arguments
    ---------
    sample_rate : int
        Samples per second.
    n_fft : int
        Length of the Fourier transform in samples.
    win_length : int
        Length of the periodic Hann window in samples.
    hop_length : int
        Samples from one frame to the next.
    n_mels : int
        Number of mel bands (HTK scale, unit peak).
    f_min : float
        Lower edge of the first band in Hz; the last one ends at half the
        sample rate.
    floor : float
        Smaller powers are raised to this before the logarithm.

    Example
    -------
    >>> log_mel = LogMel()
    >>> log_mel(torch.zeros(2, 16000)).shape
    torch.Size([2, 101, 40])
    """

    def __init__(
        self,
        *,
        sample_rate: int = SAMPLE_RATE,
        n_fft: int = 400,
        win_length: int = 400,
        hop_length: int = 160,
        n_mels: int = 40,
        f_min: float = 50.0,
        floor: float = 1e-9,
    ) -> None:
        super().__init__()
        self.floor = floor
        self.melspectrogram = MelSpectrogram(
            sample_rate=sample_rate,
            n_fft=n_fft,
            win_length=win_length,
            hop_length=hop_length,
            n_mels=n_mels,
            f_min=f_min,
            power=2.0,
            center=True,
        )

    def forward(self, wavs: torch.Tensor) -> torch.Tensor:
        """Maps [batch, samples] to [batch, 1 + samples // hop_length, n_mels].

        Raises
        ------
        ValueError
            If there are no more than n_fft / 2 samples.
        """
        half = self.melspectrogram.n_fft // 2
        if wavs.dim() != 2 or wavs.shape[1] <= half:
            raise ValueError(
                "Waveforms must have the shape [batch, samples] with more than "
                f"{half} samples, not {list(wavs.shape)}."
            )
        mel = self.melspectrogram(wavs)
        return mel.clamp(min=self.floor).log().transpose(1, 2)


def log_mel_of_blocks(
    blocks: Iterable[np.ndarray], logmel: LogMel
) -> torch.Tensor:
    """Log-mels of a waveform that comes in blocks, as of the whole.

    Only a chunk of the waveform is held. Two chunks overlap by the frames
    whose windows reach over a chunk's end.

    Arguments
    ---------
    blocks : iterable of np.ndarray [samples]
        Float32.
    logmel : LogMel
        On any device.

    Returns
    -------
    torch.Tensor [frames, n_mels]
        On the device of ``logmel``.

    Raises
    ------
    ValueError
        If there are too few samples for a frame.

    Example
    -------
    >>> wave, log_mel = np.random.rand(48000).astype("float32"), LogMel()
    >>> parts = log_mel_of_blocks(np.split(wave, 3), log_mel)
    >>> whole = log_mel(torch.from_numpy(wave)[None])[0]
    >>> torch.equal(parts, whole)
    True
    """
    spectrogram = logmel.melspectrogram
    hop, half = spectrogram.hop_length, spectrogram.n_fft // 2
    overlap = -(-half // hop)
    device = spectrogram.mel_scale.fb.device
    held, known, done = np.zeros(0, np.float32), 0, bytearray()

    def frames(stop: int | None = None) -> bytes:
        mel = logmel(torch.from_numpy(held).to(device)[None])[0]
        return mel[known:stop].cpu().numpy().tobytes()

    for block in blocks:
        held = np.concatenate((held, block))
        if len(held) > CHUNK:
            whole = (len(held) - half) // hop + 1
            done += frames(whole)
            held, known = held[(whole - overlap) * hop :], overlap
    done += frames()
    # Joining a list of parts would hold all frames twice.
    joined = torch.frombuffer(done, dtype=torch.float32).to(device)
    return joined.view(-1, spectrogram.n_mels)


def waveform_to_features(
    waveform: torch.Tensor,
    sample_rate: int,
    logmel: LogMel | None = None,
    silence: str = "hw4",
) -> torch.Tensor:
    """Makes the features of one recording.

    Arguments
    ---------
    waveform : torch.Tensor [samples] or [channels, samples]
        At any scale, since the peak is normalised.
    sample_rate : int
        Samples per second of the waveform.
    logmel : LogMel, optional
        One to use again; None: made here.
    silence : str
        "hw4" removes it as in the HW4 feature files, "vad" by a detector; see
        :func:`spkid.audio.speech_blocks`.

    Returns
    -------
    torch.Tensor [frames, n_mels]
        Float32, 10 ms a frame, on the waveform's device.

    Raises
    ------
    ValueError
        If the shape is wrong, a sample isn't finite, or all is silence.

    Example
    -------
    >>> stereo = torch.ones(2, 44100)
    >>> waveform_to_features(stereo, 44100).shape
    torch.Size([101, 40])
    """
    kept = speech(waveform.detach().cpu().numpy(), sample_rate, silence)
    logmel = LogMel().to(waveform.device) if logmel is None else logmel
    return log_mel_of_blocks([kept], logmel)


def load_features(path: str | Path, silence: str = "hw4") -> torch.Tensor:
    """Makes the features of an audio file of any length.

    Arguments
    ---------
    path : str or pathlib.Path
        Any format that libsndfile reads: WAV, FLAC, Ogg, MP3, ...; with PyAV
        also M4A and others.
    silence : str
        As of :func:`waveform_to_features`.

    Returns
    -------
    torch.Tensor [frames, n_mels]
        As of :func:`waveform_to_features`.

    Raises
    ------
    ValueError
        If the file isn't readable audio, or holds only silence.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "tone.wav"
    >>> soundfile.write(path, np.cos(np.arange(16000) * 0.1), 16000)
    >>> load_features(path).shape
    torch.Size([101, 40])
    """
    return log_mel_of_blocks(speech_blocks(path, silence), LogMel())
