"""The back-end: scores, thresholds, and speakers that come and go."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from spkid.backend import Backend, Calibration, Tail, unit
from spkid.backend.fit import FOLDS, fit_backend, fit_map
from spkid.backend.scoring import NEAREST, background_level
from spkid.errors import UserError
from spkid.inference.identifier import SpeakerIdentifier

SIZE = 12


def voices(n_speakers=30, each=8, seed=0, spread=0.35):
    """Embeddings whose recordings vary most in a few directions."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(n_speakers), each)
    sessions = np.tile(np.arange(each) // 2, n_speakers)
    centres = rng.normal(size=(n_speakers, SIZE))
    channel = rng.normal(size=(n_speakers, each, 2)) @ rng.normal(
        size=(2, SIZE)
    )
    found = centres[targets] + spread * channel.reshape(-1, SIZE)
    found += 0.2 * rng.normal(size=found.shape)
    return found.astype(np.float32), targets, sessions


def names(n):
    return [f"speaker {i}" for i in range(n)]


@pytest.fixture(scope="module")
def fitted():
    found, targets, _ = voices()
    return fit_map(found, targets, names(30)), found, targets


def test_cosines_rank_as_linear_discriminant_analysis_does(fitted):
    """Its discriminant is the same product, where lengths are equal."""
    _, found, targets = fitted
    vectors = unit(found)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(
        vectors, targets
    )
    means = np.stack([vectors[targets == i].mean(0) for i in range(30)])
    residuals = vectors - means[targets]
    # scikit-learn shrinks the covariance of scaled features; ours doesn't.
    covariance = residuals.T @ residuals / len(vectors)
    covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / SIZE * np.eye(
        SIZE
    )
    centre = means.mean(0)
    inner = (vectors - centre) @ np.linalg.solve(covariance, (means - centre).T)
    left = np.einsum(
        "ij,ji->i",
        vectors - centre,
        np.linalg.solve(covariance, (vectors - centre).T),
    )
    right = np.diag(
        (means - centre) @ np.linalg.solve(covariance, (means - centre).T)
    )
    oracle = inner / np.sqrt(left[:, None] * right)
    backend = fitted[0]
    np.testing.assert_allclose(backend.cosines(found), oracle, atol=2e-4)
    agree = backend.cosines(found).argmax(1) == lda.predict(vectors)
    assert agree.mean() > 0.95


def test_the_projection_whitens(fitted):
    backend, found, targets = fitted
    projected = (unit(found) - backend.centre) @ backend.projection
    means = np.stack([projected[targets == i].mean(0) for i in range(30)])
    within = projected - means[targets]
    spread = np.linalg.eigvalsh(within.T @ within / len(within))
    raw = unit(found)
    means = np.stack([raw[targets == i].mean(0) for i in range(30)])
    within = raw - means[targets]
    before = np.linalg.eigvalsh(within.T @ within / len(within))
    assert spread.max() / spread.min() < 0.2 * before.max() / before.min()


def test_the_background_level_by_loops():
    rng = np.random.default_rng(1)
    cosines = rng.uniform(-1, 1, (5, 40))
    for row, level in zip(cosines, background_level(cosines), strict=True):
        nearest = sorted(row, reverse=True)[1 : 1 + NEAREST]
        assert level == pytest.approx(np.mean(nearest))
    assert background_level(cosines[:, :1]).tolist() == [0.0] * 5
    assert background_level(cosines[:, :0]).tolist() == [0.0] * 5


def test_a_tail_is_that_of_an_exponential_law():
    rng = np.random.default_rng(2)
    scores = 3 + 2 * rng.exponential(size=200_000)
    tail = Tail.of(scores)
    for rate in (0.2, 0.05, 0.01, 0.001):
        assert tail.reached_by(rate) == pytest.approx(
            3 - 2 * np.log(rate), rel=0.02
        )
    assert tail.reached_by(0.9) == tail.reached_by(0.3) == tail.start
    assert Tail.of(scores[:0]).reached_by(0.01) > 2  # of cosines' differences
    assert Tail.of(scores[:1]).reached_by(0.01) == scores[0]


def test_pair_scores_are_symmetric_and_those_of_single_pairs(fitted):
    backend, found, _ = fitted
    scores = backend.pair_scores(found[:6], found[3:9])
    np.testing.assert_allclose(
        scores, backend.pair_scores(found[3:9], found[:6]).T, atol=1e-4
    )
    for a, b in itertools.product(range(6), range(6)):
        one = backend.pair_scores(found[[a]], found[[3 + b]])[0, 0]
        assert scores[a, b] == pytest.approx(one, abs=1e-3)


def test_thresholds_follow_from_the_tails(fitted):
    law = Calibration(
        *(30.0, 30, Tail(0.2, 0.05, 0.3), Tail(-0.4, 0.1, 0.3)),
        *(Tail(0.0, 0.02, 0.05), 100),
    )
    backend = replace(fitted[0], calibration=law)
    assert backend.threshold(0.01) == pytest.approx(0.2 + 0.05 * np.log(30))
    assert backend.rejection_threshold(0.05) == pytest.approx(
        0.4 - 0.1 * np.log(6)
    )
    assert backend.pair_threshold(0.01) == pytest.approx(0.02 * np.log(5))
    fewer = backend.forget(*names(30)[:20])
    assert fewer.threshold(0.01) < backend.threshold(0.01)
    more = backend
    for i in range(30):
        more = more.enroll(f"new {i}", np.eye(SIZE)[[i % SIZE]])
    # Twice the speakers, each with half of the rate: 1 - (1 - p) ^ 2 = 0.01.
    assert more.threshold(0.01) == pytest.approx(
        0.2 + 0.05 * np.log(0.3 / (1 - 0.99**0.5))
    )


def test_enrolling_adds_up(fitted):
    backend, found, targets = fitted
    own = found[targets == 3]
    once = backend.enroll("new", own)
    in_two = backend.enroll("new", own[:3]).enroll("new", own[3:])
    np.testing.assert_allclose(once.means, in_two.means, atol=1e-6)
    np.testing.assert_allclose(
        once.prototypes[-1], once.prototypes[3], atol=1e-3
    )
    assert once.speakers == (*backend.speakers, "new")
    assert once.counts[-1] == len(own)
    assert backend.speakers == tuple(names(30))  # is left as it was


def test_forgetting_leaves_what_scores_are_worth(fitted, tmp_path):
    """Without it, the background's level sinks, and strangers pass."""
    backend = fitted[0].forget(*names(30)[:27])
    backend.save(tmp_path / "b.npz")
    backend = Backend.load(tmp_path / "b.npz")
    assert backend.speakers == tuple(names(30)[27:])
    np.testing.assert_array_equal(
        backend.level(fitted[1]), fitted[0].level(fitted[1])
    )
    np.testing.assert_array_equal(
        backend.scores(fitted[1]), fitted[0].scores(fitted[1])[:, 27:]
    )
    back = backend.enroll("speaker 3", fitted[1][fitted[2] == 3])
    np.testing.assert_allclose(
        back.prototypes[-1], fitted[0].prototypes[3], atol=1e-3
    )


def test_a_new_gallery_may_have_one_speaker(fitted):
    backend = fitted[0].forget(*names(30)).enroll("new", fitted[1][:4])
    assert backend.speakers == ("new",)
    assert backend.log_posteriors(fitted[1]).tolist() == [[0.0]] * 240


def test_saved_and_loaded_answers_are_the_same_bits(fitted, tmp_path):
    found, targets, sessions = voices()
    parts = np.where(sessions == 3, "new", "train")
    backend = fit_backend(
        found, targets, sessions, parts, names(30)
    ).backend.enroll("Zoë", found[:2])
    backend.save(tmp_path / "b.npz")
    again = Backend.load(tmp_path / "b.npz")
    assert again.calibration == backend.calibration
    assert again.speakers == backend.speakers
    for ask in (Backend.log_posteriors, Backend.scores):
        np.testing.assert_array_equal(ask(again, found), ask(backend, found))


def test_a_gallery_without_speakers_is_saved_and_loaded(fitted, tmp_path):
    fitted[0].forget(*names(30)).save(tmp_path / "b.npz")
    again = Backend.load(tmp_path / "b.npz")
    assert again.speakers == ()
    assert again.enroll("new", fitted[1][:4]).speakers == ("new",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("scale", value) for value in (-1.0, 0.0, 1e308, np.nan, 1j)),
        *(("gallery", value) for value in (0, -5)),
        *(("stranger", (0.1, 0.1, share)) for share in (0.0, -0.3, 2.0)),
        *(("pair", (start, 0.1, 0.05)) for start in (np.nan, np.inf)),
        ("missed", (0.1, -0.1, 0.3)),
        ("counts", np.full(30, -1)),
        ("speakers", np.array(["same"] * 30)),
        ("speakers", np.array(["", *names(30)[1:]])),
        ("means", np.full((30, SIZE), 1e300)),
    ],
)
def test_values_that_no_fit_gives_are_refused(fitted, tmp_path, key, value):
    path = tmp_path / "b.npz"
    fitted[0].save(path)
    with np.load(path) as arrays:
        content = dict(arrays) | {key: np.asarray(value)}
    np.savez(path, **content)
    with pytest.raises(UserError, match=r"b\.npz: can't be loaded"):
        Backend.load(path)


