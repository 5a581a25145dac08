#!/usr/bin/env python3
"""Builds a small corpus of synthetic speech in the form of the HW4 data.

Usage: python mini_corpus.py FOLDER [--seed 0] [--n_speakers 24]
                             [--n_sessions 4] [--n_sentences 5]
                             [--recordings DIR]

With it the whole recipe runs without the real data. By default, 24 espeak-ng
voices read everyday sentences. Each recording session has its own room, noise,
microphone and mood of the speaker. As in the real task, the test consists of
sessions that are not in the training set. On one machine, the same arguments
give the same bytes. DIR gets what the features were made of, as
speaker/session/uttr-….wav.
"""

import signal

if __name__ in ("__main__", "__mp_main__") and (
    signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):  # Ctrl-C in the imports is quiet
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import fftconvolve, firwin2, resample_poly
from tqdm import tqdm

from spkid.errors import UserError, run_command
from spkid.features import SAMPLE_RATE, LogMel, waveform_to_features
from spkid.keys import KEYS, Range

SEED = KEYS["seed"].allowed
N_SPEAKERS = Range(1, 9990)  # names have four digits
UP_TO_1000 = Range(1, 1000)
ACCENTS = """\
en-us en-us-nyc en-029 en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-gb-scotland
"""
# Without monsters, robots and near twins, and without the breathy and Klatt
# voices, whose noise espeak-ng draws anew each time.
VARIANTS = """\
Andrea Andy Annie Gene Hugo Jacky Lee Marco Michael Mike anika antonio aunty
belinda boris ed f1 f4 grandma grandpa ian john linda m1 m2 m4 m6 m7 m8 miguel
norbert pablo paul quincy rob shelby steph travis
"""
SENTENCES = """\
The old kettle began to sing on the kitchen stove. We took the early train and
walked home along the coast. My sister paints small boats on pieces of
driftwood. Please leave the blue folder on the desk by the window. There was
not a single cloud over the harbour this morning. He forgot his umbrella again
and came home soaking wet. The bakery on the corner sells warm bread until
noon. Could you water the tomatoes while we are away? Their dog sleeps under
the table whenever it thunders. I have read this chapter twice and still miss
the point. The children built a castle from empty cardboard boxes. Nobody
expected the match to end with such a high score. She keeps her grandfather's
watch in a wooden drawer. The bus to the airport leaves every fifteen minutes.
After dinner we played cards and listened to the radio. A thin layer of ice
covered the pond behind the school. Which of these two jackets would you wear
in the rain? The museum opens at ten and closes late on Thursdays. He fixed the
squeaking door with a drop of olive oil. Our neighbours grow pumpkins as big as
footballs. The letter had been lying under the doormat for weeks. I would
rather cycle to work than sit in traffic. Fresh snow makes the whole street
strangely quiet. She ordered soup, a green salad and a pot of tea. The path
through the forest is shorter but very steep. Yesterday the power went out just
before the film ended. Put a pinch of salt into the dough and let it rest. The
librarian knew exactly where that atlas was kept. Two swans and seven ducks
live beside the old mill. We should call the plumber before the leak gets
worse. His first guitar cost less than a pair of shoes. The view from the tower
reaches as far as the hills. Have you ever tried to fold a paper crane? The
garden smells best in the hour after a storm. They moved the piano upstairs
with four strong friends. My phone was in the pocket of the other coat. The
judge asked everyone to rise and then to sit down. In winter the lighthouse
keeper wrote long funny letters. A good pair of boots will last you many years.
The recipe asks for three eggs and a cup of sugar. Someone has parked a yellow
van in front of our gate. I usually wake up a minute before the alarm rings.
The teacher drew a large map of the river on the board. Why does the moon look
bigger near the horizon? She whistled a tune that all of us knew from
childhood. The market was full of apples, plums and late peaches. He measured
the shelf twice and cut the board once. Our team meets on Monday mornings in
the small room. The ferry was delayed because of fog on the lake. Grandmother
hid the chocolate behind the cookery books. It takes about an hour to drive
around the island. The clock in the hall has always been a little slow. You can
borrow my ladder as long as you return it. A grey cat watched us from the roof
of the barn. The concert began quietly with a single violin. We planted an oak
tree on the day she was born. The last page of the notebook was torn out. Turn
left at the bridge and follow the stone wall. The engine coughed twice before
it finally started. Every evening the baker's son feeds the sparrows.
"""


