"""What there is: speakers and utterances."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spkid.errors import Problem, UserError, one_of, raise_for, table

POLICIES = ("stop", "skip")
SPEAKERS = ("all", "present")


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
    silence: str = "hw4"  # what the features' maker removed silences with

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
    speakers: str = "all",
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
    speakers : str
        "all": each must keep a labelled utterance; "present": those without
        any are left out. A corpus of test utterances keeps all.

    Returns
    -------
    Corpus
        Its ``skipped`` has the problems, too.

    Raises
    ------
    UserError
        If no file may be skipped, if more are bad than may be, or if a
        speaker who must stay has no utterance.

    Example
    -------
    >>> utterances = (Utterance("a.pt", 9, "ann"), Utterance("b.pt", 9, "ann"))
    >>> corpus = Corpus(Path("data"), 40, ("ann",), utterances)
    >>> problem = Problem("b.pt", "", "has no bytes", "download it again")
    >>> leave_out(corpus, [problem], "skip", max_bad_share=0.5).labelled
    (Utterance(path='a.pt', length=9, speaker='ann'),)
    """
    one_of(on_bad_file, POLICIES, "on_bad_file")
    one_of(speakers, SPEAKERS, "speakers")
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
    kept = replace(corpus, labelled=labelled, test=test, skipped=skipped)
    if not corpus.labelled:
        return kept
    present = {u.speaker for u in labelled}
    absent = [name for name in corpus.speakers if name not in present]
    if absent and (speakers == "all" or not present):
        problem = without_utterance("", absent, len(corpus.speakers))
        raise_for([problem], corpus.folder)
    return only_speakers(kept, present) if absent else kept


def without_utterance(file: str, absent: Sequence[str], total: int) -> Problem:
    """The problem that speakers have no utterance to train on.

    Arguments
    ---------
    file : str
        Where the utterances should be listed.
    absent : sequence of str
        The speakers, at least one.
    total : int
        All speakers, with those who have some.

    Example
    -------
    >>> print(*without_utterance("metadata.json", ["ann", "bob"], 9)[:3])
    metadata.json 2 of 9 speakers have no usable utterance, as 'ann'
    """
    entry, what = f"speaker {absent[0]!a:.60}", "has no usable utterance"
    if len(absent) > 1:
        entry = f"{len(absent):,} of {total:,} speakers"
        what = f"have no usable utterance, as {absent[0]!a:.60}"
    cure = "add or fix some"
    if len(absent) < total:
        cure += ", or give --speakers present to train without "
        cure += "them" if len(absent) > 1 else "the speaker"
    return Problem(file, entry, what, cure)


def only_speakers(corpus: Corpus, speakers: Iterable[str | None]) -> Corpus:
    """The corpus as if it had only some of its speakers, in its own order;
    test utterances stay, but those of the others are of unknown speakers.

    Example
    -------
    >>> utterances = (Utterance("a.pt", 9, "ann"), Utterance("b.pt", 9, "bob"))
    >>> corpus = Corpus(Path("data"), 40, ("ann", "bob"), test=utterances)
    >>> only_speakers(corpus, ["bob"]).test[0]
    Utterance(path='a.pt', length=9, speaker=None)
    """
    names = set(speakers)
    return replace(
        corpus,
        speakers=tuple(name for name in corpus.speakers if name in names),
        labelled=tuple(u for u in corpus.labelled if u.speaker in names),
        test=tuple(
            u if u.speaker in names else replace(u, speaker=None)
            for u in corpus.test
        ),
    )


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
