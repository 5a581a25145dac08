"""Who is this, is this the same voice: what a trained system is asked.

No PyTorch is imported here: an ONNX model answers the same questions.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spkid.audio import SAMPLE_RATE, speech_blocks, speech_windows
from spkid.backend import Backend, unit
from spkid.errors import AudioError, UserError

FPIR = 0.01  # of strangers, who may be taken for an enrolled speaker
MISSED = 0.05  # of recordings of enrolled speakers, called unknown
FALSE_ALARM = 0.01  # of pairs of different speakers, called the same
PIECE = 40 * SAMPLE_RATE  # a longer recording than two is cut into such
CANDIDATES = 5  # that an answer lists
WINDOW = 3.0  # seconds
LONGEST_NAME = 200
MIN_WINDOW = SAMPLE_RATE // 4  # samples


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording, and who speaks there (None: unknown)."""

    start: float  # seconds
    end: float
    speaker: str | None
    probability: float


@dataclass(frozen=True)
class Identification:
    """Who speaks in a recording.

    Attributes
    ----------
    file : str
        The recording.
    answer : str
        "known", "unknown", or "unsure": a longer recording may tell.
    speaker : str or None
        The name, if the answer is "known".
    probability : float
        That it is the likeliest speaker, if it is an enrolled one.
    score, threshold : float
        Of the likeliest speaker, and what a known one needs.
    likeliest : tuple of (str, float)
        Speakers and their probabilities, the likeliest first.
    seconds : float
        Of speech.
    segments : tuple of Segment
        Who speaks when, where that was asked.
    """

    file: str
    answer: str
    speaker: str | None
    probability: float
    score: float
    threshold: float
    likeliest: tuple[tuple[str, float], ...]
    seconds: float
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Verification:
    """Whether two recordings are of one speaker."""

    same: bool
    score: float
    threshold: float


