"""The pack gives what the files held, or is refused."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from corpus import features_of

from spkid.data import PackedFeatures, build
from spkid.data.pack import seal
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


def cut_off(pack):
    pack.file.write_bytes(pack.file.read_bytes()[:-2])


def half_zeroed(pack):
    content = pack.file.read_bytes()
    half = len(content) // 2
    pack.file.write_bytes(content[:half] + bytes(len(content) - half))


def one_bit(pack):
    content = bytearray(pack.file.read_bytes())
    content[1234] ^= 1
    pack.file.write_bytes(content)


def without_frames(pack):
    pack.file.unlink()


def rubbish(pack):
    (pack.file.parent / "index.npz").write_bytes(b"rubbish")


def index_with(sealed=False, **changes):
    """The index with other arrays; by someone who seals it, or not."""

    def change(pack):
        path = pack.file.with_name("index.npz")
        with np.load(path) as index:
            content = dict(index)
        for name, function in changes.items():
            content[name] = function(content[name])
        header = json.loads(str(content.pop("header")))
        if sealed:
            del header["seal"]
            header["seal"] = seal(header, content)
        np.savez(path, header=json.dumps(header), **content)

    return change


def rolled(array):
    return np.roll(array, 1)


DAMAGE = {
    "cut off": (cut_off, "bytes, not"),
    "half zeroed": (half_zeroed, "the frames of '4.pt' are damaged"),
    "one bit": (one_bit, "the frames of '2.pt' are damaged"),
    "no frames": (without_frames, "has 0 bytes, not"),
    "rubbish": (rubbish, "not a readable pack"),
    "offsets moved": (index_with(offsets=rolled), "not a readable pack"),
    "offsets moved, sealed": (
        index_with(sealed=True, offsets=lambda a: a[::-1].copy()),
        "not a readable pack",
    ),
    "offsets outside, sealed": (
        index_with(sealed=True, offsets=lambda a: a + 9),
        "not a readable pack",
    ),
    "offsets before it, sealed": (
        index_with(sealed=True, offsets=lambda a: a - 9),
        "not a readable pack",
    ),
    "other moments": (index_with(moments=np.negative), "not a readable pack"),
    "other names": (index_with(paths=rolled), "not a readable pack"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_pack_is_refused_or_rebuilt(files, tmp_path, caplog, what):
    pack, _ = features_of(files, tmp_path)
    damage, words = DAMAGE[what]
    damage(pack)
    with pytest.raises(UserError, match=f"{words}.*; delete .* rebuilt"):
        PackedFeatures(pack.file.parent)
    digest = pack.digest()
    pack, _ = features_of(files, tmp_path)
    assert [r.message.count("; it is rebuilt.") for r in caplog.records] == [1]
    assert pack.digest() == digest == PackedFeatures(pack.file.parent).digest()


@pytest.mark.parametrize("name", ["index.npz", "frames.bin"])
def test_a_damaged_pack_never_gives_other_features(files, tmp_path, name):
    """Sixty mutations of each of its files."""
    pack, _ = features_of(files, tmp_path)
    path, digest = pack.file.with_name(name), pack.digest()
    frames = pack.data.copy()
    content, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        changed = bytearray(content)
        place = draw.randrange(len(changed))
        end = place + draw.choice([1, 2, 9, 99])
        match draw.choice(["flip", "cut", "zero", "twice"]):
            case "flip":
                changed[place] ^= 1 << draw.randrange(8)
            case "cut":
                del changed[place:]
            case "zero":
                changed[place:end] = bytes(len(changed[place:end]))
            case "twice":
                changed[place:place] = changed[place:end]
        path.write_bytes(changed)
        try:
            found = PackedFeatures(path.parent)
        except UserError:
            refused += 1
            found, _ = features_of(files, tmp_path)
        assert found.digest() == digest and found.paths == pack.paths
        assert np.array_equal(found.data, frames)
        assert np.array_equal(found.offsets, pack.offsets)
    assert refused > 30


def test_only_the_first_process_reads_all_frames(files, tmp_path, monkeypatch):
    pack, _ = features_of(files, tmp_path)
    one_bit(pack)
    monkeypatch.setattr(build, "rank", lambda: 1)
    assert features_of(files, tmp_path)[0].digest() == pack.digest()
    with pytest.raises(UserError, match="damaged"):
        PackedFeatures(pack.file.parent)


def test_the_digest_is_that_of_the_features(files, tmp_path):
    """In their order; wherever and however often they are packed."""
    folder, mels = files
    first = features_of(files, tmp_path / "a")[0].digest()
    assert len(first) == 32
    assert features_of(files, tmp_path / "b")[0].digest() == first
    turned = folder, dict(reversed(mels.items()))
    assert features_of(turned, tmp_path / "a")[0].digest() != first
    assert features_of(files, tmp_path, "float32")[0].digest() != first
    torch.save(mels["3.pt"] + 0.01, folder / "3.pt")
    assert features_of(files, tmp_path / "a")[0].digest() != first


def test_a_spawned_worker_refuses_another_pack(files, tmp_path):
    """One that was built in the place of the one that the run has opened."""
    pack, _ = features_of(files, tmp_path)
    frozen = pickle.dumps(pack)
    assert pickle.loads(frozen).digest() == pack.digest()
    content = pack.file.read_bytes()
    pack.file.unlink()
    with pytest.raises(UserError, match=r"frames.bin: was replaced"):
        pickle.loads(frozen)
    pack.file.write_bytes(content)
    with pytest.raises(UserError, match=r"frames.bin: was replaced"):
        pickle.loads(frozen)


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
