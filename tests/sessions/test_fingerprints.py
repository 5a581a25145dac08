"""A fingerprint is what its docstring says, and is made once."""

import numpy as np
import torch

from spkid.data import Corpus, Utterance, open_features
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


def test_fingerprints_are_kept_beside_the_pack(tmp_path, monkeypatch):
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
    found = pack_fingerprints(pack, ["b.pt"], progress=False)
    frames = torch.load(tmp_path / "b.pt").numpy()
    expected = fingerprint(frames, frames.mean(axis=0), frames.std(axis=0))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    cache = pack.file.with_name("fingerprints.npy")
    cache.write_bytes(cache.read_bytes()[:99])  # damaged: made again
    pack_fingerprints(pack, ["a.pt"], progress=False)
    files, _ = open_features(corpus, pack=False)
    direct = pack_fingerprints(files, ["b.pt"], progress=False)
    np.testing.assert_allclose(direct, found, atol=1e-5)
    monkeypatch.setattr(fingerprints, "fingerprint", None)
    again = pack_fingerprints(pack, ["a.pt", "b.pt"], progress=False)
    np.testing.assert_array_equal(again[1:], found)