def pieces(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cuts speech into what is embedded at once, in bounded memory.

    Up to 80 s stay whole, as in training's test of the HW4 data, whose longest
    utterance has 72 s. More is cut into pieces of 20 to 40 s.

    Example
    -------
    >>> hour = np.zeros(3600 * SAMPLE_RATE, np.float32)
    >>> [len(piece) // SAMPLE_RATE for piece in pieces([hour[:130 * 16000]])]
    [40, 40, 25, 25]
    """
    held, was_cut = np.zeros(0, np.float32), False
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) > 2 * PIECE:
            yield held[:PIECE]
            held, was_cut = held[PIECE:], True
    if was_cut and len(held) > PIECE:
        yield from np.array_split(held, 2)
    elif len(held):
        yield held


class Questions:
    """Asks a trained system, which embeds waveforms, about recordings.

    What implements this has the attributes ``backend`` (a
    :class:`spkid.backend.Backend`) and ``silence`` (of training's features, as
    in :func:`spkid.audio.speech_blocks`), and the method ``embed_waveforms``.
    A recording is a file of audio. All questions raise
    :class:`spkid.errors.AudioError`, which names the file, where one has no
    speech or can't be read.

    Example
    -------
    >>> class Loudness(Questions):
    ...     silence = "hw4"
    ...     backend = Backend.of_means(np.eye(2), ["ann", "bob"])
    ...     def embed_waveforms(self, waveforms):
    ...         return np.array([[1.0, 0.1] for waveform in waveforms])
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, np.sin(np.arange(16000)), 16000)
    >>> Loudness().identify(path, closed_set=True).speaker
    'ann'
    """

    backend: Backend
    silence: str

    def embed_waveforms(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings [n, size] of speech at 16 kHz, each [samples]."""
        raise NotImplementedError

    def embed_file(self, path: str | Path) -> tuple[np.ndarray, float]:
        """The embedding [size] of a recording, and its seconds of speech.

        Of a long one, it is the mean over pieces, each of length 1.
        """
        embeddings, samples = [], 0
        for piece in pieces(speech_blocks(path, self.silence)):
            embeddings.append(self.embed_waveforms([piece])[0])
            samples += len(piece)
        found = embeddings[0]
        if len(embeddings) > 1:
            found = unit(np.stack(embeddings)).mean(0)
        if not np.isfinite(found).all():
            raise AudioError(
                f"{path}: the model gives no finite embedding of it; train "
                "again, with a smaller --lr."
            )
        return found, samples / SAMPLE_RATE

    def embed_files(self, paths: Sequence[str | Path]) -> np.ndarray:
        """Embeddings [n, size] of recordings."""
        return np.stack([self.embed_file(path)[0] for path in paths])

    def identify(
        self,
        path: str | Path,
        fpir: float = FPIR,
        closed_set: bool = False,
    ) -> Identification:
        """Who speaks in a recording.

        Arguments
        ---------
        path : str or pathlib.Path
            The recording.
        fpir : float
            Share of strangers who may be taken for an enrolled speaker (false-
            positive identification rate). The threshold was chosen on sessions
            that training hasn't heard, with their speakers left out in turn.
        closed_set : bool
            It is an enrolled speaker: the answer is always a name.
        """
        embedding, seconds = self.embed_file(path)
        return self.answer(path, embedding, seconds, fpir, closed_set)

    def answer(
        self,
        path: str | Path,
        embedding: np.ndarray,
        seconds: float,
        fpir: float = FPIR,
        closed_set: bool = False,
    ) -> Identification:
        """As :meth:`identify`, of an embedding [size] at hand."""
        backend, name = self.backend, str(path)
        threshold = backend.threshold(fpir)
        if not backend.speakers:
            return Identification(
                file=name,
                answer="unknown",
                speaker=None,
                probability=0.0,
                score=0.0,
                threshold=threshold,
                likeliest=(),
                seconds=seconds,
            )
        posteriors = np.exp(backend.log_posteriors(embedding[None]))[0]
        order = posteriors.argsort(kind="stable")[::-1][:CANDIDATES].tolist()
        likeliest = tuple(
            (backend.speakers[i], float(posteriors[i])) for i in order
        )
        score = float(backend.scores(embedding[None])[0, order[0]])
        if closed_set or score >= threshold:
            answer = "known"
        elif score >= backend.rejection_threshold(MISSED):
            answer = "unsure"
        else:
            answer = "unknown"
        nearest, probability = likeliest[0]
        return Identification(
            file=name,
            answer=answer,
            speaker=nearest if answer == "known" else None,
            probability=probability,
            score=score,
            threshold=threshold,
            likeliest=likeliest,
            seconds=seconds,
        )

    def who_speaks_when(
        self, path: str | Path, fpir: float = FPIR, closed_set: bool = False
    ) -> tuple[Segment, ...]:
        """Identifies each stretch of at most 3 s of a recording alone.

        It is coarse: a window in which two speak gets one answer, and short
        windows are wrong more often than whole recordings. Neighbours with the
        same answer become one stretch; its probability is their mean. Times
        are the recording's. Arguments are those of :meth:`identify`.
        """
        found: list[list] = []  # start, end, speaker, probabilities
        for start, end, window in speech_windows(path, WINDOW):
            if len(window) < MIN_WINDOW:
                continue
            embedding = self.embed_waveforms([window])[0]
            answer = self.answer(path, embedding, 0.0, fpir, closed_set)
            if found and found[-1][2] == answer.speaker:
                found[-1][1] = end
                found[-1][3].append(answer.probability)
            else:
                found.append([start, end, answer.speaker, [answer.probability]])
        return tuple(
            Segment(start, end, speaker, float(np.mean(probabilities)))
            for start, end, speaker, probabilities in found
        )

    def verify(
        self,
        a: str | Path,
        b: str | Path,
        false_alarm: float = FALSE_ALARM,
    ) -> Verification:
        """Whether two recordings are of one speaker, enrolled or not.

        Arguments
        ---------
        a, b : str or pathlib.Path
            The recordings.
        false_alarm : float
            Share of pairs of different speakers that may be called the same.
        """
        one, other = self.embed_files([a, b])
        score = float(self.backend.pair_scores(one[None], other[None])[0, 0])
        threshold = self.backend.pair_threshold(false_alarm)
        return Verification(score >= threshold, score, threshold)

    def enroll(self, name: str, paths: Sequence[str | Path]) -> None:
        """Adds a speaker, or more recordings of one, without training."""
        name = unicodedata.normalize("NFC", name.strip())
        if not (name.isprintable() and 0 < len(name) <= LONGEST_NAME):
            raise UserError(
                f"{name!a:.60}: a speaker's name must be one line of at most "
                f"{LONGEST_NAME} letters; give another one."
            )
        self.set_backend(self.backend.enroll(name, self.embed_files(paths)))

    def forget(self, *names: str) -> None:
        """Removes speakers.

        The background keeps the mean of a speaker of training, without a name,
        and so do the network's weights: only training without the speaker
        removes that.
        """
        for name in names:
            if name not in self.backend.speakers:
                raise UserError(
                    f"{name}: nobody of that name is enrolled; "
                    f"{len(self.backend.speakers)} speakers are."
                )
        self.set_backend(self.backend.forget(*names))

    def set_backend(self, backend: Backend) -> None:
        """From now on answers by another back-end."""
        self.backend = backend
