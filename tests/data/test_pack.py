"""The pack holds what the files held, or isn't there."""

import errno
import multiprocessing
import os
import pickle
import random
import select
import subprocess
import time

import numpy as np
import pytest
import torch

from spkid.data import pack as packed
from spkid.errors import UserError
from spkid.data.feature_file import FeatureFiles
from spkid.data.pack import PackedFeatures


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "data"
    folder.mkdir()
    mels = {f"{i}.pt": torch.randn(5 + i, 40) * 8 - 4 for i in range(7)}
    for name, mel in mels.items():
        torch.save(mel, folder / name)
    return folder, mels


def build(files, tmp_path, **options):
    folder, mels = files
    lengths = [len(m) for m in mels.values()]
    return PackedFeatures.build(
        tmp_path / "pack",
        folder,
        list(mels),
        lengths,
        n_mels=40,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough files that several processes pack them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("many")
    mels = {f"{i}.pt": torch.randn(20 + i % 7, 40) for i in range(400)}
    for name, mel in mels.items():
        torch.save(mel, folder / name)
    return folder, mels


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("float16", 8e-3)]
)
def test_holds_what_the_files_held(files, tmp_path, dtype, error):
    pack = build(files, tmp_path, dtype=dtype)
    for name, mel in files[1].items():
        row = pack.row[name]
        assert np.abs(pack.frames(row) - mel.numpy()).max() <= error
        part = pack.frames(row, start=2, count=2)
        assert np.abs(part - mel[2:4].numpy()).max() <= error
        assert len(pack.frames(row, start=3, count=999)) == len(mel) - 3
        assert np.allclose(pack.moments[row, 0], mel.mean(0), atol=1e-5)
        deviation = mel.std(0, correction=0)
        assert np.allclose(pack.moments[row, 1], deviation, atol=1e-5)
    pack.verify()


def test_many_processes_write_what_one_writes(many, tmp_path, monkeypatch):
    pack = build(many, tmp_path)
    monkeypatch.setattr(packed.sys, "platform", "elsewhere")
    alone = build(many, tmp_path / "alone")
    for key in ("lengths", "offsets", "moments", "checksums", "data"):
        assert np.array_equal(getattr(pack, key), getattr(alone, key))
    assert pack.paths == list(many[1])
    for name, mel in many[1].items():
        assert np.abs(pack.frames(pack.row[name]) - mel.numpy()).max() < 8e-3


def test_files_read_directly_say_the_same(files, tmp_path):
    folder, mels = files
    pack = build(files, tmp_path, dtype="float32")
    lengths = [len(m) for m in mels.values()]
    direct = FeatureFiles(folder, list(mels), lengths, n_mels=40)
    assert direct.paths == pack.paths
    assert direct.row == pack.row
    assert np.array_equal(direct.lengths, pack.lengths)
    rows, starts, counts = [3, 0, 6, 3], [0, 2, 4, 1], [8, 3, 1, 2]
    for one, other in zip(
        direct.batch(rows, starts, counts),
        pack.batch(rows, starts, counts),
        strict=True,
    ):
        assert torch.equal(one, other)
    for row in range(7):
        assert np.array_equal(direct.frames(row, 1, 3), pack.frames(row, 1, 3))
        assert torch.equal(direct.statistics(row), pack.statistics(row))


def test_a_part_at_the_packs_end_is_padded(files, tmp_path):
    """There is no frame behind it, and before it are its neighbour's."""
    pack = build(files, tmp_path, dtype="float32")
    mels = list(files[1].values())
    features, _ = pack.batch([6, 5], [9, 0], [2, 10])
    assert torch.equal(features[0, :2], mels[6][9:])
    assert (features[0, 2:] == 0).all()
    assert torch.equal(features[1], mels[5])


