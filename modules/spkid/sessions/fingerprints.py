"""What a channel leaves in an utterance."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from spkid.data.feature_file import FeatureFiles
from spkid.data.pack import PackedFeatures
from spkid.files import save_atomically


def fingerprint(
    frames: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> np.ndarray:
    """What the channel leaves in one utterance.

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
    pack: PackedFeatures | FeatureFiles,
    paths: Sequence[str],
    progress: bool = True,
) -> np.ndarray:
    """Fingerprints of a pack's utterances; made once, kept beside the pack.

    Arguments
    ---------
    pack : PackedFeatures or FeatureFiles
        The features.
    paths : sequence of str
        Of the utterances, as the pack names them.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    np.ndarray [utterances, 4 * n_mels]
        float32.
    """
    wanted = [pack.row[path] for path in paths]
    cache = pack.file and pack.file.with_name("fingerprints.npy")
    with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
        kept = np.load(cache)  # TypeError: there is no pack to keep it beside
        if len(kept) == len(pack.lengths):
            return kept[wanted]
    everything = np.stack(
        [
            fingerprint(pack.frames(row), *pack.statistics(row).numpy())
            for row in tqdm(
                range(len(pack.lengths)),
                desc="Listening to the channels",
                unit="utterance",
                disable=not progress,
            )
        ],
        dtype=np.float32,
    )
    if cache:
        content = io.BytesIO()
        np.save(content, everything)
        save_atomically(content.getvalue(), cache)
    return everything[wanted]
