"""One memory-mapped file in place of a file for each utterance.

64,666 small files cost two minutes an epoch to open; one pack costs a page
fault. Workers and processes share it through the operating system's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from spkid.errors import UserError

INDEX, FRAMES = "index.npz", "frames.bin"
CHUNK = 256
STALE_SECONDS = 3600  # a living build writes far more often


def file_stamps(
    folder: Path, paths: Sequence[str], lengths: Sequence[int]
) -> str:
    """A digest of the files' names, frames, sizes and times of change.

    Arguments
    ---------
    folder : pathlib.Path
        Where the files are.
    paths : sequence of str
        Their paths inside it.
    lengths : sequence of int
        The frames that they should have.

    Returns
    -------
    str
        32 hexadecimal digits.

    Example
    -------
    >>> file_stamps(Path("."), [], [])
    'cae66941d9efbd404e4d88758ea67670'
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, length in zip(paths, lengths, strict=True):
        info = os.stat(os.path.join(folder, path))
        line = f"{path}\0{length}\0{info.st_size}\0{info.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def load_feature_file(path: Path, n_mels: int, length: int) -> np.ndarray:
    """Reads one utterance and checks it; nothing is unpickled.

    Arguments
    ---------
    path : pathlib.Path
        A ``torch.save`` of a float tensor [frames, n_mels].
    n_mels : int
        Bands that it must have.
    length : int
        Frames that it must have.

    Returns
    -------
    numpy.ndarray [frames, n_mels]
        float32.

    Raises
    ------
    UserError
        If it can't be read, or isn't what it should be.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.pt"
    >>> torch.save(torch.zeros(3, 40), path)
    >>> load_feature_file(path, 40, 3).shape
    (3, 40)
    """
    try:
        features = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: the feature file is missing.") from None
    except Exception as error:
        raise UserError(
            f"{path}: not a readable feature file "
            f"({type(error).__name__}); make or download it again."
        ) from None
    if not (
        torch.is_tensor(features)
        and features.is_floating_point()
        and features.layout is torch.strided  # not sparse
        and features.is_cpu  # not of the device "meta", without values
    ):
        raise UserError(f"{path}: holds no float tensor.")
    if features.ndim != 2 or features.shape[1] != n_mels:
        raise UserError(
            f"{path}: its shape is {tuple(features.shape)}, "
            f"not (frames, n_mels={n_mels})."
        )
    if len(features) != length:
        raise UserError(
            f"{path}: has {len(features)} frames, but its key 'mel_len' in "
            f"the JSON says {length}; make the two agree."
        )
    if not torch.isfinite(features).all():
        raise UserError(f"{path}: has values that are NaN or infinite.")
    return features.detach().to(torch.float32).numpy()


