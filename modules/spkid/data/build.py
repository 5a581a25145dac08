"""Opening a corpus's features; building its pack where none is up to date."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from spkid.data.corpus import Corpus, Utterance
from spkid.data.feature_file import (
    FeatureFiles,
    check_feature_files,
    load_feature_file,
    utterance_moments,
)
from spkid.data.pack import FRAMES, INDEX, PackedFeatures
from spkid.errors import DataError, Problem, UserError, one_of

DTYPES = ("float16", "float32")
CHUNK = 64  # files that a process packs and writes at once
STALE_SECONDS = 3600  # a living build writes far more often


def open_features(
    corpus: Corpus,
    pack_folder: str | Path | None = None,
    *,
    pack: bool = True,
    pack_dtype: str = "float16",
    check: bool = False,
    progress: bool = True,
) -> tuple[PackedFeatures | FeatureFiles, list[Problem]]:
    """Opens the features of a corpus and lists the files that can't be used.

    A pack is rebuilt if a file changed since, or if one of those that could
    not be packed can be read now.

    Arguments
    ---------
    corpus : Corpus
        Each of its files must exist.
    pack_folder : str or pathlib.Path, optional
        Where packs are kept, a folder for each corpus.
    pack : bool
        False: the files themselves are read each time.
    pack_dtype : str
        "float16" (an error of at most 0.008 in log-mels) or "float32".
    check : bool
        Opens all files if there is no pack; a pack's build always does.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    tuple
        The features of the good files, and a problem for each bad one.

    Raises
    ------
    UserError
        If the disk is full, or an existing pack is damaged.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> (folder / "b.pt").touch()
    >>> utterances = Utterance("a.pt", 3), Utterance("b.pt", 3)
    >>> features, problems = open_features(
    ...     Corpus(folder, 40, test=utterances), folder, progress=False)
    >>> features.paths, [problem.file for problem in problems]
    (['a.pt'], ['b.pt'])
    """
    folder, utterances, n_mels = corpus.folder, corpus.utterances, corpus.n_mels
    if not pack:
        bad = check_feature_files(folder, utterances, n_mels) if check else []
        names = {problem.file for problem in bad}
        good = [u for u in utterances if u.path not in names]
        return FeatureFiles(folder, good, n_mels), bad
    if pack_folder is None:
        raise ValueError("pack_folder must be given if pack is True.")
    one_of(pack_dtype, DTYPES, "pack_dtype")
    place = os.path.realpath(folder)
    name = hashlib.blake2b(place.encode(), digest_size=4).hexdigest()
    target = Path(pack_folder, f"{os.path.basename(place)}-{name}")
    stamps = f"{_stamps(folder, utterances)}-{n_mels}"
    if (target / INDEX).exists():
        old = PackedFeatures(target)
        if (old.stamps, old.dtype) == (stamps, pack_dtype):
            absent = [u for u in utterances if u.path not in old.row]
            bad = check_feature_files(folder, absent, n_mels, pack_dtype)
            if len(absent) == len(bad) == len(old.problems):
                return old, bad
        shutil.rmtree(target)
    return _build(target, corpus, stamps, pack_dtype, progress)


def _stamps(folder: Path, utterances: Sequence[Utterance]) -> str:
    """A digest of the files' names, frames, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=16)
    for utterance in utterances:
        path, length = utterance.path, utterance.length
        info = os.stat(os.path.join(folder, path))
        line = f"{path}\0{length}\0{info.st_size}\0{info.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _build(
    folder: Path, corpus: Corpus, stamps: str, dtype: str, progress: bool
) -> tuple[PackedFeatures | FeatureFiles, list[Problem]]:
    """Builds in a side folder that is renamed at the end, so that a build
    that is killed leaves nothing that looks complete."""
    frames = sum(utterance.length for utterance in corpus.utterances)
    need = frames * corpus.n_mels * np.dtype(dtype).itemsize
    part = _side_folder(folder)
    try:
        index, problems = _write_frames(
            part / FRAMES, need, corpus, dtype, progress
        )
        if not len(index["paths"]):  # there is no pack of nothing
            return FeatureFiles(corpus.folder, (), corpus.n_mels), problems
        header = {
            "stamps": stamps,
            "dtype": dtype,
            "n_mels": corpus.n_mels,
            "frames": frames,
            "problems": problems,
        }
        np.savez(part / INDEX, header=json.dumps(header), **index)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(part, folder)
    except OSError as error:
        raise UserError(
            f"{folder / FRAMES}: the pack needs {need:,} bytes and could not "
            f"be written ({error.strerror}); free the space, name another "
            "place by --pack_folder, or give --pack False."
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    pack = PackedFeatures(folder)
    return pack, pack.problems


def _side_folder(folder: Path) -> Path:
    """A new folder beside the pack's; sweeps those that a kill left behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}.part-*"):
        file = left / FRAMES
        if file.exists() and time.time() - file.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    prefix = f"{folder.name}.part-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))


def _write_frames(
    path: Path, need: int, corpus: Corpus, dtype: str, progress: bool
) -> tuple[dict[str, Any], list[Problem]]:
    """Writes all frames; the index of the good files, and the problems."""
    items, n_mels = corpus.utterances, corpus.n_mels
    lengths = np.array([u.length for u in items], dtype=np.int64)
    offsets = np.cumsum(lengths) - lengths
    moments = np.empty((len(items), 2, n_mels), dtype=np.float32)
    checksums = np.empty(len(items), dtype=np.uint32)
    problems: list[Problem] = []
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
        if need and hasattr(os, "posix_fallocate"):
            # A full disk is noticed before the files are read.
            os.posix_fallocate(file.fileno(), 0, need)
        else:
            file.truncate(need)
        work = partial(_pack_chunk, file.fileno(), corpus.folder, n_mels, dtype)
        end = 0
        with contextlib.closing(_in_processes(work, chunks)) as results:
            for done in results:
                begin, end = end, end + len(done[1])
                moments[begin:end], checksums[begin:end], found = done
                problems += found
                bar.update(end - begin)
        os.fsync(file.fileno())
    bad = {problem.file for problem in problems}
    good = np.array([u.path not in bad for u in items], dtype=bool)
    index = {
        "paths": np.array([u.path for u in items]),
        "lengths": lengths,
        "offsets": offsets,
        "moments": moments,
        "checksums": checksums,
    }
    return {key: values[good] for key, values in index.items()}, problems


def _pack_chunk(descriptor, folder, n_mels, dtype, chunk):
    """Writes the frames of some files from a frame of the pack on; their
    moments and checksums, and the problems of bad files."""
    place, items = chunk
    lengths = [u.length for u in items]
    packed = torch.zeros(sum(lengths), n_mels, dtype=getattr(torch, dtype))
    moments = np.zeros((len(items), 2, n_mels), dtype=np.float32)
    checksums = np.zeros(len(items), dtype=np.uint32)
    problems = []
    for row, part in enumerate(packed.split(lengths)):
        try:
            mel = load_feature_file(
                folder, items[row].path, n_mels, lengths[row], dtype
            )
        except DataError as error:
            problems += error.problems
            continue
        part.copy_(torch.from_numpy(mel))
        moments[row] = utterance_moments(mel)
        checksums[row] = zlib.crc32(part.numpy().data)
    data = packed.numpy().data.cast("B")
    place *= n_mels * packed.element_size()
    while data:  # a disk that is nearly full takes part of it first
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written
    return moments, checksums, problems


def _in_processes(work: Callable, chunks: list) -> Generator:
    """Yields work(chunk) for each, in order, from a process for each core."""
    count = 1
    if sys.platform == "linux":  # elsewhere a fork is missing or unsafe
        count = min(len(os.sched_getaffinity(0)), len(chunks))
    if count < 2:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(
        count, get_context("fork"), initializer=_start_worker
    ) as pool:
        yield from pool.map(work, chunks)


def _start_worker() -> None:
    """Its parent ends it, or the parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
