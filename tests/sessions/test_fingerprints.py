"""A fingerprint is what its docstring says, and is made once."""

import os

import numpy as np
import pytest
import torch

from spkid.data import Corpus, FeatureFiles, Utterance, open_features
from spkid.sessions import fingerprint, fingerprints, pack_fingerprints


def test_a_fingerprint_by_hand():
    frames = np.zeros((20, 2))
    frames[7:9] = -3.0
    frames[:, 1] += np.arange(20)
    found = fingerprint(frames, frames.mean(axis=0), frames.std(axis=0))
    # The quietest two of twenty frames are 0 and 1, whose sum is least.
    np.testing.assert_allclose(found[4:6], [0.0, 0.5])
    np.testing.assert_allclose(found[6], 6 / 19)
    np.testing.assert_allclose(fingerprint(frames[:1], *frames[:2])[6:], 0)


@pytest.fixture
def pack(tmp_path):
    generator = np.random.default_rng(0)
    names = "a.pt", "b.pt"
    for name in names:
        mel = torch.from_numpy(generator.normal(size=(30, 4)))
        torch.save(mel.float(), tmp_path / name)
    utterances = tuple(Utterance(name, 30) for name in names)
    corpus = Corpus(tmp_path, 4, test=utterances)
    pack, _ = open_features(
        corpus, tmp_path / "packs", pack_dtype="float32", progress=False
    )
    return pack


def test_fingerprints_are_kept_beside_the_pack(pack, tmp_path, monkeypatch):
    found = pack_fingerprints(pack, ["b.pt"], progress=False)
    frames = torch.load(tmp_path / "b.pt").numpy()
    expected = fingerprint(frames, frames.mean(axis=0), frames.std(axis=0))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    utterances = [Utterance(name, 30) for name in ("a.pt", "b.pt")]
    files = FeatureFiles(tmp_path, utterances, n_mels=4)
    direct = pack_fingerprints(files, ["b.pt"], progress=False)
    np.testing.assert_allclose(direct, found, atol=1e-5)
    monkeypatch.setattr(fingerprints, "fingerprint", None)
    again = pack_fingerprints(pack, ["a.pt", "b.pt"], progress=False)
    np.testing.assert_array_equal(again[1:], found)


def saved(content):
    return lambda path: np.save(path, content, allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:99]),
        lambda path: path.write_bytes(path.read_bytes()[:-40] + bytes(40)),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        saved(np.ones((2, 3), np.float32)),
        saved(np.ones((2, 16), np.float32)),
        saved(np.float32(1)),
        saved(np.array([{}, {}])),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: os.truncate(path, 2**40),
    ],
)
def test_damaged_fingerprints_are_made_again(pack, damage):
    names = ["b.pt", "a.pt"]
    found = pack_fingerprints(pack, names, progress=False)
    damage(pack.file.with_name("fingerprints.npy"))
    again = pack_fingerprints(pack, names, progress=False)
    np.testing.assert_array_equal(again, found)


def test_a_pack_that_can_only_be_read_is_no_failure(pack):
    cache = pack.file.with_name("fingerprints.npy")
    cache.mkdir()  # can't be replaced by a file
    assert len(pack_fingerprints(pack, ["a.pt"], progress=False)) == 1


def test_fingerprints_of_other_features_are_made_again(pack, tmp_path):
    """A rebuilt pack lies in the same folder, with files of the same size."""
    old = pack_fingerprints(pack, ["a.pt"], progress=False)
    content = pack.file.with_name("fingerprints.npy").read_bytes()
    torch.save(torch.ones(30, 4), tmp_path / "a.pt")
    utterances = tuple(Utterance(name, 30) for name in ("a.pt", "b.pt"))
    corpus = Corpus(tmp_path, 4, test=utterances)
    new, _ = open_features(
        corpus, tmp_path / "packs", pack_dtype="float32", progress=False
    )
    assert new.file == pack.file
    new.file.with_name("fingerprints.npy").write_bytes(content)
    for _ in range(2):
        found = pack_fingerprints(new, ["a.pt"], progress=False)
        np.testing.assert_array_equal(found[0, :4], 1)
        assert (found != old).any()