@pytest.mark.parametrize("key", ["means", "projection", "speakers", "pair"])
@pytest.mark.parametrize("change", ["missing", "shape", "nan", "objects"])
def test_a_damaged_file_is_one_sentence(fitted, tmp_path, key, change):
    path = tmp_path / "b.npz"
    fitted[0].save(path)
    with np.load(path) as arrays:
        content = dict(arrays)
    if change == "missing":
        del content[key]
    elif change == "shape":
        content[key] = content[key][None]
    elif change == "nan":
        content[key] = np.full(content[key].shape, np.nan)
    else:
        content[key] = np.array([{}], object)
    np.savez(path, **content)
    with pytest.raises(UserError, match=r"b\.npz: can't be loaded"):
        Backend.load(path)


def test_the_torch_module_gives_the_same_log_posteriors(fitted):
    from spkid.features import UtteranceNorm
    from spkid.models import AMSoftmax, MeanPooling, SpeakerEmbedding
    from spkid.models import TransformerEncoder as Encoder

    backend, found, _ = fitted
    model = SpeakerEmbedding(
        Encoder(40, d_model=SIZE, n_heads=2), MeanPooling(SIZE)
    )
    identifier = SpeakerIdentifier(
        UtteranceNorm(), model, AMSoftmax(SIZE, 2), ["a", "b"]
    )
    identifier.set_backend(backend)
    torch.testing.assert_close(
        identifier.posteriors(torch.from_numpy(found)).numpy(),
        backend.log_posteriors(found),
        atol=1e-4,
        rtol=0,
    )


