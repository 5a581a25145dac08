"""From scores to figures, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from spkid.errors import UserError
from spkid.evaluation.metrics import expected_accuracy
from spkid.evaluation.scores import (
    Score,
    expect,
    load_evaluation,
    save_evaluation,
    score_batch,
    summarize,
    summarize_parts,
)


def make_scores(count=60, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    log_posteriors = torch.from_numpy(generator.normal(size=(count, classes)))
    log_posteriors = log_posteriors.log_softmax(dim=1)
    chances = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    targets = torch.from_numpy(generator.choice(classes, count, p=chances))
    ids = [str(i) for i in range(count)]
    return score_batch(ids, log_posteriors, targets), log_posteriors, targets


def test_accuracies_and_loss_are_scikit_learn_s():
    scores, log_posteriors, targets = make_scores()
    guesses = log_posteriors.argmax(dim=1)
    plain, by_speaker = summarize(scores), summarize(scores, by_speaker=True)
    assert plain["accuracy"] == accuracy_score(targets, guesses)
    expected = balanced_accuracy_score(targets, guesses)
    assert abs(by_speaker["accuracy"] - expected) < 1e-12
    assert by_speaker["accuracy"] != plain["accuracy"]
    loss = log_loss(targets, log_posteriors.exp())
    assert abs(plain["loss"] - loss) < 1e-6
    highest = log_posteriors.exp().max(dim=1).values
    np.testing.assert_allclose(
        [score.confidence for score in scores.values()], highest
    )


def test_the_gap_is_over_the_speakers_that_both_parts_have():
    right, wrong = {1: Score(1, 1, 0.0)}, {1: Score(0, 1, 1.0)}
    scores = {
        "known 1": right[1],
        "new 1": wrong[1],
        "new 2": Score(2, 2, 0.0),  # no known utterance of this speaker
    }
    parts = {key: key.split()[0] for key in scores}
    result = summarize_parts(scores, parts)
    assert result["accuracy"] == 0.5
    assert result["known_accuracy"] == 1.0
    assert result["gap"] == 1.0
    only = {key: s for key, s in scores.items() if key != "new 1"}
    assert summarize_parts(only, parts)["gap"] is None


def test_unknown_speakers_count_for_nothing():
    scores, _, _ = make_scores()
    more = {**scores, "x": Score(0, -1, 0.0)}
    assert summarize(more) == summarize(scores)
    nothing = {"accuracy": None, "loss": None}
    assert summarize({"x": Score(0, -1, 0.0)}, True) == nothing
    assert summarize_parts({}, {}) == nothing


def test_only_new_sessions_tell_what_to_expect():
    scores, _, _ = make_scores()
    tested = make_scores(seed=1)[0]
    half = list(scores)[::2]
    parts = {key: "new" if key in half else "known" for key in scores}
    told = expect(scores, parts, tested)
    rows = np.array([scores[key][:2] for key in half])
    assert told == expected_accuracy(
        np.array([scores[key].confidence for key in half]),
        rows[:, 0] == rows[:, 1],
        rows[:, 1],
        np.array([score.confidence for score in tested.values()]),
        np.array([score.guess for score in tested.values()]),
    )
    unlabelled = {k: s._replace(target=-1) for k, s in tested.items()}
    assert told == expect(scores, parts, unlabelled)
    assert expect({}, {}, tested) is expect(scores, parts, {}) is None
    for flattering in ("known", "random"):
        parts = dict.fromkeys(scores, flattering)
        assert expect(scores, parts, tested) is None


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    scores, _, _ = make_scores()
    scores = {
        key: s._replace(embedding=np.ones(2)) for key, s in scores.items()
    }
    parts = dict(zip(scores, ["new", "known", "test"] * 20, strict=True))
    frames = dict.fromkeys(scores, 300)
    save_evaluation(tmp_path / "evaluation.npz", scores, parts, frames)
    read, read_parts = load_evaluation(tmp_path / "evaluation.npz")
    assert read_parts == parts
    assert list(read) == list(scores)
    for one, other in zip(read.values(), scores.values(), strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(one[2:4], other[2:4], rtol=1e-6)


def test_a_damaged_evaluation_costs_one_sentence(tmp_path):
    path = tmp_path / "evaluation.npz"
    np.savez(path, id=np.array(["a"]), part=np.array(["new"]))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"evaluation\.npz: could not be"):
            load_evaluation(path)
