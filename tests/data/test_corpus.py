"""A corpus never changes; one function leaves bad files out of it."""

import dataclasses
from pathlib import Path

import pytest

from spkid.data import Corpus, Utterance, leave_out, manifest
from spkid.errors import DataError, Problem, UserError

CORPUS = Corpus(
    Path("data"),
    40,
    ("ann", "bob"),
    tuple(Utterance(f"{n}.pt", 9 + n, "ann" if n else "bob") for n in range(7)),
    (Utterance("t.pt", 5), Utterance("u.pt", 6)),
    ("t.pt", "u.pt"),
)


def bad(*names):
    return [Problem(name, "", "has no bytes", "fix it") for name in names]


def test_a_corpus_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CORPUS.labelled = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        CORPUS.test[0].speaker = "ann"
    hash(CORPUS)  # no field can be changed in place


def test_leaving_files_out_makes_a_new_corpus():
    before = dataclasses.replace(CORPUS)
    problems = bad("2.pt", "t.pt")
    left = leave_out(CORPUS, problems, "skip", max_bad_share=0.5)
    assert before == CORPUS
    assert problems == bad("2.pt", "t.pt")
    assert [u.path for u in left.utterances] == [
        *("0.pt", "1.pt", "3.pt", "4.pt", "5.pt", "6.pt", "u.pt")
    ]
    assert left.skipped == tuple(problems)
    assert left.test_paths == CORPUS.test_paths
    more = leave_out(left, bad("3.pt"), "skip", max_bad_share=0.5)
    assert [p.file for p in more.skipped] == ["2.pt", "t.pt", "3.pt"]
    assert leave_out(left, [], "stop") == left


def test_stop_lists_all_bad_files():
    with pytest.raises(DataError) as caught:
        leave_out(CORPUS, bad("2.pt", "t.pt"), "stop", max_bad_share=1.0)
    assert caught.value.problems == bad("2.pt", "t.pt")


def test_the_share_counts_what_was_skipped_before():
    left = leave_out(CORPUS, bad("2.pt"), "skip", max_bad_share=2 / 9)
    left = leave_out(left, bad("3.pt"), "skip", max_bad_share=2 / 9)
    with pytest.raises(UserError, match="3 of 9 feature files can't be used"):
        leave_out(left, bad("4.pt"), "skip", max_bad_share=2 / 9)


def test_a_speaker_may_not_lose_all_utterances():
    with pytest.raises(
        DataError, match="speaker 'bob' has no usable utterance"
    ):
        leave_out(CORPUS, bad("0.pt"), "skip", max_bad_share=0.5)


def test_speakers_without_utterances_are_left_out_if_wanted():
    skip = {"on_bad_file": "skip", "max_bad_share": 1.0}
    labels = dataclasses.replace(CORPUS.test[0], speaker="bob")
    corpus = dataclasses.replace(CORPUS, test=(labels, *CORPUS.test[1:]))
    left = leave_out(corpus, bad("0.pt"), **skip, speakers="present")
    assert left.speakers == ("ann",)
    assert {u.speaker for u in left.labelled} == {"ann"}
    assert left.test == CORPUS.test  # bob's is of an unknown speaker now
    assert left.test_paths == CORPUS.test_paths
    assert leave_out(corpus, [], speakers="present") == corpus
    with pytest.raises(DataError) as caught:
        leave_out(corpus, bad(*(f"{n}.pt" for n in range(7))), **skip)
    everybody = str(caught.value)
    assert "2 of 2 speakers have no usable utterance, as 'ann'" in everybody
    assert "present" not in everybody  # it would not help
    with pytest.raises(DataError, match="2 of 2 speakers"):
        leave_out(
            corpus,
            bad(*(f"{n}.pt" for n in range(7))),
            **skip,
            speakers="present",
        )


def test_a_corpus_of_test_files_alone_needs_no_speaker_s_utterance():
    alone = dataclasses.replace(CORPUS, labelled=())
    left = leave_out(alone, bad("t.pt"), "skip", max_bad_share=0.5)
    assert [u.path for u in left.test] == ["u.pt"]
    assert leave_out(alone, [], speakers="present") == alone


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="on_bad_file='skp' must be stop or sk"):
        leave_out(CORPUS, [], "skp")
    with pytest.raises(UserError, match="speakers='some' must be all or pres"):
        leave_out(CORPUS, [], speakers="some")


def test_the_digest_of_a_corpus_never_changes():
    """Old runs know their data by it."""
    assert CORPUS.digest() == "c2d23cf8b933bc45c52ef7228c447375"
    moved = dataclasses.replace(CORPUS, folder=Path("elsewhere"))
    assert moved.digest() == CORPUS.digest()
    other = dataclasses.replace(CORPUS, speakers=("bob", "ann"))
    assert other.digest() != CORPUS.digest()


def test_a_manifest_keeps_the_order():
    found = manifest(CORPUS.utterances)
    assert list(found) == [u.path for u in CORPUS.utterances]
    assert found["t.pt"] == {"length": 5, "spk_id": None}
