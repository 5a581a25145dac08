"""The trained system as one object: the same answer behind every door."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import make_corpus

from ml2022hw4_prepare import prepare
from spkid.data import manifest
from spkid.errors import UserError
from spkid.hparams import Settings
from spkid.inference import SpeakerIdentifier

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "d_model": 24,
    "n_layers": 1,
    "n_heads": 2,
    "d_ff": 32,
    "embedding_size": 16,
    "n_speakers": 4,
}
OTHERS = {"n_speakers": 4}
SYSTEMS = [path.stem for path in sorted((ROOT / "hparams").glob("*.yaml"))]


def make_run(folder, system="conformer", **overrides):
    """What a finished run leaves of a system that has learnt nothing."""
    sizes = SIZES if system == "conformer" else OTHERS
    overrides = {**sizes, "output_folder": str(folder / "run"), **overrides}
    settings = Settings(ROOT / "hparams" / f"{system}.yaml", overrides)
    names = ("mean_var_norm", "embedding_model", "classifier")
    torch.manual_seed(0)
    modules = settings.build_modules(names)
    # Batch statistics that aren't their initial values.
    for module in modules["embedding_model"].modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    speakers = ["zoë", "ann", "bob", "id 3"]
    made = SpeakerIdentifier.from_settings(settings.values | modules, speakers)
    output = folder / "run"
    output.mkdir()
    (output / "hyperparams.yaml").write_text(settings.text)
    made.save(output)
    return made.eval(), output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("identifier"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A corpus and its features."""
    folder = tmp_path_factory.mktemp("corpus")
    data = make_corpus(folder / "data", n_test=9)
    return data, *prepare(data, pack_folder=folder / "packs")


