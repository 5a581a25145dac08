"""What a recording's room and microphone leave in an utterance."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spkid.data import FeatureFiles, PackedFeatures
from spkid.errors import UserError
from spkid.files import open_regular, save_atomically


def fingerprint(
    frames: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> np.ndarray:
    """What the channel, room and microphone, leaves in one utterance.

    Arguments
    ---------
    frames : np.ndarray [frames, n_mels]
        Log-mels, not normalised.
    mean : np.ndarray [n_mels]
        Their mean over the frames.
    deviation : np.ndarray [n_mels]
        Their standard deviation.

    Returns
    -------
    np.ndarray [4 * n_mels]
        Mean, deviation, mean of the quietest tenth, mean absolute change.

    Example
    -------
    >>> frames = np.array([[0.0], [2.0]])
    >>> fingerprint(frames, frames.mean(0), frames.std(0))
    array([1., 1., 0., 2.])
    """
    count = max(1, len(frames) // 10)
    quietest = np.argpartition(frames.mean(axis=1), count - 1)[:count]
    change = np.zeros_like(mean)
    if len(frames) > 1:
        change = np.abs(np.diff(frames, axis=0)).mean(axis=0)
    quiet = frames[quietest].mean(axis=0)
    return np.concatenate((mean, deviation, quiet, change))


def pack_fingerprints(
    features: PackedFeatures | FeatureFiles,
    paths: Sequence[str],
    progress: bool = True,
) -> np.ndarray:
    """Fingerprints of utterances; those of a pack are made once and kept.

    Arguments
    ---------
    features : PackedFeatures or FeatureFiles
        The features; all their utterances get a fingerprint.
    paths : sequence of str
        The utterances whose fingerprints to return.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    np.ndarray [utterances, 4 * n_mels]
        float32.

    Example
    -------
    >>> import torch
    >>> from spkid.data import Utterance
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> files = FeatureFiles(folder, [Utterance("a.pt", 3)], n_mels=40)
    >>> pack_fingerprints(files, ["a.pt"], progress=False).shape
    (1, 160)
    """
    wanted = [features.row[path] for path in paths]
    count = len(features.lengths)
    cache = features.file and features.file.with_name("fingerprints.npy")
    if cache:
        digest = features.digest()
        kept = _read(cache, (count, 4 * features.n_mels), digest)
        if kept is not None:
            return kept[wanted]
    rows = tqdm(
        range(count),
        desc="Fingerprinting channels",
        unit="utterance",
        disable=not progress,
    )
    prints = np.stack(
        [
            fingerprint(features.frames(row), *features.statistics(row).numpy())
            for row in rows
        ],
        dtype=np.float32,
    )
    if cache:
        content = io.BytesIO()
        np.save(content, prints)
        seal = _seal(content.getvalue(), digest)
        with contextlib.suppress(UserError):  # they are made again, then
            save_atomically(content.getvalue() + seal, cache)
    return prints[wanted]


def _seal(content: bytes, digest: str) -> bytes:
    return hashlib.blake2b(content + digest.encode(), digest_size=16).digest()


def _read(path: Path, shape: tuple[int, int], digest: str) -> np.ndarray | None:
    """Fingerprints that were kept; None if they are missing, damaged, or of
    features with another digest."""
    most = 4 * shape[0] * shape[1] + 1024  # float32 and a header
    try:
        with open_regular(path) as file:
            content = file.read(most)
        if content[-16:] != _seal(content[:-16], digest):
            return None
        prints = np.lib.format.read_array(io.BytesIO(content[:-16]))
    except (OSError, ValueError):
        return None
    return prints if prints.shape == shape else None
