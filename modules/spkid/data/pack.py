"""Features of all utterances in one memory-mapped file.

64,666 small files cost two minutes an epoch to open; one pack costs a page
fault. Workers and processes share it through the operating system's cache.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch

from spkid.data.feature_file import Integers
from spkid.errors import Problem, UserError
from spkid.models.masks import valid_mask

INDEX, FRAMES = "index.npz", "frames.bin"


class PackedFeatures:
    """Features of many utterances in one memory-mapped file.

    ``problems`` lists the files that could not be packed.

    Arguments
    ---------
    folder : str or pathlib.Path
        A pack made by :func:`spkid.data.open_features`.

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

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            with np.load(folder / INDEX) as index:
                header = json.loads(str(index["header"]))
                self.paths: list[str] = index["paths"].tolist()
                self.lengths, self.offsets = index["lengths"], index["offsets"]
                self.moments = index["moments"]
                self.checksums = index["checksums"]
            self.stamps, self.dtype = header["stamps"], header["dtype"]
            self.n_mels: int = header["n_mels"]
            self.shape = (header["frames"], self.n_mels)
            # A pack of an older version has none.
            self.problems = [Problem(*p) for p in header.get("problems", ())]
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
        self.on_device = False
        self._map()

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
