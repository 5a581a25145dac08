"""Features of all utterances in one memory-mapped file.

64,666 small files cost two minutes an epoch to open; one pack costs a page
fault. Workers and processes share it through the operating system's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from spkid.data.feature_file import Integers
from spkid.errors import Problem, UserError
from spkid.files import open_regular
from spkid.models.masks import valid_mask

INDEX, FRAMES = "index.npz", "frames.bin"
ARRAYS = ("paths", "lengths", "offsets", "moments", "checksums")


class DamagedPack(UserError):
    """A pack that can't be used; ``what`` is wrong with it.

    Example
    -------
    >>> str(DamagedPack(Path("packs/a"), "packs/a/frames.bin: is cut off"))
    'packs/a/frames.bin: is cut off; delete packs/a to have it rebuilt.'
    """

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(f"{what}; delete {folder} to have it rebuilt.")
        self.what = what


def file_stamp(path: str | Path) -> tuple[int, int, int, int]:
    """A file's size, time of change (ns), inode, and its inode's time of
    change (ns); zeros if there is none.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a"
    >>> _ = path.write_bytes(b"abc")
    >>> file_stamp(path)[0], file_stamp(path.with_name("b"))[0]
    (3, 0)
    """
    try:
        info = os.stat(path)
    except OSError:
        return 0, 0, 0, 0
    # Numbers that an array of int64 can hold: the year 2300 is beyond them.
    changes = info.st_mtime_ns % 2**63, info.st_ctime_ns % 2**63
    return info.st_size, changes[0], info.st_ino % 2**63, changes[1]


def seal(header: Mapping, arrays: Mapping[str, np.ndarray]) -> str:
    """A digest of a pack's whole index.

    Example
    -------
    >>> len(seal({}, {name: np.zeros(2) for name in ARRAYS}))
    32
    """
    digest = hashlib.blake2b(json.dumps(header).encode(), digest_size=16)
    for name in ARRAYS:
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_index(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A pack's header and arrays, if they are no larger than their file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type or member.file_size > size:
                    raise ValueError
        file.seek(0)
        with np.load(file) as index:
            header = json.loads(str(index["header"]))
            return header, {name: index[name] for name in ARRAYS}


class PackedFeatures:
    """Features of many utterances in one memory-mapped file.

    Opening it compares all frames with their checksums, at about the speed of
    reading them. ``problems`` lists the files that could not be packed.

    Arguments
    ---------
    folder : str or pathlib.Path
        A pack made by :func:`spkid.data.open_features`.
    check : bool
        False: only the index is checked.

    Raises
    ------
    UserError
        If the pack is damaged.

    Example
    -------
    >>> from spkid.data import Corpus, Utterance, open_features
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> corpus = Corpus(folder, 40, test=(Utterance("a.pt", 3),))
    >>> pack, problems = open_features(corpus, folder, progress=False)
    >>> pack.frames(pack.row["a.pt"], start=1).shape
    (2, 40)
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        folder = Path(folder)
        self.file, self.on_device = folder / FRAMES, False
        try:
            header, arrays = _read_index(folder / INDEX)
            if header.pop("seal") != seal(header, arrays):
                raise ValueError
            self.paths: list[str] = arrays["paths"].tolist()
            self.lengths, self.offsets = arrays["lengths"], arrays["offsets"]
            self.moments, self.checksums = (
                arrays["moments"],
                arrays["checksums"],
            )
            self.listing, self.dtype = header["listing"], header["dtype"]
            self.n_mels: int = header["n_mels"]
            self.shape = (header["frames"], self.n_mels)
            self.problems = [Problem(*p) for p in header["problems"]]
            self._check_index()
        except Exception as error:
            name = type(error).__name__
            raise DamagedPack(
                folder, f"{folder / INDEX}: not a readable pack ({name})"
            ) from None
        self.row = {path: row for row, path in enumerate(self.paths)}
        size = self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize
        self.stamp = file_stamp(self.file)
        if self.stamp[0] != size:
            raise DamagedPack(
                folder, f"{self.file}: has {self.stamp[0]} bytes, not {size}"
            )
        try:
            self._map()
        except OSError as error:
            raise DamagedPack(
                folder, f"{self.file}: can't be read ({error.strerror})"
            ) from None
        if check and (bad := self._damaged()):
            raise DamagedPack(
                folder, f"{self.file}: the frames of {bad!a} are damaged"
            )

    def _check_index(self) -> None:
        """Raises ValueError if parts of utterances are outside or shared."""
        order = np.argsort(self.offsets)
        begins, lengths = self.offsets[order], self.lengths[order]
        limits = np.append(begins[1:], self.shape[0])
        if (begins < 0).any() or (begins + lengths > limits).any():
            raise ValueError

    def _damaged(self) -> str | None:
        """A path whose frames don't have their checksum."""
        data, step = np.asarray(self.data), 256

        def check(first: int) -> str | None:
            for row in range(first, min(first + step, len(self.paths))):
                begin = self.offsets[row]
                part = data[begin : begin + self.lengths[row]]
                if zlib.crc32(part.data) != self.checksums[row]:
                    return self.paths[row]
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(check, range(0, len(self.paths), step))
            return next(filter(None, found), None)

    def digest(self) -> str:
        """32 hexadecimal digits that identify the features, by row."""
        digest = hashlib.blake2b(self.dtype.encode(), digest_size=16)
        # Not the moments: their last bits differ between processors.
        for array in (self.lengths, self.checksums):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _map(self) -> None:
        """Maps the file; nothing of it is read yet."""
        self.data = np.memmap(self.file, self.dtype, "r", shape=self.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it can't be written: intended
            self.tensor = torch.from_numpy(self.data)
        self._moments = torch.from_numpy(self.moments)

    def __getstate__(self) -> dict:
        """A worker that is spawned maps the file itself, not a copy."""
        maps = ("data", "tensor", "_moments")
        state = {k: v for k, v in self.__dict__.items() if k not in maps}
        return state | {"on_device": False}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if file_stamp(self.file)[:3] != self.stamp[:3]:
            raise UserError(
                f"{self.file}: was replaced during the run; give the same "
                "command again."
            )
        self._map()

    def to(self, device: str | torch.device) -> PackedFeatures:
        """Copies the pack into a device's memory; batches are made there.

        Raises
        ------
        UserError
            If it doesn't fit.
        """
        try:
            # An explicit copy: on a CPU, too, it leaves the file for memory.
            self.tensor = self.tensor.to(device, copy=True)
            self._moments = self._moments.to(device)
        except RuntimeError as error:
            raise UserError(
                f"{self.file}: its {self.data.nbytes:,} bytes don't fit into "
                f"the memory of {device} ({type(error).__name__}); give "
                "--pack_on_device False."
            ) from None
        self.on_device = True
        return self

    def frames(
        self, row: int, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        """Part of one utterance.

        Arguments
        ---------
        row : int
            The utterance.
        start : int
            Its first frame.
        count : int, optional
            At most so many frames; None: to the end.

        Returns
        -------
        numpy.ndarray [count, n_mels]
            float32, a copy.
        """
        first, end = self.offsets[row] + start, self.lengths[row]
        end += self.offsets[row]
        if count is not None:
            end = min(end, first + count)
        return self.data[first:end].astype(np.float32)

    def statistics(self, row: int) -> torch.Tensor:
        """Mean and deviation [2, n_mels] over the whole utterance."""
        return torch.from_numpy(self.moments[row])

    def batch(
        self, rows: Integers, starts: Integers, counts: Integers
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Parts of many utterances by one gather, where the pack's memory is.

        Arguments
        ---------
        rows : sequence of int [batch]
            The utterances.
        starts, counts : sequence of int [batch]
            First frame and number of frames of each part, inside it.

        Returns
        -------
        tuple of torch.Tensor
            Features [batch, frames of the longest, n_mels], float32, 0 after
            a part's end, and statistics [batch, 2, n_mels].
        """
        rows, device = np.asarray(rows), self.tensor.device
        first = torch.from_numpy(self.offsets[rows] + starts).to(device)
        longest = int(np.max(counts))
        # Past the end of a shorter part there is a neighbour's frame, or none.
        index = first[:, None] + torch.arange(longest, device=device)
        index = index.flatten().clamp_(max=self.shape[0] - 1)
        features = self.tensor.index_select(0, index).float()
        features = features.view(len(rows), longest, -1)
        if np.min(counts) < longest:
            lengths = torch.as_tensor(counts, device=device)
            mask = valid_mask(lengths, longest)
            features.masked_fill_(~mask[..., None], 0.0)
        index = torch.from_numpy(rows).to(device)
        return features, self._moments.index_select(0, index)
