"""One file for each utterance: read and checked; no code in it runs."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from spkid.data.corpus import Utterance
from spkid.data.tensorfile import NotATensor, parse_matrix, read_tensor
from spkid.errors import DataError, Problem, UserError, cure_of
from spkid.files import open_regular

LARGEST = 1e12  # no log-mel comes near; squares and sums stay finite
SPARE_BYTES = 64 * 2**20  # that a file may have beyond twice its frames


def load_feature_file(
    folder: str | Path,
    path: str,
    n_mels: int,
    length: int,
    dtype: str = "float32",
) -> np.ndarray:
    """Reads one utterance and checks it.

    Arguments
    ---------
    folder : str or pathlib.Path
        The data folder.
    path : str
        In the folder: a ``torch.save`` of a float tensor [frames, n_mels].
    n_mels, length : int
        Bands and frames that it must have.
    dtype : str
        The type whose range its values must not leave.

    Returns
    -------
    numpy.ndarray [frames, n_mels]
        float32.

    Raises
    ------
    DataError
        With one problem, if it can't be read or isn't what it should be.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.zeros(3, 40), folder / "a.pt")
    >>> load_feature_file(folder, "a.pt", 40, 3).shape
    (3, 40)
    """

    def bad(what: str, cure: str = "make or download it again") -> DataError:
        return DataError([Problem(path, "", what, cure)], Path(folder))

    try:
        with open_regular(os.path.join(folder, path)) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > SPARE_BYTES + 16 * length * n_mels:
                raise bad(
                    f"has {size:,} bytes, too many for {length} frames",
                    "save x.clone() instead of a view x",
                )
            content = bytearray(size)
            opened.readinto(content)  # type: ignore[attr-defined]
        matrix = parse_matrix(content)
        if matrix is None:
            features = read_tensor(content)
        else:
            features = torch.from_numpy(matrix)
    except FileNotFoundError:
        raise bad("the feature file is missing") from None
    except OSError as error:
        cure = cure_of(error)
        if error.errno == errno.EINVAL:  # a pipe, a device
            cure = "put the file itself there"
        words = f"not a readable feature file ({error.strerror})"
        raise bad(words, cure) from None
    except NotATensor as error:
        raise bad(error.what, error.cure) from None
    if features.ndim != 2 or features.shape[1] != n_mels:
        shape = tuple(features.shape)
        raise bad(f"its shape is {shape}, not (frames, n_mels={n_mels})")
    if len(features) != length:
        raise bad(
            f"has {len(features)} frames, but its key 'mel_len' in the JSON "
            f"says {length}",
            "make the two agree",
        )
    mel = features.to(torch.float32).numpy()
    peak = max(mel.max(), -mel.min())
    if not np.isfinite(peak):
        raise bad("has values that are NaN or infinite")
    if peak > LARGEST:
        raise bad(f"has values beyond {LARGEST:g}, which no log-mel has")
    if peak > np.finfo(dtype).max:
        raise bad(f"has values beyond {dtype}", "give --pack_dtype float32")
    return mel


def check_feature_files(
    folder: str | Path,
    utterances: Iterable[Utterance],
    n_mels: int,
    dtype: str = "float32",
) -> list[Problem]:
    """Opens feature files and finds those that can't be used.

    Arguments
    ---------
    folder : str or pathlib.Path
        The data folder.
    utterances : iterable of Utterance
        Whose files to open.
    n_mels, dtype
        As for :func:`load_feature_file`.

    Returns
    -------
    list of Problem
        One for each bad file, in the order of the utterances.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> check_feature_files(folder, [Utterance("a.pt", 3)], 40)[0].what
    'the feature file is missing'
    """

    def check(one: Utterance) -> list[Problem]:
        try:
            load_feature_file(folder, one.path, n_mels, one.length, dtype)
        except DataError as error:
            return error.problems
        return []

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(check, utterances)
        return [problem for problems in found for problem in problems]


def utterance_moments(mel: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each band.

    Arguments
    ---------
    mel : numpy.ndarray [frames, n_mels]
        float32.

    Returns
    -------
    numpy.ndarray [2, n_mels]
        float32.

    Example
    -------
    >>> utterance_moments(np.array([[1.0], [3.0]], dtype=np.float32))
    array([[2.],
           [1.]], dtype=float32)
    """
    frames = torch.from_numpy(mel)
    mean = frames.mean(dim=0)
    variance = (frames - mean).square_().mean(dim=0)
    return torch.stack((mean, variance.sqrt())).numpy()


Integers = Sequence[int] | np.ndarray


class FeatureFiles:
    """Reads features from their files each time: where a pack has no room.

    Arguments
    ---------
    folder : str or pathlib.Path
        The data folder.
    utterances : sequence of Utterance
        Whose files to read; a row each.
    n_mels : int
        Bands of each frame.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> files = FeatureFiles(folder, [Utterance("a.pt", 3)], n_mels=40)
    >>> features, statistics = files.batch([0], [1], [2])
    >>> features.shape, statistics.shape
    (torch.Size([1, 2, 40]), torch.Size([1, 2, 40]))
    """

    file: Path | None = None  # a pack has one
    on_device = False

    def __init__(
        self, folder: str | Path, utterances: Sequence[Utterance], n_mels: int
    ) -> None:
        self.folder, self.n_mels = Path(folder), n_mels
        self.paths = [u.path for u in utterances]
        self.lengths = np.array([u.length for u in utterances], dtype=np.int64)
        self.row = {path: row for row, path in enumerate(self.paths)}

    def to(self, device: str | torch.device) -> FeatureFiles:
        """Raises UserError: only a pack can be moved to a device."""
        raise UserError(
            f"{self.folder}: only a pack can lie on {device}; give --pack True "
            "or --pack_on_device False."
        )

    def digest(self) -> str:
        """32 hexadecimal digits that identify the files' content, by row.

        Raises
        ------
        DataError
            If a file can't be read.
        """

        def checksum(path: str) -> int:
            try:
                with open_regular(self.folder / path) as file:
                    return zlib.crc32(file.read())
            except OSError as error:
                what = f"can't be read ({error.strerror})"
                problem = Problem(path, "", what, cure_of(error))
                raise DataError([problem], self.folder) from None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(checksum, self.paths))
        content = np.array(found, "<u4").tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def _load(self, row: int) -> np.ndarray:
        length = int(self.lengths[row])
        return load_feature_file(
            self.folder, self.paths[row], self.n_mels, length
        )

    def frames(
        self, row: int, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        """As :meth:`PackedFeatures.frames`."""
        return self._load(row)[start:][:count]

    def statistics(self, row: int) -> torch.Tensor:
        """As :meth:`PackedFeatures.statistics`."""
        return torch.from_numpy(utterance_moments(self._load(row)))

    def batch(
        self, rows: Integers, starts: Integers, counts: Integers
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`PackedFeatures.batch`."""
        features = torch.zeros(len(rows), max(counts), self.n_mels)
        statistics = torch.empty(len(rows), 2, self.n_mels)
        for i, (row, start, count) in enumerate(
            zip(rows, starts, counts, strict=True)
        ):
            mel = self._load(row)
            features[i, :count] = torch.from_numpy(mel[start : start + count])
            statistics[i] = torch.from_numpy(utterance_moments(mel))
        return features, statistics