def _side_folder(folder):
    """A new folder beside the pack's; sweeps those that a kill left behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}.part-*"):
        file = left / FRAMES
        if file.exists() and time.time() - file.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    prefix = f"{folder.name}.part-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))


class PackedFeatures:
    """Features of many utterances in one memory-mapped file.

    Arguments
    ---------
    folder : pathlib.Path
        A pack made by :meth:`build`.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> pack = PackedFeatures.build(
    ...     folder / "pack", folder, ["a.pt"], [3], n_mels=40, progress=False)
    >>> pack.frames(pack.row["a.pt"], start=1).shape
    (2, 40)
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        try:
            with np.load(folder / INDEX) as index:
                header = json.loads(str(index["header"]))
                self.paths: list[str] = index["paths"].tolist()
                self.lengths, self.mean = index["lengths"], index["mean"]
                self.deviation = index["deviation"]
                self.checksums = index["checksums"]
        except Exception as error:
            raise UserError(
                f"{folder / INDEX}: not a readable pack "
                f"({type(error).__name__}); delete {folder} to have it rebuilt."
            ) from None
        self.stamps, self.dtype = header["stamps"], np.dtype(header["dtype"])
        self.offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        self.row = {path: row for row, path in enumerate(self.paths)}
        shape = (int(self.offsets[-1]), header["n_mels"])
        size = shape[0] * shape[1] * self.dtype.itemsize
        self.file = folder / FRAMES
        found = self.file.stat().st_size if self.file.exists() else 0
        if found != size:
            raise UserError(
                f"{self.file}: has {found} bytes, not {size}; "
                f"delete {folder} to have it rebuilt."
            )
        self.data = np.memmap(self.file, self.dtype, "r", shape=shape)

    def __getstate__(self) -> dict:
        """A worker that is spawned maps the file itself, not a copy."""
        return {**self.__dict__, "data": self.data.shape}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.data = np.memmap(
            self.file, self.dtype, "r", shape=tuple(state["data"])
        )

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
        first, end = self.offsets[row] + start, self.offsets[row + 1]
        if count is not None:
            end = min(end, first + count)
        return self.data[first:end].astype(np.float32)

    def statistics(self, row: int) -> torch.Tensor:
        """Mean and deviation [2, n_mels] over the whole utterance."""
        both = np.stack((self.mean[row], self.deviation[row]))
        return torch.from_numpy(both)

    def verify(self) -> None:
        """Raises UserError unless each utterance has the bytes it got."""
        for row, path in enumerate(self.paths):
            part = self.data[self.offsets[row] : self.offsets[row + 1]]
            if zlib.crc32(part) != self.checksums[row]:
                raise UserError(
                    f"{self.file}: {path} differs from what was packed; "
                    f"delete {self.file.parent} to have it rebuilt."
                )

    @classmethod
    def build(
        cls,
        folder: Path,
        data_folder: Path,
        paths: Sequence[str],
        lengths: Sequence[int],
        n_mels: int,
        dtype: str = "float16",
        progress: bool = True,
        on_error: Callable[[str, UserError], None] | None = None,
    ) -> PackedFeatures:
        """Opens the pack of these files; builds it unless it is up to date.

        A build goes to a side folder that is renamed at its end, so a killed
        one leaves nothing that looks finished.

        Arguments
        ---------
        folder : pathlib.Path
            The pack's folder; rebuilt if the files changed since.
        data_folder : pathlib.Path
            Where the feature files are.
        paths : sequence of str
            Their paths inside it.
        lengths : sequence of int
            Their frames.
        n_mels : int
            Bands of each frame.
        dtype : str
            "float16" (an error of at most 0.008 in log-mels) or "float32".
        progress : bool
            Whether to show a progress bar.
        on_error : callable, optional
            Gets (path, error) of a bad file, which then is left out. None:
            the first bad file raises.

        Returns
        -------
        PackedFeatures

        Raises
        ------
        UserError
            For a bad file, or where the disk is full.
        """
        folder, data_folder = Path(folder), Path(data_folder)
        stamps = file_stamps(data_folder, paths, lengths) + f"-{n_mels}"
        if (folder / INDEX).exists():
            pack = cls(folder)
            if pack.stamps == stamps and pack.dtype == dtype:
                return pack
            shutil.rmtree(folder)
        part = _side_folder(folder)

        def read(item):
            path, length = item
            try:
                return load_feature_file(data_folder / path, n_mels, length)
            except UserError as error:
                return error

        kept, mean, deviation, checksums = [], [], [], []
        items = list(zip(paths, lengths, strict=True))
        try:
            with (
                open(part / FRAMES, "wb") as file,
                ThreadPoolExecutor(os.cpu_count()) as pool,
                tqdm(
                    total=len(items),
                    desc="Packing features",
                    unit="file",
                    disable=not progress,
                ) as bar,
            ):
                # By chunks, so that readers never run far ahead of the disk.
                for begin in range(0, len(items), CHUNK):
                    chunk = items[begin : begin + CHUNK]
                    for item, mel in zip(
                        chunk, pool.map(read, chunk), strict=True
                    ):
                        if isinstance(mel, UserError):
                            if on_error is None:
                                raise mel
                            on_error(item[0], mel)
                            continue
                        packed = mel.astype(dtype)
                        file.write(packed.data)
                        kept.append(item)
                        mean.append(mel.mean(axis=0))
                        deviation.append(mel.std(axis=0))
                        checksums.append(zlib.crc32(packed))
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
            np.savez(
                part / INDEX,
                header=json.dumps(
                    {"stamps": stamps, "dtype": dtype, "n_mels": n_mels}
                ),
                paths=np.array([path for path, _ in kept]),
                lengths=np.array([n for _, n in kept], dtype=np.int64),
                mean=np.array(mean, dtype=np.float32),
                deviation=np.array(deviation, dtype=np.float32),
                checksums=np.array(checksums, dtype=np.uint32),
            )
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            need = sum(lengths) * n_mels * np.dtype(dtype).itemsize
            raise UserError(
                f"{folder}: the pack needs {need:,} bytes and could not be "
                f"written ({error.strerror}); free the space, or name "
                "another place by --pack_folder."
            ) from None
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        try:
            os.replace(part, folder)
        except OSError:
            # Another process has built it meanwhile.
            shutil.rmtree(part, ignore_errors=True)
        return cls(folder)
