"""The files that a pack was made of, and whether they are still the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spkid.data.corpus import Corpus
from spkid.data.pack import PackedFeatures, file_stamp
from spkid.files import open_regular


class Sources:
    """A corpus's files, as they are now.

    A pack's name says their listing (paths, frames, bands, dtype) and their
    place. In the pack's folder lie the files' stamps, for each place that it
    has been compared with: as for a data folder that was copied or moved.

    Arguments
    ---------
    corpus : Corpus
        Whose files.
    dtype : str
        Of the pack.

    Example
    -------
    >>> sources = Sources(Corpus(Path("data"), 40), "float16")
    >>> len(sources.pack) - len("data")
    18
    """

    def __init__(self, corpus: Corpus, dtype: str) -> None:
        self.utterances = corpus.utterances
        listing = [(u.path, u.length) for u in corpus.utterances]
        content = json.dumps([corpus.n_mels, dtype, listing]).encode()
        self.listing = hashlib.blake2b(content, digest_size=16).hexdigest()
        path = os.path.realpath(corpus.folder)
        place = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
        # Any file system takes these letters.
        name = re.sub(r"[^A-Za-z0-9.-]", "_", os.path.basename(path))[:40]
        self.pack = f"{name}-{self.listing[:8]}-{place}"
        self.packs = f"*-{self.listing[:8]}-????????"  # those of any place
        self.file = f"sources-{place}.npy"
        self.stamps = {
            u.path: file_stamp(os.path.join(path, u.path))
            for u in corpus.utterances
        }

    def changed(self, pack: PackedFeatures) -> np.ndarray | None:
        """Rows of a pack [n] whose files may hold something else now.

        None: some do, or it is a pack of other files.
        """
        items = [u for u in self.utterances if u.path in pack.row]
        if (
            pack.listing != self.listing
            or pack.paths != [u.path for u in items]
            or pack.lengths.tolist() != [u.length for u in items]
        ):
            return None
        stamps = self._stamps(pack.paths)
        with contextlib.suppress(Exception):  # none yet, or damaged
            with open_regular(pack.file.with_name(self.file)) as file:
                known = np.lib.format.read_array(file)
            differ = known != stamps
            return (
                None if differ[:, 0].any() else differ.any(axis=1).nonzero()[0]
            )
        return np.arange(len(items))

    def save(self, folder: Path, paths: Sequence[str]) -> None:
        """Writes these files' stamps to a pack's folder, or raises OSError."""
        part = folder / f"{self.file}.{os.getpid()}.part"
        with open(part, "wb") as file:
            np.save(file, self._stamps(paths))
        os.replace(part, folder / self.file)

    def _stamps(self, paths: Sequence[str]) -> np.ndarray:
        """Size, times and inode of some of the files [n, 4]."""
        return np.array([self.stamps[path] for path in paths], dtype=np.int64)
