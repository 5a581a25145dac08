"""One table of what a model says of utterances, and its figures."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from spkid.distributed import gather
from spkid.errors import UserError, one_line
from spkid.evaluation.metrics import Expectation, expected_accuracy
from spkid.files import check_stored, open_regular, read_json, save_atomically

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A kind of utterances, as tables and figures show it."""

    name: str
    colour: str
    marker: str  # Matplotlib's


# The most telling part first.
PARTS = {
    "new": Part("new sessions", "#2f80c9", "o"),
    "random": Part("random utterances", "#2f80c9", "o"),
    "known": Part("known sessions", "#e08a2e", "s"),
    "test": Part("test utterances", "#2a9d78", "^"),
    "train": Part("training", "#888888", "o"),
}
MAX_BYTES = 2**32  # of a file: ten million utterances
# The type of each column.
COLUMNS = {
    "id": str,
    "part": str,
    "target": np.int64,
    "guess": np.int64,
    "loss": np.float32,
    "confidence": np.float32,
    "frames": np.int64,
    "embedding": np.float16,
}
SAVED = COLUMNS | {"speakers": str}


@dataclass(eq=False)
class Evaluation:
    """What a model says of n utterances, as columns with a value for each.

    Raises
    ------
    ValueError
        If the columns differ in length, a class has no name, or a part is
        not one of ``PARTS``.

    Example
    -------
    >>> scored = Evaluation.of_batch(
    ...     ["a", "b"],
    ...     torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(),
    ...     torch.tensor([0, 1]),
    ...     torch.zeros(2, 8),
    ...     [300, 200],
    ...     ["new", "new"],
    ...     ["ann", "bob"],
    ... )
    >>> scored.accuracy(), scored.select(scored.right).id.tolist()
    (0.5, ['a'])
    """

    id: np.ndarray
    part: np.ndarray  # keys of PARTS
    target: np.ndarray  # class indices; -1 where the speaker is unknown
    guess: np.ndarray  # class indices
    loss: np.ndarray  # -log posterior of the target; meaningless if unknown
    confidence: np.ndarray  # posterior of the guess
    frames: np.ndarray
    embedding: np.ndarray  # [n, size]
    speakers: tuple[str, ...]  # names by class index

    def __post_init__(self) -> None:
        for name, dtype in COLUMNS.items():
            column: np.ndarray = np.asarray(getattr(self, name), dtype)
            if column.ndim != (2 if name == "embedding" else 1):
                raise ValueError(f"column {name} has {column.ndim} dimensions")
            setattr(self, name, column)
        if len({len(getattr(self, name)) for name in COLUMNS}) > 1:
            raise ValueError("the columns differ in length")
        for classes, first in ((self.target, -1), (self.guess, 0)):
            lowest, highest = classes.min(initial=0), classes.max(initial=-1)
            if highest >= len(self.speakers):
                raise ValueError(f"class {highest} has no name")
            if lowest < first:
                raise ValueError(f"class {lowest} is below {first}")
        unknown = self.part[~np.isin(self.part, list(PARTS))].tolist()
        if unknown:
            raise ValueError(f"there is no part {unknown[0]!a:.60}")

    @classmethod
    def of_batch(
        cls,
        ids: Sequence[str],
        log_posteriors: torch.Tensor,
        targets: torch.Tensor,
        embeddings: torch.Tensor,
        frames: Sequence[int],
        parts: Sequence[str],
        speakers: Sequence[str],
    ) -> Evaluation:
        """A table of a batch.

        Arguments
        ---------
        ids, frames, parts, speakers : sequence
            As the columns of those names.
        log_posteriors : torch.Tensor [batch, speakers]
            The model's output.
        targets : torch.Tensor [batch]
            Class indices; -1 where they are unknown.
        embeddings : torch.Tensor [batch, size]
            The model's, too.
        """
        known = targets.clamp(min=0).unsqueeze(1)
        best, guesses = log_posteriors.max(dim=1)
        columns = {
            "target": targets,
            "guess": guesses,
            "loss": -log_posteriors.gather(1, known).squeeze(1).float(),
            "confidence": best.exp().float(),
            "embedding": embeddings.half(),
        }
        return cls(
            id=np.array(ids),
            part=np.array(parts),
            frames=np.array(frames),
            speakers=tuple(speakers),
            **{key: x.detach().cpu().numpy() for key, x in columns.items()},
        )

    def with_posteriors(self, log_posteriors: np.ndarray) -> Evaluation:
        """The same utterances, as another classifier judges them.

        Arguments
        ---------
        log_posteriors : np.ndarray [n, speakers]
            In the order of the table.
        """
        rows, guess = np.arange(len(self)), log_posteriors.argmax(1)
        return replace(
            self,
            guess=guess,
            loss=-log_posteriors[rows, np.maximum(self.target, 0)],
            confidence=np.exp(log_posteriors[rows, guess]),
        )

    @classmethod
    def concatenate(
        cls, tables: Iterable[Evaluation], speakers: Sequence[str]
    ) -> Evaluation:
        """The utterances of all tables, as one table.

        Example
        -------
        >>> len(Evaluation.concatenate([], ["ann"]))
        0
        """
        # An empty table doesn't know the size of embeddings.
        tables = [table for table in tables if len(table)]
        empty = dict.fromkeys(COLUMNS, np.empty(0))
        columns = empty | {"embedding": np.empty((0, 0))}
        if tables:
            columns = {
                name: np.concatenate([getattr(table, name) for table in tables])
                for name in COLUMNS
            }
        return cls(**columns, speakers=tuple(speakers))

    def gather(self) -> Evaluation:
        """The tables of all processes as one, with each utterance once."""
        whole = self.concatenate(gather(self), self.speakers)
        first = np.unique(whole.id, return_index=True)[1]
        return whole.select(np.sort(first))

    def __len__(self) -> int:
        return len(self.id)

    def select(self, which: np.ndarray) -> Evaluation:
        """The utterances of a boolean mask [n] or an array of indices."""
        columns = {name: getattr(self, name)[which] for name in COLUMNS}
        return Evaluation(**columns, speakers=self.speakers)

    def of_part(self, *names: str) -> Evaluation:
        """The utterances of some parts."""
        return self.select(np.isin(self.part, names))

    @property
    def known(self) -> np.ndarray:
        """[n] booleans: whether the speaker is known."""
        return self.target >= 0

    @property
    def right(self) -> np.ndarray:
        """[n] booleans: whether the guess is right."""
        return self.target == self.guess

    def accuracy(self, by_speaker: bool = False) -> float | None:
        """Share of right guesses where the speaker is known; None if none is.

        Arguments
        ---------
        by_speaker : bool
            The mean of the speakers' accuracies instead.
        """
        known, right = self.target[self.known], self.right[self.known]
        if not len(known):
            return None
        if by_speaker:
            index = np.unique(known, return_inverse=True)[1]
            right = np.bincount(index, right) / np.bincount(index)
        return float(right.mean())

    def mean_loss(self) -> float | None:
        """Mean loss where the speaker is known; None if none is."""
        losses = self.loss[self.known].tolist()
        return sum(losses) / len(losses) if losses else None

    def summary(self) -> dict[str, float | None]:
        """Figures of a validation on new and on known sessions.

        Accuracies are means over speakers. Speakers with long held-out
        sessions have less training data; a mean over utterances would be
        pessimistic.

        Returns
        -------
        dict
            ``accuracy`` and ``loss`` of what isn't known; where some is known
            also ``known_accuracy``, ``known_loss`` and ``gap``, the difference
            of the accuracies over the speakers who have both.
        """
        is_known = self.part == "known"
        new, known = self.select(~is_known), self.select(is_known)
        result = {"accuracy": new.accuracy(True), "loss": new.mean_loss()}
        if len(known):
            result["known_accuracy"] = known.accuracy(True)
            result["known_loss"] = known.mean_loss()
            both = np.intersect1d(known.target, new.target)
            high, low = (
                one.select(np.isin(one.target, both)).accuracy(True)
                for one in (known, new)
            )
            result["gap"] = None
            if high is not None and low is not None:
                result["gap"] = high - low
        return result

    def save(self, path: str | Path) -> None:
        """Writes the table as a NumPy .npz file, an array for each column."""
        content = io.BytesIO()
        arrays = {name: getattr(self, name) for name in COLUMNS}
        np.savez(content, **arrays, speakers=np.array(self.speakers, str))
        save_atomically(content.getvalue(), path)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Reads a table that :meth:`save` wrote.

        Raises
        ------
        UserError
            If the file is missing, damaged or of an older version.
        """
        try:
            with open_regular(path) as file:
                if check_stored(file) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
                with np.load(file, allow_pickle=False) as arrays:
                    columns = {name: arrays[name] for name in SAVED}
            for name, column in columns.items():
                # Any number of empty texts takes no byte.
                kind = np.dtype(SAVED[name]).kind
                if column.dtype.kind != kind or column.nbytes < column.size:
                    raise ValueError(f"column {name} has type {column.dtype}")
            confidence, speakers = columns["confidence"], columns["speakers"]
            # NaN, of a diverged model, is neither.
            if ((confidence < 0) | (confidence > 1.001)).any():
                raise ValueError("a confidence isn't in [0, 1]")
            if speakers.ndim != 1:
                raise ValueError(
                    f"column speakers has {speakers.ndim} dimensions"
                )
            return cls(**columns | {"speakers": tuple(speakers.tolist())})
        except Exception as error:  # NumPy has many for a bad file
            raise UserError(
                f"{path}: could not be read ({one_line(error)}); train.py with "
                "--test_only writes it again."
            ) from None


def load_validation(
    folder: str | Path, scoring: dict[str, Any]
) -> Evaluation | None:
    """What a run's system says of its held-out utterances.

    Arguments
    ---------
    folder : str or pathlib.Path
        The run's output folder.
    scoring : dict
        How utterances are scored, from the run's settings.

    Returns
    -------
    Evaluation, optional
        None where nothing was kept, or is damaged, which costs a warning, or
        was scored in another way, as after a ``--test_only`` that didn't reach
        its end.

    Example
    -------
    >>> load_validation(getfixture("tmp_path"), {})
    """
    results, table = (
        Path(folder, n) for n in ("results.json", "evaluation.npz")
    )
    if not (results.exists() and table.exists()):
        return None
    try:
        if read_json(results).get("scored_by") != scoring:
            return None
        return Evaluation.load(table)
    except UserError as error:
        logger.warning(
            "%s No accuracy is estimated: train.py --test_only writes %s and "
            "%s again.",
            *(error, results.name, table.name),
        )
        return None


def by_part(summary: dict[str, float | None]) -> dict:
    """Nests the figures of :meth:`Evaluation.summary` for results.json.

    Example
    -------
    >>> by_part({"accuracy": 0.5, "loss": 1.0})
    {'valid': {'accuracy': 0.5, 'loss': 1.0}}
    """
    keys = ("accuracy", "loss")
    nested: dict = {"valid": {key: summary[key] for key in keys}}
    if "gap" in summary:
        nested["known"] = {key: summary[f"known_{key}"] for key in keys}
        nested["gap"] = summary["gap"]
    return nested


def expect(validated: Evaluation, tested: Evaluation) -> Expectation | None:
    """Estimates the accuracy of a test from the model's confidence in it.

    Arguments
    ---------
    validated : Evaluation
        Only utterances of new sessions count: accuracy on others is too high.
    tested : Evaluation
        Needs no target.

    Returns
    -------
    Expectation
        See :func:`spkid.evaluation.metrics.expected_accuracy`; None where no
        new session was validated on, or nothing tested.

    Example
    -------
    >>> empty = Evaluation.concatenate([], ["ann", "bob"])
    >>> expect(validated=empty, tested=empty) is None
    True
    """
    new = validated.of_part("new")
    if not len(new) or not len(tested):
        return None
    validation = new.confidence, new.right, new.target
    return expected_accuracy(*validation, tested.confidence, tested.guess)
