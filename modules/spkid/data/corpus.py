"""What there is: speakers and utterances."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from spkid.errors import Problem, UserError, one_of, raise_for, table

POLICIES = ("stop", "skip")


@dataclass(frozen=True)
class Utterance:
    """One feature file: path in the data folder, frames, speaker's name."""

    path: str
    length: int
    speaker: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Speakers and utterances of a data folder, checked.

    Example
    -------
    >>> corpus = Corpus(Path("data"), 40, test=(Utterance("a.pt", 100),))
    >>> len(corpus.utterances)
    1
    """

    folder: Path
    n_mels: int
    speakers: tuple[str, ...] = ()  # by class index
    labelled: tuple[Utterance, ...] = ()
    test: tuple[Utterance, ...] = ()
    test_paths: tuple[str, ...] = ()  # all that are listed, skipped ones too
    skipped: tuple[Problem, ...] = ()

    @property
    def utterances(self) -> tuple[Utterance, ...]:
        """The labelled and the test utterances."""
        return self.labelled + self.test

    def digest(self) -> str:
        """32 hexadecimal digits that identify speakers and utterances."""
        content = [self.n_mels, self.speakers]
        content += [manifest(part) for part in (self.labelled, self.test)]
        text = json.dumps(content).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def leave_out(
    corpus: Corpus,
    problems: Iterable[Problem],
    on_bad_file: str = "stop",
    max_bad_share: float = 0.05,
) -> Corpus:
    """The corpus without its bad files, or an error.

    Arguments
    ---------
    corpus : Corpus
        Stays as it is.
    problems : iterable of Problem
        One for each feature file that can't be used.
    on_bad_file : str
        "stop": any problem is an error; "skip": bad files are left out.
    max_bad_share : float
        Largest share of files that may be skipped.

    Returns
    -------
    Corpus
        Its ``skipped`` has the problems, too.

    Raises
    ------
    UserError
        If no file may be skipped, if more are bad than may be, or if a
        speaker loses all utterances.

    Example
    -------
    >>> utterances = (Utterance("a.pt", 9, "ann"), Utterance("b.pt", 9, "ann"))
    >>> corpus = Corpus(Path("data"), 40, ("ann",), utterances)
    >>> problem = Problem("b.pt", "", "has no bytes", "download it again")
    >>> leave_out(corpus, [problem], "skip", max_bad_share=0.5).labelled
    (Utterance(path='a.pt', length=9, speaker='ann'),)
    """
    one_of(on_bad_file, POLICIES, "on_bad_file")
    problems = tuple(problems)
    if on_bad_file == "stop":
        raise_for(problems, corpus.folder)
    skipped = corpus.skipped + problems
    total = len(corpus.utterances) + len(corpus.skipped)
    if problems and len(skipped) > max_bad_share * total:
        raise UserError(
            f"{corpus.folder}: {len(skipped):,} of {total:,} feature files "
            f"can't be used, more than max_bad_share={max_bad_share} allows; "
            f"fix them, or raise it.\n{table(skipped)}"
        )
    bad = {problem.file for problem in problems}
    labelled, test = (
        tuple(u for u in part if u.path not in bad)
        for part in (corpus.labelled, corpus.test)
    )
    silent = {u.speaker for u in corpus.labelled}
    silent -= {u.speaker for u in labelled}
    raise_for(
        (
            Problem(
                "",
                f"speaker {speaker!a}",
                "has no utterance left",
                "fix one of the speaker's files, or remove the speaker",
            )
            for speaker in corpus.speakers
            if speaker in silent
        ),
        corpus.folder,
    )
    return replace(corpus, labelled=labelled, test=test, skipped=skipped)


def manifest(utterances: Iterable[Utterance]) -> dict[str, dict]:
    """Utterances in SpeechBrain's form, in the same order.

    Returns
    -------
    dict
        Feature path to ``length`` (frames) and ``spk_id`` (a name, or None).

    Example
    -------
    >>> manifest([Utterance("a.pt", 9, "ann")])
    {'a.pt': {'length': 9, 'spk_id': 'ann'}}
    """
    return {
        u.path: {"length": u.length, "spk_id": u.speaker} for u in utterances
    }