class Espeak:
    """The speech synthesiser espeak-ng, from the package espeakng_loader.

    The library keeps the phase of the voice in static variables, so its output
    depends on its earlier output. Each instance therefore loads its own copy.

    Raises
    ------
    UserError
        If the package is missing or its library can't be loaded.

    Example
    -------
    >>> speech = Espeak().speak("Good morning.", "en-us+m3")
    >>> speech.dtype, 0.4 < len(speech) / 22050 < 1.5
    (dtype('float64'), True)
    """

    SYNCHRONOUS, NO_EXIT, UTF8, CHARACTER = 2, 0x8000, 1, 1  # speak_lib.h
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self) -> None:
        try:
            import espeakng_loader

            source = espeakng_loader.get_library_path()
            with tempfile.TemporaryDirectory(
                ignore_cleanup_errors=True  # Windows keeps loaded files
            ) as folder:
                self.library = ctypes.CDLL(shutil.copy(source, folder))
            data = os.fsencode(espeakng_loader.get_data_path())
            self.sample_rate = self.library.espeak_Initialize(
                self.SYNCHRONOUS, 0, data, self.NO_EXIT
            )
            if self.sample_rate <= 0:
                raise OSError("espeak_Initialize failed")
        except (ImportError, OSError) as error:
            raise UserError(
                f"espeak-ng, which the mini corpus needs, can't be loaded "
                f"({error}); run `pip install espeakng-loader`, or give your "
                "own data with --data_folder."
            ) from error
        samples, count = ctypes.POINTER(ctypes.c_short), ctypes.c_int
        prototype = ctypes.CFUNCTYPE(count, samples, count, ctypes.c_void_p)
        self._chunks = []
        self._callback = prototype(self._receive)  # keep it alive
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            chunk = np.ctypeslib.as_array(samples, (count,))
            self._chunks.append(chunk / 2**15)
        return 0  # continue

    def speak(
        self,
        text: str,
        voice: str,
        rate: float = 170,
        pitch: float = 50,
        pitch_range: float = 50,
    ) -> np.ndarray:
        """Synthesises a text.

        Arguments
        ---------
        text : str
            The text.
        voice : str
            Accent and variant, such as "en-us+m3".
        rate : float
            Words per minute, 80 to 450; rounded.
        pitch, pitch_range : float
            0 to 99; 50 is the voice's default; rounded.

        Returns
        -------
        np.ndarray [samples]
            Float64 within ±1, at `sample_rate`.
        """
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice '{voice}'.")
        self.library.espeak_SetParameter(self.RATE, round(rate), 0)
        self.library.espeak_SetParameter(self.PITCH, round(pitch), 0)
        self.library.espeak_SetParameter(self.RANGE, round(pitch_range), 0)
        self._chunks.clear()
        data = text.encode()
        size = ctypes.c_size_t(len(data) + 1)
        self.library.espeak_Synth(
            data, size, 0, self.CHARACTER, 0, self.UTF8, None, None
        )
        self.library.espeak_Synchronize()
        return np.concatenate(self._chunks)


class _Session:
    """One recording session: the speaker's mood, room, noise, microphone."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rate = rng.uniform(0.93, 1.07)  # times the speaker's rate
        self.pitch = rng.normal(0, 3)  # espeak-ng steps
        self.snr = rng.uniform(10, 30)  # dB
        self.noise_mix = rng.dirichlet(np.ones(3))  # white, pink, hum

        decay_time = rng.uniform(0.1, 0.5)  # RT60 in seconds
        time = np.arange(int(decay_time * SAMPLE_RATE)) / SAMPLE_RATE
        tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / decay_time)
        direct_to_tail = 10 ** (rng.uniform(3, 15) / 20)
        self.room = tail / np.linalg.norm(tail) / direct_to_tail
        self.room[0] = 1.0

        frequencies = np.geomspace(50, SAMPLE_RATE / 2, 65)
        octaves = np.log2(frequencies / 1000)
        knots = np.linspace(octaves[0], octaves[-1], 8)
        gain = np.interp(octaves, knots, rng.normal(0, 4, len(knots)))
        gain += rng.normal(0, 1.5) * octaves  # tilt in dB per octave
        low, high = np.log2(rng.uniform((0.06, 3.4), (0.3, 8.0)))
        gain -= 24 * np.maximum(0, np.maximum(low - octaves, octaves - high))
        self.microphone = firwin2(
            401,
            np.concatenate([[0], frequencies]),
            10 ** (np.concatenate([gain[:1], gain]) / 20),
            fs=SAMPLE_RATE,
        )

    def record(
        self, speech: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Adds room, noise and microphone to clean speech [samples]."""
        samples = len(speech)
        white, pink = rng.standard_normal((2, samples))
        spectrum = np.fft.rfft(pink)
        spectrum /= np.sqrt(np.arange(1, len(spectrum) + 1))
        pink = np.fft.irfft(spectrum, samples)
        time = np.arange(samples) / SAMPLE_RATE + rng.uniform()
        hum = sum(np.sin(2 * np.pi * 50 * k * time) / k for k in range(1, 8))
        noise = sum(
            np.sqrt(share) * part / part.std()
            for share, part in zip(
                self.noise_mix, (white, pink, hum), strict=True
            )
        )
        heard = fftconvolve(speech, self.room)[:samples]
        noise *= heard.std() * 10 ** (-self.snr / 20)
        return fftconvolve(heard + noise, self.microphone, mode="same")


