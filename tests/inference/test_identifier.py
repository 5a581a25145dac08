"""The trained system as one object: the same answer behind every door."""

import os
import random
import re
import sys
import zipfile
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


@pytest.mark.parametrize("place", ["mean_var_norm", "kind"])
def test_a_strangers_settings_run_nothing(tmp_path, place):
    """tests/test_trust.py has the attacks."""
    output = make_run(tmp_path)[1]
    path, canary = output / "hyperparams.yaml", tmp_path / "ran"
    text, n = re.subn(
        rf"^( *){place}: .*(\n +kind: .*)?",
        rf"\1{place}: (!!python/object/apply:os.mkdir [{canary}])",
        path.read_text(),
        count=1,
        flags=re.M,
    )
    assert n == 1
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        SpeakerIdentifier.from_run(output)
    assert str(path) in str(caught.value)
    assert not canary.exists()


def test_a_pooling_of_ones_own_needs_trust(tmp_path, monkeypatch):
    (tmp_path / "my_pooling.py").write_text(
        "from spkid.models import MeanPooling\n"
        "class MyPooling(MeanPooling): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    output = make_run(tmp_path)[1]
    path, own = output / "hyperparams.yaml", "my_pooling.MyPooling"
    text, n = re.subn(
        r"spkid\.models\.AttentiveStatisticsPooling", own, path.read_text()
    )
    assert n == 1
    path.write_text(text)
    settings = Settings.of_run(output)
    made = settings.build_modules(("embedding_model",), trust=True)
    sys.modules.pop("my_pooling")
    weights = made["embedding_model"].state_dict()
    torch.save(weights, output / "model" / "embedding_model.ckpt")
    with pytest.raises(UserError, match=rf"new:{own} isn't .* --trust"):
        SpeakerIdentifier.from_run(output)
    assert "my_pooling" not in sys.modules
    loaded = SpeakerIdentifier.from_run(output, trust=True)
    assert type(loaded.embedding_model.pooling).__name__ == "MyPooling"
    sys.modules.pop("my_pooling")


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


FILES = (
    *("hyperparams.yaml", "speakers.txt"),
    *("model/embedding_model.ckpt", "model/classifier.ckpt"),
)


def deflate(path):
    """The same zip, compressed, with a member that grows a thousandfold."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def make_link_to_zeros(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def make_giant(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(b"\x80\xff\x00{[\n" * 99),
    "giant": make_giant,
    "folder": make_folder,
}
if hasattr(os, "mkfifo"):
    DAMAGES["pipe"] = make_pipe
if Path("/dev/zero").exists():
    DAMAGES["zeros"] = make_link_to_zeros


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_sentence(tmp_path, name, damage):
    output = make_run(tmp_path)[1]
    DAMAGES[damage](output / name)
    with pytest.raises(UserError) as caught:
        SpeakerIdentifier.from_run(output)
    message = str(caught.value)
    assert Path(name).name in message
    assert "\n" not in message
    assert "; " in message, "it names a cure"
    assert len(message) < 600


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("ann\nbob\nid 3", "has 3 names, but the classifier knows 4 speakers"),
        ("ann\nann\nbob\nid 3", "a name is empty or appears twice"),
        ("ann\nbob\nid 3\n", "a name is empty or appears twice"),
    ],
)
def test_names_that_are_not_the_classifiers_are_refused(tmp_path, names, words):
    output = make_run(tmp_path)[1]
    (output / "speakers.txt").write_text(names)
    with pytest.raises(UserError, match=rf"speakers\.txt: .*{words}"):
        SpeakerIdentifier.from_run(output)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, 2], "doesn't hold tensors by names"),
        ({"weight": 1}, "doesn't hold tensors by names"),
        ({"weight": torch.zeros(4, 16).to_sparse()}, "doesn't hold tensors"),
        ({"weight": torch.zeros(5, 16)}, "size mismatch"),
        ({"other": torch.zeros(4, 16)}, r"Missing key"),
    ],
)
def test_weights_of_another_kind_are_refused(tmp_path, weights, words):
    output = make_run(tmp_path)[1]
    torch.save(weights, output / "model" / "classifier.ckpt")
    with pytest.raises(
        UserError, match=rf"classifier\.ckpt: can't be loaded \(.*{words}"
    ) as caught:
        SpeakerIdentifier.from_run(output)
    assert "\n" not in str(caught.value)


TAKERS = {
    "pad": "!new:torch.nn.ZeroPad1d [300000000]",
    "pool": "!new:torch.nn.AdaptiveAvgPool1d [300000000]",
    "norm": "!new:torch.nn.LocalResponseNorm [300000000]",
    "chain": "!new:torch.nn.Sequential ["
    + "!new:torch.nn.ZeroPad1d [50000], " * 300
    + "!new:torch.nn.ReLU ]",
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_model_that_takes_memory_is_not_run(tmp_path, taker):
    output = make_run(tmp_path)[1]
    path = output / "hyperparams.yaml"
    text, n = re.subn(
        r"^classifier: (&\w+ )?.*\n(?:\n? .*\n)*",
        rf"classifier: \g<1>{TAKERS[taker]}\n",
        path.read_text(),
        flags=re.M,
    )
    assert n == 1
    path.write_text(text)
    torch.save({}, output / "model" / "classifier.ckpt")
    words = "its model doesn't run .*gigabytes"
    with pytest.raises(UserError, match=words):
        SpeakerIdentifier.from_run(output)


def test_compressed_weights_are_refused(tmp_path):
    """Three megabytes could hold three gigabytes."""
    output = make_run(tmp_path)[1]
    deflate(output / "model" / "classifier.ckpt")
    with pytest.raises(UserError, match=r"classifier\.ckpt: .*compressed"):
        SpeakerIdentifier.from_run(output)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("n_layers: 1\n", "n_layers: 1000000000\n", "larger model"),
        ("d_ff: 32\n", "d_ff: 1000000000\n", "larger model"),
        ("n_mels: 40\n", "n_mels: 41\n", "its model doesn't run"),
        ("n_mels: 40\n", "n_mels: 1000000000000\n", "n_mels"),
        ("n_mels: 40\n", "n_mels: [40]\n", "n_mels"),
        ("evaluation: whole\n", "evaluation: 7\n", "evaluation=7 must be"),
        ("window_hop: 200\n", "", "'window_hop' is missing"),
        ("window_hop: 200\n", "window_hop: 0\n", "window_hop=0 must lie"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(tmp_path, old, new, words):
    output = make_run(tmp_path)[1]
    path = output / "hyperparams.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=words) as caught:
        SpeakerIdentifier.from_run(output)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
