"""Opening a corpus's features; building its pack where none is up to date."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

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
from spkid.data.pack import (
    FRAMES,
    INDEX,
    DamagedPack,
    PackedFeatures,
    file_stamp,
    seal,
)
from spkid.data.places import locked, publish, remove_pack, sweep
from spkid.data.processes import in_processes
from spkid.data.sources import Sources
from spkid.data.tensorfile import MAX_PICKLE
from spkid.distributed import rank
from spkid.errors import FULL, DataError, Problem, UserError, one_of
from spkid.files import UNSUPPORTED, flush, flush_folder

logger = logging.getLogger(__name__)
DTYPES = ("float16", "float32")
CHUNK = 64  # files that a process reads at once


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

    A pack is rebuilt if it is damaged, if a file holds something else now, or
    if one of those that could not be packed can be read now. Files whose size,
    times and inode are as before are not read again.

    Arguments
    ---------
    corpus : Corpus
        Each of its files must exist.
    pack_folder : str or pathlib.Path, optional
        Where packs are kept, a folder for each corpus and dtype.
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
        If the pack can't be written.

    Example
    -------
    >>> from spkid.data import Utterance
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
    packs = _Packs(corpus, Path(pack_folder), pack_dtype, progress)
    before = file_stamp(packs.target / INDEX)
    if found := packs.find():
        return found
    with locked(packs.target) as alone:
        if file_stamp(packs.target / INDEX) != before and (
            found := packs.find()  # another process has built it since
        ):
            return found
        return packs.build(alone)


class _Packs:
    """The packs of a corpus: that of its place, and those of others."""

    def __init__(
        self, corpus: Corpus, folder: Path, dtype: str, progress: bool
    ) -> None:
        self.corpus, self.dtype, self.progress = corpus, dtype, progress
        self.sources = Sources(corpus, dtype)
        self.target = folder / self.sources.pack

    def find(self) -> tuple[PackedFeatures, list[Problem]] | None:
        """A pack that holds what the files hold, and the bad files."""
        others: set[Path] = set()
        with contextlib.suppress(OSError):  # building there says why
            others.update(self.target.parent.glob(self.sources.packs))
        for folder in [self.target, *sorted(others - {self.target})]:
            if not os.path.exists(folder / INDEX):
                continue
            try:  # one process of a distributed run reads it all
                pack = PackedFeatures(folder, check=rank() == 0)
            except DamagedPack as error:
                if folder == self.target:
                    logger.warning("%s; it is rebuilt.", error.what)
                continue
            if (problems := self._compare(pack)) is not None:
                return pack, problems
        return None

    def _compare(self, pack: PackedFeatures) -> list[Problem] | None:
        """The bad files, if the pack holds all that the others hold."""
        corpus = self.corpus
        changed = self.sources.changed(pack)
        if changed is None:
            return None
        absent = [u for u in corpus.utterances if u.path not in pack.row]
        bad = check_feature_files(
            corpus.folder, absent, corpus.n_mels, self.dtype
        )
        if not len(absent) == len(bad) == len(pack.problems):
            return None  # some can be read now
        if len(changed):
            if not self._same(pack, changed):
                return None
            with contextlib.suppress(OSError):  # it can't be written there
                self.sources.save(pack.file.parent, pack.paths)
        return bad

    def _same(self, pack: PackedFeatures, rows: np.ndarray) -> bool:
        """Whether these rows' files, read again, hold what the pack holds."""
        folder = self.corpus.folder
        items = [u for u in self.corpus.utterances if u.path in pack.row]
        work = partial(_check_chunk, folder, pack.n_mels, self.dtype)
        parts = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
        chunks = [[items[row] for row in part] for part in parts]
        with (
            _bar("Checking features", len(rows), self.progress) as bar,
            contextlib.closing(in_processes(work, chunks, folder)) as results,
        ):
            for part, (moments, checksums, problems) in zip(
                parts, results, strict=True
            ):
                if (
                    problems
                    or (checksums != pack.checksums[part]).any()
                    # Another processor rounds them otherwise.
                    or not np.allclose(moments, pack.moments[part], 1e-5, 1e-5)
                ):
                    return False
                bar.update(len(part))
        return True

    def _with_room(self) -> tuple[list[Utterance], list[Problem]]:
        """The utterances whose files have the bytes for their frames, and a
        problem for each other: nobody reserves what a JSON file invents."""
        corpus, stamps = self.corpus, self.sources.stamps
        few = [
            u
            for u in corpus.utterances
            if u.length * corpus.n_mels > stamps[u.path][0] + MAX_PICKLE
        ]
        problems = check_feature_files(
            corpus.folder, few, corpus.n_mels, self.dtype
        )
        bad = {problem.file for problem in problems}
        return [u for u in corpus.utterances if u.path not in bad], problems

    def build(
        self, alone: bool
    ) -> tuple[PackedFeatures | FeatureFiles, list[Problem]]:
        """Builds in a side folder that is renamed at the end, so that a build
        that is killed leaves nothing that looks complete."""
        corpus, dtype, target = self.corpus, self.dtype, self.target
        items, lacking = self._with_room()
        frames = sum(utterance.length for utterance in items)
        need = frames * corpus.n_mels * np.dtype(dtype).itemsize
        part = target.with_name(f"{target.name}.part-{secrets.token_hex(4)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if alone:
                sweep(target)
            remove_pack(target)
            part.mkdir()
            arrays, problems = _write_frames(
                part / FRAMES, need, corpus, items, dtype, self.progress
            )
            problems = lacking + problems
            if not len(arrays["paths"]):  # there is no pack of nothing
                return FeatureFiles(corpus.folder, (), corpus.n_mels), problems
            header: dict[str, Any] = {
                "listing": self.sources.listing,
                "dtype": dtype,
                "n_mels": corpus.n_mels,
                "frames": frames,
                "problems": problems,
            }
            header["seal"] = seal(header, arrays)
            np.savez(part / INDEX, header=json.dumps(header), **arrays)
            self.sources.save(part, arrays["paths"].tolist())
            flush_folder(part)
            publish(part, target)
        except OSError as error:
            space = "free the space, " if error.errno in FULL else ""
            raise UserError(
                f"{target / FRAMES}: the pack needs {need:,} bytes and could "
                f"not be written ({error.strerror}); {space}name another "
                "folder by --pack_folder, or give --pack False."
            ) from None
        finally:
            with contextlib.suppress(OSError):
                remove_pack(part)
        return PackedFeatures(target, check=False), problems


def _bar(title: str, total: int, progress: bool) -> tqdm:
    """A progress bar that counts files."""
    return tqdm(total=total, desc=title, unit="file", disable=not progress)


def _write_frames(
    path: Path,
    need: int,
    corpus: Corpus,
    items: Sequence[Utterance],
    dtype: str,
    progress: bool,
) -> tuple[dict[str, Any], list[Problem]]:
    """Writes all frames; the index of the good files, and the problems."""
    n_mels = corpus.n_mels
    lengths = np.array([u.length for u in items], dtype=np.int64)
    offsets = np.cumsum(lengths) - lengths
    moments = np.empty((len(items), 2, n_mels), dtype=np.float32)
    checksums = np.empty(len(items), dtype=np.uint32)
    problems: list[Problem] = []
    chunks = [
        (int(offsets[begin]), items[begin : begin + CHUNK])
        for begin in range(0, len(items), CHUNK)
    ]
    work = partial(_pack_chunk, path, corpus.folder, n_mels, dtype)
    with (
        open(path, "w+b") as file,
        _bar("Packing features", len(items), progress) as bar,
    ):
        _reserve(file, need)
        end = 0
        with contextlib.closing(
            in_processes(work, chunks, corpus.folder)
        ) as results:
            for done in results:
                begin, end = end, end + len(done[1])
                moments[begin:end], checksums[begin:end], found = done
                problems += found
                bar.update(end - begin)
        flush(file.fileno())
    bad = {problem.file for problem in problems}
    good = np.array([u.path not in bad for u in items], dtype=bool)
    index = {
        "paths": np.array([u.path for u in items]),
        "lengths": lengths,
        "offsets": offsets,
        "moments": moments,
        "checksums": checksums,
    }
    return {name: index[name][good] for name in index}, problems


def _reserve(file: BinaryIO, size: int) -> None:
    """Gives an empty file its size; a full disk is noticed here, where the
    file system can tell."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    file.truncate(size)


def _pack_chunk(path, folder, n_mels, dtype, chunk):
    """Writes the frames of some files from a frame of the pack on; their
    moments and checksums, and the problems of bad files."""
    place, items = chunk
    packed, *found = _read_chunk(folder, n_mels, dtype, items)
    with open(path, "r+b") as file:
        file.seek(place * n_mels * packed.element_size())
        file.write(packed.numpy().data)
    return found


def _check_chunk(folder, n_mels, dtype, items):
    """As :func:`_pack_chunk`, but writes nothing."""
    return _read_chunk(folder, n_mels, dtype, items)[1:]


def _read_chunk(folder, n_mels, dtype, items):
    """Frames of some files as they are packed; their moments and checksums,
    and the problems of bad files."""
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
    return packed, moments, checksums, problems
