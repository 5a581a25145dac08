"""The table of scores: against scikit-learn, plain loops, and its own file."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from spkid.errors import UserError
from spkid.evaluation import PARTS, Evaluation, by_part, expect, scores
from spkid.evaluation.metrics import expected_accuracy
from spkid.evaluation.scores import COLUMNS

NAMES = tuple("abcde")


def make_table(count=60, seed=0, parts=("new",)):
    """A table of random scores, and the log-posteriors that it is made of."""
    generator, classes = np.random.default_rng(seed), len(NAMES)
    log_posteriors = torch.from_numpy(generator.normal(size=(count, classes)))
    log_posteriors = log_posteriors.log_softmax(dim=1)
    chances = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    targets = torch.from_numpy(generator.choice(classes, count, p=chances))
    table = Evaluation.of_batch(
        [f"{seed}/{i}" for i in range(count)],
        log_posteriors,
        targets,
        torch.from_numpy(generator.normal(size=(count, 2))),
        [100 + i for i in range(count)],
        [parts[i % len(parts)] for i in range(count)],
        NAMES,
    )
    return table, log_posteriors


def small(*rows):
    """A table of (part, target, guess)."""
    parts, targets, guesses = zip(*rows, strict=True)
    n = len(rows)
    return Evaluation(
        id=np.array([str(i) for i in range(n)]),
        part=np.array(parts),
        target=np.array(targets),
        guess=np.array(guesses),
        loss=np.arange(n),
        confidence=np.full(n, 0.5),
        frames=np.full(n, 9),
        embedding=np.zeros((n, 2)),
        speakers=NAMES,
    )


def assert_same(one, other):
    assert one.speakers == other.speakers
    for name in COLUMNS:
        ours, theirs = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(ours, theirs, name)
        assert ours.dtype.kind == theirs.dtype.kind


def test_accuracies_and_loss_are_scikit_learn_s():
    table, log_posteriors = make_table()
    guesses = log_posteriors.argmax(dim=1)
    assert table.accuracy() == accuracy_score(table.target, guesses)
    by_speaker = table.accuracy(by_speaker=True)
    expected = balanced_accuracy_score(table.target, guesses)
    assert abs(by_speaker - expected) < 1e-12
    assert by_speaker != table.accuracy()
    loss = log_loss(table.target, log_posteriors.exp())
    assert abs(table.mean_loss() - loss) < 1e-6
    highest = log_posteriors.exp().max(dim=1).values
    np.testing.assert_allclose(table.confidence, highest, rtol=1e-6)


rows = st.lists(
    st.tuples(
        st.sampled_from(["new", "known", "random"]),
        st.integers(-1, 4),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=30,
)


@given(rows)
def test_summary_is_what_plain_loops_count(rows):
    def accuracy(chosen):
        totals = {}
        for _, target, guess in chosen:
            if target >= 0:
                totals.setdefault(target, []).append(target == guess)
        means = [sum(right) / len(right) for right in totals.values()]
        return sum(means) / len(means) if means else None

    def loss(kind):
        losses = [
            i
            for i, row in enumerate(rows)
            if (row[0] == "known") == kind and row[1] >= 0
        ]
        return sum(losses) / len(losses) if losses else None

    known = [row for row in rows if row[0] == "known"]
    new = [row for row in rows if row[0] != "known"]
    expected = {"accuracy": accuracy(new), "loss": loss(False)}
    if known:
        both = {row[1] for row in known} & {row[1] for row in new}
        high, low = (
            accuracy([row for row in part if row[1] in both])
            for part in (known, new)
        )
        expected["known_accuracy"] = accuracy(known)
        expected["known_loss"] = loss(True)
        expected["gap"] = None if high is None else high - low
    assert small(*rows).summary() == pytest.approx(expected)


def test_gap_is_over_the_speakers_that_both_parts_have():
    rows = ("known", 1, 1), ("new", 1, 0), ("new", 2, 2)
    result = small(*rows).summary()
    assert result["accuracy"] == 0.5
    assert result["known_accuracy"] == 1.0
    assert result["gap"] == 1.0
    assert small(rows[0], rows[2]).summary()["gap"] is None


def test_unknown_speakers_do_not_count():
    table, _ = make_table()
    more = Evaluation.concatenate([table, small(("new", -1, 0))], NAMES)
    assert more.summary() == table.summary()
    assert more.accuracy() == table.accuracy()
    assert not more.known[-1] and not more.right[-1] and more.known[:-1].all()
    unknown = small(("new", -1, 0))
    assert unknown.accuracy(by_speaker=True) is None
    assert unknown.mean_loss() is None
    both = small(("new", -1, 0), ("known", -1, 0))
    assert set(both.summary().values()) == {None}


def test_an_empty_table_works_everywhere(tmp_path):
    table = Evaluation.concatenate([], NAMES)
    assert len(table) == 0
    assert table.summary() == {"accuracy": None, "loss": None}
    assert table.accuracy() is table.mean_loss() is None
    table.save(tmp_path / "evaluation.npz")
    for same in (
        table.gather(),
        table.select(table.known),
        table.of_part("test"),
        Evaluation.concatenate([table, table], NAMES),
        Evaluation.load(tmp_path / "evaluation.npz"),
    ):
        assert_same(same, table)
    full, _ = make_table()
    assert_same(Evaluation.concatenate([table, full, table], NAMES), full)
    assert expect(table, full) is expect(full, table) is None


def test_select_and_of_part_keep_the_columns_together():
    table, _ = make_table(parts=("new", "known", "test"))
    known = table.of_part("known")
    assert len(known) == 20
    for i, name in enumerate(known.id.tolist()):
        row = table.id.tolist().index(name)
        for column in COLUMNS:
            ours, theirs = getattr(known, column), getattr(table, column)
            assert np.array_equal(ours[i], theirs[row])
    assert_same(table.select(table.part == "known"), known)
    assert_same(table.of_part(*PARTS), table)
    assert len(table.of_part()) == len(table.of_part("random")) == 0
    indices = np.array([3, 1])
    assert table.select(indices).id.tolist() == ["0/3", "0/1"]


def test_gather_alone_is_the_table_itself():
    table, _ = make_table()
    assert_same(table.gather(), table)


def test_gather_keeps_each_utterance_once_by_rank(monkeypatch):
    first, second = make_table(seed=2)[0], make_table(seed=1)[0]
    nothing = Evaluation.concatenate([], NAMES)  # a rank without a batch
    again = second.select(np.array([5, 2]))

    def gathered(own):
        return [nothing, first, own, again]

    monkeypatch.setattr(scores, "gather", gathered)
    both = Evaluation.concatenate([first, second], NAMES)
    assert_same(second.gather(), both)


def test_of_batch_keeps_half_precision_and_needs_no_gradient():
    log_posteriors = torch.zeros(2, 5, requires_grad=True).log_softmax(1)
    embeddings = torch.full((2, 3), 1 / 3, requires_grad=True)
    targets = torch.tensor([0, -1])
    table = Evaluation.of_batch(
        ["a", "b"], log_posteriors, targets, embeddings, [1, 2], ["test"] * 2,
        list(NAMES),
    )  # fmt: skip
    assert table.embedding.dtype == np.float16
    assert table.speakers == NAMES
    assert table.loss[0] == pytest.approx(np.log(5))


def test_columns_must_fit_each_other():
    columns = vars(small(("new", 0, 1)))
    with pytest.raises(ValueError, match="differ in length"):
        Evaluation(**columns | {"frames": [1, 2]})
    with pytest.raises(ValueError, match="class 1 has no name"):
        Evaluation(**columns | {"speakers": ("a",)})


def test_only_new_sessions_tell_what_to_expect():
    validated, _ = make_table(parts=("new", "known"))
    tested, _ = make_table(seed=1, parts=("test",))
    estimate = expect(validated, tested)
    new = validated.select(np.arange(60) % 2 == 0)
    right = new.guess == new.target
    assert estimate == expected_accuracy(
        new.confidence, right, new.target, tested.confidence, tested.guess
    )
    unlabelled = Evaluation(**vars(tested) | {"target": np.full(60, -1)})
    assert estimate == expect(validated, unlabelled)
    for optimistic in ("known", "random"):
        validated, _ = make_table(parts=(optimistic,))
        assert expect(validated, tested) is None


def test_estimate_follows_the_confidence():
    validated = small(("new", 0, 0), ("new", 1, 0))
    validated.confidence = np.array([0.9, 0.5])
    tested = small(("test", -1, 1), ("test", -1, 0))
    tested.confidence = np.array([0.8, 0.4])
    estimate = expect(validated, tested)
    assert estimate.accuracy == pytest.approx(0.4)  # 0.5 - (0.7 - 0.6)


def test_results_nest_the_known_sessions():
    table = small(("new", 0, 0), ("known", 0, 1), ("known", 1, 1))
    nested = by_part(table.summary())
    assert json.loads(json.dumps(nested)) == {
        "valid": {"accuracy": 1.0, "loss": 0.0},
        "known": {"accuracy": 0.5, "loss": 1.5},
        "gap": -1.0,
    }
    assert list(by_part(small(("random", 0, 0)).summary())) == ["valid"]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table, _ = make_table(parts=("new", "known", "test"))
    names = ("Zoë", "李", "<b>", "d", "e")
    table = Evaluation(**vars(table) | {"speakers": names})
    table.save(tmp_path / "evaluation.npz")
    read = Evaluation.load(tmp_path / "evaluation.npz")
    assert_same(read, table)
    assert read.summary() == table.summary()


def test_damaged_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "evaluation.npz"
    table, _ = make_table(count=2)
    table.save(path)
    whole = path.read_bytes()
    columns = {name: getattr(table, name) for name in COLUMNS}
    speakers = np.array(NAMES)
    for arrays in (
        columns,  # of a version that wrote no names
        columns | {"speakers": speakers[:1]},
        columns | {"speakers": speakers, "frames": np.ones(3)},
        columns | {"speakers": speakers, "loss": np.array(["x", "y"])},
        columns | {"speakers": speakers.astype(object)},  # would be unpickled
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=r"evaluation\.npz: could not be"):
            Evaluation.load(path)
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"evaluation\.npz: could not be"):
            Evaluation.load(path)
    path.unlink()
    with pytest.raises(UserError, match=r"evaluation\.npz: could not be"):
        Evaluation.load(path)


def test_any_flipped_bit_is_an_error_or_a_table(tmp_path):
    path = tmp_path / "evaluation.npz"
    small(("new", 0, 1)).save(path)
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        content = bytearray(whole)
        content[i] ^= 1 << i % 8
        path.write_bytes(content)
        try:
            assert len(Evaluation.load(path)) < 9
        except UserError as error:
            assert "evaluation.npz: could not be read" in str(error)