def test_held_out_posteriors_are_honest():
    """Noise can't be recognised, whoever is enrolled with it."""
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(10), 20)
    noise = rng.normal(size=(200, SIZE)).astype(np.float32)
    sessions = np.arange(200)
    parts = ["new"] * 200
    fit = fit_backend(noise, targets, sessions, parts, names(10))
    right = (fit.log_posteriors.argmax(1) == targets).mean()
    assert right < 0.25
    everything = (fit.backend.cosines(noise).argmax(1) == targets).mean()
    assert everything > right + 0.1


def test_each_held_out_utterance_is_scored_without_its_session():
    found, targets, sessions = voices(6, 8)
    parts = np.where(sessions >= 2, "new", "train")
    fit = fit_backend(found, targets, sessions, parts, names(6))
    held = np.flatnonzero(parts == "new")
    groups = [
        (f"{s} {t}") for s, t in zip(sessions[held], targets[held], strict=True)
    ]
    fold = np.unique(groups, return_inverse=True)[1] % FOLDS
    scale = fit.backend.calibration.scale
    for i in (0, 5, 11):
        rest = np.setdiff1d(np.arange(len(targets)), held[fold == fold[i]])
        own = fit_map(found[rest], targets[rest], names(6))
        logits = scale * own.cosines(found[[held[i]]])[0]
        expected = logits - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(fit.log_posteriors[i], expected, atol=1e-3)


