"""From a recording to log-mels, as in the HW4 feature files.

A recording is averaged to mono, resampled to 16 kHz and normalised to a peak
of -3 dB; silences are removed; 40 log-mel bands are computed, 100 frames a
second. The mean is left in: :class:`spkid.features.UtteranceNorm` removes it.
"""

from __future__ import annotations

from pathlib import Path

import soundfile
import torch
from torchaudio.functional import resample
from torchaudio.transforms import MelSpectrogram

SAMPLE_RATE = 16000  # Hz, of every feature
PEAK = 10 ** (-3 / 20)  # -3 dB of full scale


def remove_silence(
    waveform: torch.Tensor,
    sample_rate: int = SAMPLE_RATE,
    min_silence: float = 0.1,
    threshold: float = 0.01,
) -> torch.Tensor:
    """Removes long silences, as ``sox silence 1 0.1 1% -1 0.1 1%`` does.

    A sample is loud if the root mean square of the 20 ms that end with it
    reaches the threshold. Loud and quiet runs alternate. Of the runs of at
    least ``min_silence``, loud ones are kept and quiet ones removed; a shorter
    run is treated like the last long one before it. So a short pause inside
    speech is kept, and a click inside a silence is removed.

    Arguments
    ---------
    waveform : torch.Tensor [samples]
        Floating point, with full scale at 1.
    sample_rate : int
        Samples per second.
    min_silence : float
        Shortest silence that is removed and shortest sound that ends it, in
        seconds.
    threshold : float
        Root mean square of the quietest sound, as a fraction of full scale.

    Returns
    -------
    torch.Tensor [kept samples]
        The kept parts, joined; empty if nothing is loud.

    Example
    -------
    >>> tone = torch.cos(torch.arange(8000) * 0.1)
    >>> recording = torch.cat([tone, torch.zeros(16000), tone])
    >>> remove_silence(recording).numel()  # 20 ms of the silence remain
    16319
    """
    if waveform.dim() != 1:
        raise ValueError(
            "A waveform must have the shape [samples], not "
            f"{list(waveform.shape)}."
        )
    if len(waveform) == 0:
        return waveform
    window = round(0.02 * sample_rate)
    energy = waveform.double().square().cumsum(0)
    energy[window:] -= energy[:-window].clone()
    loud = energy >= window * threshold**2

    is_loud, run, length = loud.unique_consecutive(
        return_inverse=True, return_counts=True
    )
    index = torch.arange(1, len(length) + 1, device=waveform.device)
    is_long = length >= min_silence * sample_rate
    last_long = torch.where(is_long, index, 0).cummax(0).values
    # Index 0, where there is no long run yet, counts as silence.
    kept = torch.cat([is_loud.new_zeros(1), is_loud])[last_long]
    return waveform[kept[run]]


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


def waveform_to_features(
    waveform: torch.Tensor,
    sample_rate: int,
    logmel: LogMel | None = None,
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

    Returns
    -------
    torch.Tensor [frames, n_mels]
        Float32, 10 ms a frame.

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
    if waveform.dim() not in (1, 2):
        raise ValueError(
            "A recording must have the shape [samples] or [channels, samples], "
            f"not {list(waveform.shape)}."
        )
    waveform = waveform.float()
    if waveform.dim() == 2:
        waveform = waveform.mean(0)
    if sample_rate != SAMPLE_RATE:
        waveform = resample(waveform, sample_rate, SAMPLE_RATE)
    peak = waveform.abs().max() if len(waveform) else torch.zeros(())
    if not peak.isfinite():
        raise ValueError("The recording has samples that are not finite.")
    # Digital silence must not become NaN.
    smallest = torch.finfo(waveform.dtype).tiny
    waveform = remove_silence(waveform * (PEAK / peak.clamp(min=smallest)))
    if len(waveform) == 0:
        raise ValueError(
            "The recording is silent: no sound lasts 0.1 s or longer."
        )
    logmel = LogMel().to(waveform.device) if logmel is None else logmel
    return logmel(waveform.unsqueeze(0)).squeeze(0).contiguous()


def load_features(path: str | Path) -> torch.Tensor:
    """Makes the features of an audio file.

    Arguments
    ---------
    path : str or pathlib.Path
        Any format that libsndfile reads: WAV, FLAC, Ogg, MP3, ...

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
    >>> import tempfile
    >>> tone = torch.cos(torch.arange(16000) * 0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/tone.wav", tone.numpy(), 16000)
    ...     load_features(f"{folder}/tone.wav").shape
    torch.Size([101, 40])
    """
    try:
        samples, sample_rate = soundfile.read(
            path, dtype="float32", always_2d=True
        )
        return waveform_to_features(torch.from_numpy(samples.T), sample_rate)
    except (ValueError, soundfile.LibsndfileError) as error:
        raise ValueError(f"{path}: {error}") from error