def _start_worker() -> None:
    """Uses one core; exits with the parent, which Ctrl-C is for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=follow_parent, daemon=True).start()


def _write_wav(path: Path, waveform: torch.Tensor) -> None:
    """Writes float32 samples; a power of two that brings the peak below 1
    changes no bit of their features."""
    scale = 0.5 ** int(np.frexp(waveform.abs().max().item())[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    # soundfile would write the time of day into a file of floats.
    wavfile.write(path, SAMPLE_RATE, (waveform * scale).float().numpy())


def _record_speaker(
    folder, recordings, seed, n_sessions, n_sentences, number, name, voice
) -> list[tuple[int, dict]]:
    """Writes one speaker's files; returns each one's (session, entry)."""
    rng = np.random.default_rng([seed, 1, number])
    rate, pitch, pitch_range = rng.uniform((150, 30, 30), (195, 70, 70))
    sentences = re.findall(r"\S[^.?]*[.?]", SENTENCES.replace("\n", " "))
    texts = itertools.cycle(rng.permutation(sentences).tolist())
    espeak, logmel = Espeak(), LogMel()
    entries = []
    for session in range(n_sessions + 1):
        rng = np.random.default_rng([seed, 2, number, session])
        occasion = _Session(rng)
        manner = rate * occasion.rate, pitch + occasion.pitch, pitch_range
        for i in range(n_sentences + (session == n_sessions)):
            speech = espeak.speak(next(texts), voice, *manner)
            speech = resample_poly(speech, SAMPLE_RATE, espeak.sample_rate)
            waveform = torch.from_numpy(occasion.record(speech, rng))
            features = waveform_to_features(waveform, SAMPLE_RATE, logmel)
            key = f"{seed}/{name}/{session}/{i}".encode()
            path = f"uttr-{hashlib.blake2b(key, digest_size=16).hexdigest()}.pt"
            torch.save(features, folder / path)
            if recordings:
                place = recordings / name / f"session{session}"
                _write_wav((place / path).with_suffix(".wav"), waveform)
            entry = {"feature_path": path, "mel_len": len(features)}
            entries.append((session, entry))
    return entries


def _tables(recorded, n_sessions, rng):
    """The JSON files by name, made of each speaker's (session, entry) pairs."""
    train, test, labels, sessions = {}, [], {}, {}
    for speaker, entries in recorded.items():
        train[speaker] = [entry for k, entry in entries if k < n_sessions]
        tested = [entry for k, entry in entries if k == n_sessions]
        test += tested
        labels |= {entry["feature_path"]: speaker for entry in tested}
        sessions |= {e["feature_path"]: f"{speaker}/{k}" for k, e in entries}
    cycle = rng.permutation(len(recorded))
    ids = np.array(list(recorded))
    ids[cycle] = ids[np.roll(cycle, 1)]  # none keeps its place in metadata
    ids = ids.tolist()
    return {
        "mapping": {
            "speaker2id": {speaker: i for i, speaker in enumerate(ids)},
            "id2speaker": {str(i): speaker for i, speaker in enumerate(ids)},
        },
        "metadata": {"n_mels": 40, "speakers": train},
        "testdata": {
            "n_mels": 40,
            "utterances": [test[i] for i in rng.permutation(len(test))],
        },
        "testlabels": labels,
        "sessions": sessions,
    }