def test_strangers_pass_at_the_promised_rate():
    """Speakers whom nobody has enrolled, of the same kind of voices."""
    found, targets, sessions = voices(260, 8, seed=3, spread=0.5)
    known = targets < 200
    parts = np.where(sessions == 3, "new", "train")
    fit = fit_backend(
        found[known],
        targets[known],
        sessions[known],
        parts[known],
        names(200),
    )
    for rate in (0.01, 0.05):
        passed = fit.backend.scores(found[~known]).max(1)
        share = (passed >= fit.backend.threshold(rate)).mean()
        assert rate / 2 < share < rate * 2


@pytest.mark.parametrize("n_speakers", [1, 2, 3])
def test_what_was_not_measured_lets_no_stranger_pass(n_speakers):
    found, targets, sessions = voices(n_speakers, 8)
    parts = np.where(sessions == 3, "new", "train")
    backend = fit_backend(
        found, targets, sessions, parts, names(n_speakers)
    ).backend
    assert not backend.calibration.is_measured
    strangers = voices(20, 8, seed=9)[0]
    assert (backend.scores(strangers) < backend.threshold(0.01)).all()
    assert (
        backend.pair_scores(strangers[::8], strangers[::8])[
            ~np.eye(20, dtype=bool)
        ]
        < backend.pair_threshold(0.01)
    ).all()


@pytest.mark.parametrize("part", ["train", "new"])
def test_strangers_are_measured_where_each_utterance_is_a_session(part):
    """As without sessions: a fold of sessions has nearly all speakers."""
    found, targets, _ = voices(20, 8, seed=3, spread=0.5)
    fit = fit_backend(found, targets, np.arange(160), [part] * 160, names(20))
    assert fit.backend.calibration.gallery == 19
    others = voices(20, 8, seed=4, spread=0.5)[0]
    passed = fit.backend.scores(others).max(1) >= fit.backend.threshold(0.05)
    assert passed.mean() < 0.15


def test_embeddings_that_are_not_finite_are_one_sentence():
    found, targets, sessions = voices(6, 8)
    found[3] = np.nan
    with pytest.raises(UserError, match="aren't finite"):
        fit_backend(found, targets, sessions, ["train"] * 48, names(6))


@pytest.mark.parametrize("rate", [0.0, 0.31, 1.0, -1.0, np.nan])
def test_rates_that_were_not_measured_are_refused(fitted, rate):
    with pytest.raises(UserError, match="fpir="):
        fitted[0].threshold(rate)
    with pytest.raises(UserError, match="false_alarm="):
        fitted[0].pair_threshold(rate)


@pytest.mark.parametrize(
    "parts", [["train"] * 48, ["known"] * 48, ["train"] * 47 + ["new"]]
)
def test_few_or_no_held_out_utterances(parts):
    found, targets, sessions = voices(6, 8)
    fit = fit_backend(found, targets, sessions, parts, names(6))
    held_out = sum(part != "train" for part in parts)
    assert fit.log_posteriors.shape == (held_out, 6)
    assert np.isfinite(fit.backend.threshold(0.01))
    assert fit.backend.calibration.n == held_out


def test_a_model_without_a_difference_is_no_crash():
    same = np.ones((40, SIZE), np.float32)
    fit = fit_backend(
        *(same, np.arange(40) % 4, np.arange(40), ["train", "new"] * 20),
        names(4),
    )
    assert np.isfinite(fit.log_posteriors).all()


def test_a_speaker_with_no_utterance_is_never_the_answer(fitted):
    found, targets, _ = voices(6, 8)
    backend = fit_map(found, targets, names(7))
    assert backend.cosines(found)[:, 6].tolist() == [0.0] * 48
