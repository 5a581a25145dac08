"""The pack gives what the files held."""

import pickle

import numpy as np
import pytest
import torch
from corpus import features_of

from spkid.data import PackedFeatures
from spkid.errors import UserError


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("float16", 8e-3)]
)
def test_it_holds_what_the_files_held(files, tmp_path, dtype, error):
    pack, problems = features_of(files, tmp_path, dtype)
    assert not problems
    for name, mel in files[1].items():
        row = pack.row[name]
        assert np.abs(pack.frames(row) - mel.numpy()).max() <= error
        part = pack.frames(row, start=2, count=2)
        assert np.abs(part - mel[2:4].numpy()).max() <= error
        assert len(pack.frames(row, start=3, count=999)) == len(mel) - 3
        assert np.allclose(pack.moments[row, 0], mel.mean(0), atol=1e-5)
        deviation = mel.std(0, correction=0)
        assert np.allclose(pack.moments[row, 1], deviation, atol=1e-5)


def test_a_part_at_the_packs_end_is_padded(files, tmp_path):
    """There is no frame behind it, and before it are its neighbour's."""
    pack, _ = features_of(files, tmp_path, dtype="float32")
    mels = list(files[1].values())
    features, _ = pack.batch([6, 5], [9, 0], [2, 10])
    assert torch.equal(features[0, :2], mels[6][9:])
    assert (features[0, 2:] == 0).all()
    assert torch.equal(features[1], mels[5])


def test_a_pack_that_is_cut_off_is_refused(files, tmp_path):
    pack, _ = features_of(files, tmp_path)
    pack.file.write_bytes(pack.file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"bytes, not .* to have it rebuilt"):
        PackedFeatures(pack.file.parent)
    with pytest.raises(UserError, match="bytes, not"):
        features_of(files, tmp_path)
    (pack.file.parent / "index.npz").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"not a readable pack .* rebuilt"):
        features_of(files, tmp_path)


def test_a_spawned_worker_maps_the_file_itself(files, tmp_path):
    pack, _ = features_of(files, tmp_path)
    frozen = pickle.dumps(pack)
    assert len(frozen) < 20_000
    assert np.array_equal(pickle.loads(frozen).frames(3), pack.frames(3))
    moved = pickle.loads(pickle.dumps(pack.to("cpu")))
    assert pack.on_device and not moved.on_device


def test_a_pack_too_large_for_a_device_is_refused(files, tmp_path):
    pack, _ = features_of(files, tmp_path)

    class Full:
        def to(self, *args, **options):
            raise torch.OutOfMemoryError("CUDA out of memory")

    pack.tensor = Full()
    with pytest.raises(UserError, match="bytes don't fit into the memory of"):
        pack.to("cuda")
    assert not pack.on_device