def test_is_reused_until_a_file_changes(files, tmp_path, monkeypatch):
    build(files, tmp_path)
    reads = []
    load = packed.load_feature_file
    monkeypatch.setattr(
        packed, "load_feature_file", lambda *a: reads.append(a) or load(*a)
    )
    build(files, tmp_path)
    assert not reads
    torch.save(torch.zeros(5, 40), files[0] / "0.pt")
    pack = build(files, tmp_path)
    assert len(reads) == 7
    files[1]["1.pt"] = files[1]["1.pt"][:-1]  # mel_len says otherwise now
    with pytest.raises(UserError, match="'mel_len' in the JSON says 5"):
        build(files, tmp_path)
    assert (pack.frames(0) == 0).all()


def test_a_build_that_dies_leaves_nothing_in_use(files, tmp_path, monkeypatch):
    monkeypatch.setattr(packed.np, "savez", lambda *a, **k: os._exit)
    monkeypatch.setattr(
        packed.os,
        "replace",
        lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        build(files, tmp_path)
    assert not (tmp_path / "pack").exists()
    monkeypatch.undo()
    build(files, tmp_path).verify()


def test_a_full_disk_is_said_with_the_bytes_needed(
    files, tmp_path, monkeypatch
):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed.os, "fsync", full)
    frames = sum(len(m) for m in files[1].values())
    with pytest.raises(UserError, match=f"{frames * 40 * 2:,} bytes.*No space"):
        build(files, tmp_path)
    assert not list(tmp_path.glob("pack*"))


