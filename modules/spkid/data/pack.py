"""One memory-mapped file in place of a file for each utterance.

64,666 small files cost two minutes an epoch to open; one pack costs a page
fault. Workers and processes share it through the operating system's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from spkid.errors import UserError
from spkid.models.masks import valid_mask
from spkid.data.tensorfile import parse_matrix

INDEX, FRAMES = "index.npz", "frames.bin"
DTYPES = ("float16", "float32")
CHUNK = 64  # files that are packed by one process and written at once
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
                self.lengths, self.offsets = index["lengths"], index["offsets"]
                self.moments = index["moments"]
                self.checksums = index["checksums"]
            self.stamps, self.dtype = header["stamps"], header["dtype"]
            self.shape = (header["frames"], header["n_mels"])
        except Exception as error:
            raise UserError(
                f"{folder / INDEX}: not a readable pack "
                f"({type(error).__name__}); delete {folder} to have it rebuilt."
            ) from None
        self.row = {path: row for row, path in enumerate(self.paths)}
        size = self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize
        self.file = folder / FRAMES
        found = self.file.stat().st_size if self.file.exists() else 0
        if found != size:
            raise UserError(
                f"{self.file}: has {found} bytes, not {size}; "
                f"delete {folder} to have it rebuilt."
            )
        self._map()

    def _map(self):
        """Maps the file; nothing of it is read yet."""
        self.data = np.memmap(self.file, self.dtype, "r", shape=self.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it can't be written: intended
            self.tensor = torch.from_numpy(self.data)
        self._moments = torch.from_numpy(self.moments)

    def __getstate__(self) -> dict:
        """A worker that is spawned maps the file itself, not a copy."""
        maps = ("data", "tensor", "_moments")
        return {k: v for k, v in self.__dict__.items() if k not in maps}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()

    def to(self, device: str | torch.device) -> PackedFeatures:
        """Moves the pack into a device's memory; batches are made there.

        Arguments
        ---------
        device : str or torch.device
            Where to; the loaders then must not have workers.

        Returns
        -------
        PackedFeatures
            Itself.

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
        self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]
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

    def verify(self) -> None:
        """Raises UserError unless each utterance has the bytes it got."""
        for row, path in enumerate(self.paths):
            begin = self.offsets[row]
            part = self.data[begin : begin + self.lengths[row]]
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
        if dtype not in DTYPES:
            raise UserError(
                f"pack_dtype={dtype!r} is none of {', '.join(DTYPES)}."
            )
        stamps = file_stamps(data_folder, paths, lengths) + f"-{n_mels}"
        if (folder / INDEX).exists():
            pack = cls(folder)
            if pack.stamps == stamps and pack.dtype == dtype:
                return pack
            shutil.rmtree(folder)
        part = _side_folder(folder)
        need = sum(lengths) * n_mels * np.dtype(dtype).itemsize
        try:
            index = _write_frames(
                part / FRAMES,
                need,
                data_folder,
                list(zip(paths, lengths, strict=True)),
                (n_mels, dtype),
                progress,
                on_error,
            )
            header = {
                "stamps": stamps,
                "dtype": dtype,
                "n_mels": n_mels,
                "frames": sum(lengths),
            }
            np.savez(part / INDEX, header=json.dumps(header), **index)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"{folder / FRAMES}: the pack needs {need:,} bytes and could "
                f"not be written ({error.strerror}); free the space, name "
                "another place by --pack_folder, or give --pack False."
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


def _write_frames(
    path, need, data_folder, items, form, progress, on_error
) -> dict[str, np.ndarray]:
    """Writes all frames; returns the index of the (path, length) items."""
    names, lengths = (np.array(column) for column in zip(*items, strict=True))
    offsets = np.cumsum(lengths) - lengths
    moments = np.empty((len(items), 2, form[0]), dtype=np.float32)
    checksums = np.empty(len(items), dtype=np.uint32)
    good = np.ones(len(items), dtype=bool)
    chunks = [
        (int(offsets[begin]), items[begin : begin + CHUNK])
        for begin in range(0, len(items), CHUNK)
    ]
    with (
        open(path, "w+b") as file,
        tqdm(
            total=len(items),
            desc="Packing features",
            unit="file",
            disable=not progress,
        ) as bar,
    ):
        if hasattr(os, "posix_fallocate"):
            # A full disk is noticed before the files are read.
            os.posix_fallocate(file.fileno(), 0, need)
        else:
            file.truncate(need)
        work = partial(_pack_chunk, file.fileno(), str(data_folder), *form)
        end = 0
        for facts in _in_processes(work, chunks):
            begin, end = end, end + len(facts[1])
            moments[begin:end], checksums[begin:end], errors = facts
            for number, error in errors.items():
                if on_error is None:
                    raise error
                on_error(items[begin + number][0], error)
                good[begin + number] = False
            bar.update(end - begin)
        os.fsync(file.fileno())
    index = {
        "paths": names,
        "lengths": lengths,
        "offsets": offsets,
        "moments": moments,
        "checksums": checksums,
    }
    return {key: values[good] for key, values in index.items()}


def _pack_chunk(descriptor, data_folder, n_mels, dtype, chunk):
    """Writes the frames of some files from a frame of the pack on.

    Returns their moments and checksums, and a UserError for each bad one.
    """
    place, items = chunk
    lengths = [length for _, length in items]
    packed = torch.zeros(sum(lengths), n_mels, dtype=getattr(torch, dtype))
    moments = np.zeros((len(items), 2, n_mels), dtype=np.float32)
    checksums = np.zeros(len(items), dtype=np.uint32)
    errors = {}
    parts = packed.split(lengths)
    for number, (path, length) in enumerate(items):
        try:
            mel = load_feature_file(
                f"{data_folder}{os.sep}{path}", n_mels, length, dtype
            )
        except UserError as error:
            errors[number] = error
            continue
        parts[number].copy_(torch.from_numpy(mel))
        moments[number] = utterance_moments(mel)
        checksums[number] = zlib.crc32(parts[number].numpy())
    data = memoryview(packed.numpy()).cast("B")
    place *= n_mels * packed.element_size()
    while data:  # a disk that is nearly full takes part of it first
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written
    return moments, checksums, errors


def _in_processes(work: Callable, chunks: list) -> Iterator:
    """Yields work(chunk) for each, in order, done by a process for each core.

    Not a pool of the library: its processes outlive a parent that is killed.
    """
    count = 1
    if sys.platform == "linux":  # elsewhere a fork is missing or unsafe
        count = min(len(os.sched_getaffinity(0)), len(chunks))
    if count < 2:
        yield from map(work, chunks)
        return
    context = get_context("fork")
    processes, results = [], []
    for number in range(count):
        result, end = context.Pipe(duplex=False)
        share = chunks[number::count]
        process = context.Process(
            target=_serve,
            args=(work, share, (result, end), os.getpid()),
            daemon=True,
        )
        process.start()
        end.close()
        processes.append(process)
        results.append(result)
    try:
        for number in range(len(chunks)):
            done = results[number % count].recv()
            if isinstance(done, Exception):
                raise done
            yield done
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(work, chunks, pipe, parent):
    """A process's share; it ends with its parent."""
    result, end = pipe
    result.close()  # else it would wait for itself once the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    torch.set_num_threads(1)
    for chunk in chunks:
        if os.getppid() != parent:
            return
        try:
            end.send(work(chunk))
        except BrokenPipeError:
            return
        except Exception as error:
            end.send(error)
            return
