"""A corpus in the form of the HW4 data, of random features, in a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from spkid.data import (
    Corpus,
    FeatureFiles,
    PackedFeatures,
    Utterance,
    open_features,
)
from spkid.errors import Problem

N_MELS = 40


def make_corpus(
    folder: Path,
    n_speakers: int = 4,
    n_utterances: int = 8,
    n_test: int = 6,
    labels: bool = True,
    seed: int = 0,
    sessions: bool = True,
) -> Path:
    """Writes a corpus in which a speaker is a mean spectrum, and says that
    two utterances make a session."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    speakers = [f"id{i:05d}" for i in range(n_speakers)]
    voices = generator.normal(0, 2, (n_speakers, N_MELS))

    def write(name, voice):
        length = int(generator.integers(20, 60))
        noise = generator.normal(0, 1, (length, N_MELS))
        mel = noise * np.exp(voice / 4) + voice
        torch.save(torch.from_numpy(mel.astype(np.float32)), folder / name)
        return {"feature_path": name, "mel_len": length}

    metadata = {
        speaker: [
            write(f"uttr-{s}-{u}.pt", voices[s]) for u in range(n_utterances)
        ]
        for s, speaker in enumerate(speakers)
    }
    test, truth = [], {}
    for t in range(n_test):
        s = int(generator.integers(n_speakers))
        test.append(write(f"uttr-test-{t}.pt", voices[s]))
        truth[test[-1]["feature_path"]] = speakers[s]
    # Another order than metadata's, as in the real data.
    order = speakers[::-1]
    contents = {
        "mapping.json": {
            "speaker2id": {s: i for i, s in enumerate(order)},
            "id2speaker": {str(i): s for i, s in enumerate(order)},
        },
        "metadata.json": {"n_mels": N_MELS, "speakers": metadata},
        "testdata.json": {"n_mels": N_MELS, "utterances": test},
    }
    if labels:
        contents["testlabels.json"] = truth
    if sessions:
        contents["sessions.json"] = {
            entry["feature_path"]: f"{speaker}-{u // 2}"
            for speaker, entries in metadata.items()
            for u, entry in enumerate(entries)
        }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def features_of(
    files: tuple[Path, dict], packs: Path, dtype: str = "float16"
) -> tuple[PackedFeatures | FeatureFiles, list[Problem]]:
    """Packs a folder's files, by name and matrix."""
    folder, mels = files
    utterances = tuple(Utterance(name, len(m)) for name, m in mels.items())
    corpus = Corpus(folder, N_MELS, test=utterances)
    return open_features(corpus, packs, pack_dtype=dtype, progress=False)