def test_a_disk_that_is_really_full(many, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    try:
        need = sum(len(mel) for mel in many[1].values()) * 40 * 2
        words = rf"{packed.FRAMES}: the pack needs {need:,} bytes.*No space"
        with pytest.raises(UserError, match=words):
            build(many, place)
        assert not list(place.iterdir())
        # Where the space runs out only while frames are written, too.
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(packed.os, "posix_fallocate")
            with pytest.raises(UserError, match=words):
                build(many, place)
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_build_killed_at_any_moment_leaves_no_wrong_pack(many, tmp_path):
    folder, mels = many
    lengths = [len(mel) for mel in mels.values()]
    options = (tmp_path / "pack", folder, list(mels), lengths, 40)
    context = multiprocessing.get_context("fork")

    def start():
        process = context.Process(
            target=PackedFeatures.build, args=(*options, "float16", False)
        )
        process.start()
        return process

    begin = time.monotonic()
    start().join()
    duration = time.monotonic() - begin
    PackedFeatures(options[0]).verify()
    draw, interrupted = random.Random(0), 0
    for _ in range(10):
        packed.shutil.rmtree(options[0], ignore_errors=True)
        alive, held = os.pipe()
        process = start()
        os.close(held)
        time.sleep(draw.uniform(0, duration))
        process.kill()
        process.join()
        # The pipe's end comes once no process of the build holds it.
        assert select.select([alive], [], [], 30)[0], "processes are left over"
        os.close(alive)
        if options[0].exists():
            PackedFeatures(options[0]).verify()
        else:
            interrupted += 1
    assert interrupted
    packed.shutil.rmtree(options[0], ignore_errors=True)
    pack = PackedFeatures.build(*options, progress=False)
    pack.verify()
    assert pack.paths == list(mels)


def test_damage_is_found(files, tmp_path):
    pack = build(files, tmp_path)
    with open(pack.file, "r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(UserError, match="differs from what was packed"):
        PackedFeatures(pack.file.parent).verify()
    pack.file.write_bytes(pack.file.read_bytes()[:-2])
    with pytest.raises(UserError, match="bytes, not"):
        PackedFeatures(pack.file.parent)


def test_a_worker_that_is_spawned_maps_the_file_itself(files, tmp_path):
    pack = build(files, tmp_path)
    frozen = pickle.dumps(pack)
    assert len(frozen) < 20_000
    assert np.array_equal(pickle.loads(frozen).frames(3), pack.frames(3))


BAD = {
    "NaN": (torch.full((5, 40), float("nan")), "NaN or infinite"),
    "infinite": (torch.full((5, 40), float("inf")), "NaN or infinite"),
    "bands": (torch.zeros(5, 39), r"not \(frames, n_mels=40\)"),
    "dimensions": (torch.zeros(200), r"not \(frames, n_mels=40\)"),
    "integers": (torch.zeros(5, 40, dtype=torch.int64), "no float tensor"),
    "list": ([1, 2], "no float tensor"),
    "length": (torch.zeros(6, 40), "'mel_len' in the JSON says 5"),
    "empty": (torch.zeros(0, 40), "has 0 frames"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named(files, tmp_path, what):
    content, words = BAD[what]
    torch.save(content, files[0] / "0.pt")
    with pytest.raises(UserError, match=rf"0\.pt: .*{words}"):
        build(files, tmp_path)
    assert not (tmp_path / "pack").exists()


def test_values_beyond_half_precision_are_named(files, tmp_path):
    torch.save(torch.full((5, 40), -7e4), files[0] / "0.pt")
    with pytest.raises(UserError, match=r"0\.pt: has values beyond float16"):
        build(files, tmp_path)
    pack = build(files, tmp_path, dtype="float32")
    assert (pack.frames(0) == -7e4).all()
    with pytest.raises(UserError, match="'float8' is none of float16"):
        build(files, tmp_path, dtype="float8")


def test_a_bad_file_is_named_by_every_process(many, tmp_path):
    names = list(many[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(many[1], names[300], torch.zeros(99, 40))
        with pytest.raises(UserError, match=r"/300\.pt: .*JSON says 99"):
            build(many, tmp_path)
        bad = []
        pack = build(many, tmp_path, on_error=lambda path, _: bad.append(path))
    assert bad == [names[300]]
    assert pack.paths == [name for name in names if name != names[300]]
    pack.verify()
    last = many[1][names[399]].numpy()
    assert np.abs(pack.frames(pack.row[names[399]]) - last).max() < 8e-3


def test_a_pack_that_a_device_cannot_hold_is_said(files, tmp_path):
    pack = build(files, tmp_path)

    class Full:
        def to(self, *args, **options):
            raise torch.OutOfMemoryError("CUDA out of memory")

    pack.tensor = Full()
    with pytest.raises(UserError, match="bytes don't fit into the memory of"):
        pack.to("cuda")


def test_bad_files_can_be_collected_and_left_out(files, tmp_path):
    (files[0] / "2.pt").write_bytes(b"")
    (files[0] / "4.pt").write_bytes(b"PK\x03\x04 cut off")
    bad = []
    pack = build(files, tmp_path, on_error=lambda path, _: bad.append(path))
    assert bad == ["2.pt", "4.pt"]
    assert len(pack.paths) == 5
    assert (
        np.abs(pack.frames(pack.row["6.pt"]) - files[1]["6.pt"].numpy()).max()
        < 8e-3
    )


class Canary:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_feature_file_runs(files, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"x": Canary(canary)}, files[0] / "0.pt")
    with pytest.raises(UserError, match=r"0\.pt: not a readable"):
        build(files, tmp_path)
    assert not canary.exists()
    torch.load(files[0] / "0.pt", weights_only=False)
    assert canary.exists(), "the canary itself must work"


def test_two_builds_at_once_agree(files, tmp_path, monkeypatch):
    """The slower one finds the pack that the faster one left."""
    replace, inner = os.replace, []

    def late(source, target):
        if not inner:
            inner.append(source)
            inner.append(build(files, tmp_path))
        replace(source, target)

    monkeypatch.setattr(packed.os, "replace", late)
    pack = build(files, tmp_path)
    pack.verify()
    assert pack.stamps == inner[1].stamps
    assert [p.name for p in tmp_path.glob("pack*")] == ["pack"]


def test_what_a_kill_left_is_swept_once_it_is_old(files, tmp_path):
    for name, age in (("pack.part-old", 7200), ("pack.part-new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / packed.FRAMES).write_bytes(b"x")
        past = (tmp_path / name / packed.FRAMES).stat().st_mtime - age
        os.utime(tmp_path / name / packed.FRAMES, (past, past))
    build(files, tmp_path)
    left = sorted(p.name for p in tmp_path.glob("pack*"))
    assert left == ["pack", "pack.part-new"]