def build(
    folder: Path,
    *,
    seed: int = 0,
    n_speakers: int = 24,
    n_sessions: int = 4,
    n_sentences: int = 5,
    recordings: Path | None = None,
    progress: bool = True,
) -> Path:
    """Builds the corpus on all cores, unless it exists; returns its folder.

    Besides the HW4 files, the folder gets ``testlabels.json`` (the speaker of
    each test file) and ``sessions.json`` (the session of each file). The files
    are written to a temporary folder, which is renamed at the end: a killed
    build leaves no half corpus.

    Arguments
    ---------
    folder : pathlib.Path
        A corpus that is already in it is kept, whatever its arguments.
    seed : int
        Seed of all random draws.
    n_speakers : int
        Number of voices. Beyond 38, variants repeat with another accent.
    n_sessions, n_sentences : int
        Training sessions per speaker, and utterances per session. The test
        has one more session, with one more utterance.
    recordings : pathlib.Path, optional
        A new folder for the waveforms, too: speaker/session/uttr-….wav, each
        named like its feature file.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    UserError
        If espeak-ng is missing, if a number is out of its range, or if a
        folder can't be written or has files.

    Example
    -------
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     sizes = dict(n_speakers=2, n_sessions=1, n_sentences=1)
    ...     folder = build(Path(parent) / "mini", progress=False, **sizes)
    ...     len(list(folder.glob("uttr-*.pt")))  # 1 train + 2 test, twice
    6
    """
    SEED.check(seed, "seed")
    N_SPEAKERS.check(n_speakers, "n_speakers")
    UP_TO_1000.check(n_sessions, "n_sessions")
    UP_TO_1000.check(n_sentences, "n_sentences")
    folder = Path(folder)
    if recordings and any(map(os.path.lexists, (folder, recordings))):
        raise UserError(
            f"{recordings}: recordings are written with a new corpus only; "
            "name two folders that don't exist yet."
        )
    if os.path.isfile(folder / "metadata.json"):
        return folder
    Espeak()  # report a missing library before any work
    target = Path(os.path.realpath(folder))  # a link stays
    part = target.with_name(f"{target.name}.part-{uuid4().hex}")
    try:
        if os.path.exists(folder) and (
            not os.path.isdir(folder) or os.listdir(folder)
        ):
            raise UserError(
                f"{folder}: is neither a mini corpus nor an empty folder; name "
                "a new folder."
            )
        part.mkdir(parents=True)
        sizes = n_speakers, n_sessions, n_sentences
        _record(part, recordings, seed, *sizes, progress)
        if target.exists():
            target.rmdir()  # it is empty; Windows can't rename onto a folder
        part.rename(target)
    except (OSError, BrokenProcessPool) as error:
        # Another process may have built it first.
        if not os.path.isfile(target / "metadata.json"):
            why = getattr(error, "strerror", None) or "a process was killed"
            raise UserError(
                f"{folder}: the mini corpus can't be built there ({why}); run "
                "`python recipes/ML2022hw4/mini_corpus.py FOLDER` with another "
                "folder, and give it as --data_folder."
            ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _record(
    folder, recordings, seed, n_speakers, n_sessions, n_sentences, progress
):
    """Writes the corpus into an empty folder, each speaker in a process."""
    rng = np.random.default_rng([seed, 0])
    numbers = rng.choice(np.arange(10, 10000), n_speakers, replace=False)
    speakers = [f"id{number:05d}" for number in np.sort(numbers)]
    accents = rng.permutation(ACCENTS.split())
    variants = rng.permutation(VARIANTS.split())
    voices = [
        f"{accents[i % len(accents)]}+{variants[i % len(variants)]}"
        for i in range(n_speakers)
    ]
    places = folder, recordings
    record = partial(_record_speaker, *places, seed, n_sessions, n_sentences)
    with ProcessPoolExecutor(
        min(os.cpu_count() or 1, n_speakers, 32),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
    ) as pool:
        results = pool.map(record, range(n_speakers), speakers, voices)
        bar = tqdm(results, "Mini corpus", n_speakers, disable=not progress)
        recordings = list(bar)
    recorded = dict(zip(speakers, recordings, strict=True))
    for name, table in _tables(recorded, n_sessions, rng).items():
        text = json.dumps(table, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_speakers", type=int, default=24)
    parser.add_argument("--n_sessions", type=int, default=4)
    parser.add_argument("--n_sentences", type=int, default=5)
    parser.add_argument(
        "--recordings", type=Path, help="a new folder for WAV files, too"
    )
    build(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