def batch(n=5, seed=0):
    """Padded log-mels, their lengths, and relative lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [37, 80, 21, 50, 64][:n]
    x = torch.zeros(n, max(lengths), 40)
    for row, length in enumerate(lengths):
        x[row, :length] = torch.randn(length, 40, generator=generator)
    return x, lengths, torch.tensor(lengths) / max(lengths)


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_was_saved_is_loaded(tmp_path, system):
    before, output = make_run(tmp_path, system)
    after = SpeakerIdentifier.from_run(output)
    assert not after.training
    assert after.speakers == before.speakers == ("zoë", "ann", "bob", "id 3")
    x, _, _ = batch(2)
    x = x[:, :21]
    with torch.no_grad():
        assert torch.equal(after(x), before(x))
        embeddings = after.embed(x)
        sums = after.classify(x).exp().sum(-1)
    assert embeddings.shape[:2] == (2, 1)
    assert sums.flatten().tolist() == pytest.approx([1.0] * 2, abs=1e-5)


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()


def seed_all():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def test_loading_and_scoring_draw_no_random_number(run, stored):
    _, corpus, features = stored
    seed_all()
    expected = draws()
    seed_all()
    identifier = SpeakerIdentifier.from_run(run[1])
    identifier.score(features, manifest(corpus.test))
    identifier.embed(batch()[0])
    assert draws() == expected


def test_loading_writes_nothing(tmp_path, monkeypatch):
    output = make_run(tmp_path)[1]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    SpeakerIdentifier.from_run(output)
    SpeakerIdentifier.from_run(str(output))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_loading_prints_nothing(run, capfd):
    SpeakerIdentifier.from_run(run[1])
    assert capfd.readouterr() == ("", "")


ATTACKS = {
    "apply": "!apply:os.mkdir [{}]",
    "new": "!new:subprocess.Popen\n    args: [mkdir, {}]",
    "name": "!name:os.mkdir\n    path: {}",
    "python": "!!python/object/apply:os.mkdir [{}]",
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["mean_var_norm", "kind"])
def test_a_strangers_settings_run_nothing(tmp_path, attack, place):
    output = make_run(tmp_path)[1]
    path, canary = output / "hyperparams.yaml", tmp_path / "ran"
    text, made = path.read_text(), ATTACKS[attack].format(canary)
    if place == "kind":
        made = made.replace("\n    ", "\n        ")
    text, n = re.subn(
        rf"^( *){place}: .*(\n +kind: .*)?",
        rf"\1{place}: {made}",
        text,
        count=1,
        flags=re.M,
    )
    assert n == 1
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        SpeakerIdentifier.from_run(output)
    assert str(path) in str(caught.value)
    assert not canary.exists()


def test_weights_are_not_unpickled(tmp_path):
    class Canary:
        def __reduce__(self):
            return (tmp_path / "ran").mkdir, ()

    output = make_run(tmp_path)[1]
    torch.save(Canary(), output / "model" / "classifier.ckpt")
    with pytest.raises(UserError, match=r"classifier\.ckpt: can't be loaded"):
        SpeakerIdentifier.from_run(output)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model/embedding_model.ckpt",
        "model/classifier.ckpt",
        "speakers.txt",
        "hyperparams.yaml",
    ],
)
def test_an_unfinished_run_is_refused(tmp_path, name):
    output = make_run(tmp_path)[1]
    (output / name).unlink()
    with pytest.raises(UserError, match="finished run") as caught:
        SpeakerIdentifier.from_run(output)
    assert str(output) in str(caught.value)
    assert Path(name).name in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    output = make_run(tmp_path)[1]
    path = output / "hyperparams.yaml"
    text = path.read_text()
    assert "input_size: 24" in text or "&id" in text
    (tmp_path / "b").mkdir()
    other = make_run(tmp_path / "b", d_model=32)[1]
    path.write_text((other / "hyperparams.yaml").read_text())
    with pytest.raises(UserError, match=r"embedding_model\.ckpt: can't be"):
        SpeakerIdentifier.from_run(output)


@pytest.mark.parametrize("pad", [0.0, 1e4, float("nan")])
def test_batches_are_as_one_by_one(run, pad):
    identifier = run[0]
    x, lengths, relative = batch()
    for row, length in enumerate(lengths):
        x[row, length:] = pad
    with torch.no_grad():
        together = identifier.embed(x, relative)
        classified = identifier.classify(x, relative)
        for row, length in enumerate(lengths):
            alone = x[row : row + 1, :length]
            torch.testing.assert_close(
                identifier.embed(alone)[0], together[row], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                identifier.classify(alone)[0],
                classified[row],
                atol=1e-4,
                rtol=1e-5,
            )


def test_lengths_are_relative(run):
    x, lengths, _ = batch()
    with pytest.raises(TypeError, match="fractions"):
        run[0].embed(x, torch.tensor(lengths))


def test_statistics_replace_the_utterances_own(run):
    x, _, _ = batch(2)
    x = x[:, :21]
    statistics = torch.stack([x.mean(1), x.std(1)], 1)
    with torch.no_grad():
        own = run[0].embed(x)
        torch.testing.assert_close(run[0].embed(x, None, statistics), own)
        other = run[0].embed(x, None, statistics + 1)
    assert not torch.allclose(own, other, atol=1e-3)


def test_scoring_a_store_is_classifying_its_files(run, stored):
    identifier = run[0]
    data, corpus, features = stored
    table = identifier.score(features, manifest(corpus.test))
    assert len(table) == 9
    assert set(table.part) == {"test"}
    speakers = identifier.speakers
    assert tuple(table.speakers) == speakers
    for utterance in corpus.test:
        mel = torch.load(data / utterance.path, weights_only=True)[None]
        with torch.no_grad():
            # The pack holds float16.
            log_posteriors = identifier.classify(mel)[0, 0]
        row = table.id.tolist().index(utterance.path)
        assert table.frames[row] == utterance.length
        confidence = log_posteriors.exp().max().item()
        assert table.confidence[row] == pytest.approx(confidence, abs=5e-3)
        if confidence > 0.5:
            assert table.guess[row] == log_posteriors.argmax()


def test_a_small_budget_of_frames_changes_nothing(run, stored):
    _, corpus, features = stored
    first = run[0].score(features, manifest(corpus.test))
    made = SpeakerIdentifier.from_run(run[1])
    made.embedder.max_frames = 60
    second = made.score(features, manifest(corpus.test))
    order = [second.id.tolist().index(name) for name in first.id]
    assert np.array_equal(first.guess, second.guess[order])
    assert np.allclose(first.loss, second.loss[order], atol=1e-4)


def test_parts_are_embedded_as_their_frames(run, stored):
    """Each is normalised by its whole utterance."""
    identifier = run[0]
    data, corpus, features = stored
    names = [corpus.labelled[i].path for i in (3, 0, 3, 7)]
    rows = [features.row[name] for name in names]
    starts, counts = [2, 0, 5, 1], [15, 10, 15, 12]
    found = identifier.embed_parts(features, rows, starts, counts)
    for i, name in enumerate(names):
        mel = torch.load(data / name, weights_only=True)
        statistics = torch.stack([mel.mean(0), mel.std(0)])[None]
        part = mel[starts[i] : starts[i] + counts[i]][None]
        with torch.no_grad():
            alone = identifier.embed(part, None, statistics)[0, 0]
        torch.testing.assert_close(found[i], alone, atol=1e-2, rtol=1e-2)


def test_unknown_speakers_have_no_loss(run, tmp_path):
    data = make_corpus(tmp_path / "data", labels=False, n_test=3)
    corpus, features = prepare(data, pack=False)
    table = run[0].score(features, manifest(corpus.test))
    assert table.target.tolist() == [-1] * 3
    assert table.accuracy() is None
