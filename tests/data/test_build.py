"""A pack is complete and up to date, or it isn't there."""

import errno
import json
import multiprocessing
import os
import random
import select
import subprocess
import time
import zlib

import numpy as np
import pytest
import torch
from corpus import features_of

from spkid.data import (
    Corpus,
    FeatureFiles,
    PackedFeatures,
    Utterance,
    build,
    feature_file,
    open_features,
)
from spkid.errors import UserError


def assert_whole(pack):
    """Each utterance has the bytes that were packed."""
    for row, length in enumerate(pack.lengths):
        part = pack.data[pack.offsets[row] :][:length]
        assert zlib.crc32(part.data) == pack.checksums[row]


def assert_close(pack, files, name):
    found = pack.frames(pack.row[name])
    assert np.abs(found - files[1][name].numpy()).max() < 8e-3


def opened_files(monkeypatch, tmp_path):
    """The paths that are read from now on, in any process."""
    log = tmp_path / "opened.txt"
    load = feature_file.load_feature_file

    def logged(folder, path, *more):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        return load(folder, path, *more)

    monkeypatch.setattr(build, "load_feature_file", logged)
    monkeypatch.setattr(feature_file, "load_feature_file", logged)

    def take():
        names = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    return take


def test_many_processes_write_what_one_writes(many, tmp_path, monkeypatch):
    pack, _ = features_of(many, tmp_path)
    monkeypatch.setattr(build.sys, "platform", "elsewhere")
    alone, _ = features_of(many, tmp_path / "alone")
    for key in ("lengths", "offsets", "moments", "checksums", "data"):
        assert np.array_equal(getattr(pack, key), getattr(alone, key))
    assert pack.paths == list(many[1])
    for name in many[1]:
        assert_close(pack, many, name)


def test_a_pack_is_reused_until_a_file_changes(files, tmp_path, monkeypatch):
    opened = opened_files(monkeypatch, tmp_path)
    features_of(files, tmp_path)
    assert len(opened()) == 7
    features_of(files, tmp_path)
    assert not opened()
    torch.save(torch.zeros(5, 40), files[0] / "0.pt")
    pack, _ = features_of(files, tmp_path)
    assert len(opened()) == 7
    assert (pack.frames(0) == 0).all()
    files[1]["1.pt"] = files[1]["1.pt"][:-1]  # mel_len says otherwise now
    (problem,) = features_of(files, tmp_path)[1]
    assert "'mel_len' in the JSON says 5" in problem.what


def test_bad_files_are_left_out_and_remembered(many, tmp_path):
    names = list(many[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(many[1], names[300], torch.zeros(99, 40))
        patch.setitem(many[1], names[7], torch.zeros(98, 40))
        pack, problems = features_of(many, tmp_path)
        assert [p.file for p in problems] == [names[7], names[300]]
        assert "JSON says 99" in problems[1].what
        assert pack.problems == problems
        assert PackedFeatures(pack.file.parent).problems == problems
        assert features_of(many, tmp_path)[1] == problems
    assert pack.paths == [n for n in names if n not in (names[7], names[300])]
    assert_whole(pack)
    assert_close(pack, many, names[399])


def test_a_bad_file_is_opened_once_in_a_run(files, tmp_path, monkeypatch):
    (files[0] / "2.pt").write_bytes(b"")
    (files[0] / "4.pt").write_bytes(b"PK\x03\x04 cut off")
    opened = opened_files(monkeypatch, tmp_path)
    pack, problems = features_of(files, tmp_path)
    assert [problem.file for problem in problems] == ["2.pt", "4.pt"]
    assert sorted(opened()) == list(files[1])
    assert_close(pack, files, "6.pt")
    # With the pack there, these two alone are looked at again.
    assert features_of(files, tmp_path)[1] == problems
    assert sorted(opened()) == ["2.pt", "4.pt"]
    (problem,) = features_of((files[0], {"2.pt": torch.ones(7)}), tmp_path)[1]
    assert problem == problems[0]
    assert opened() == ["2.pt"]


def test_a_file_that_can_be_read_again_leads_to_a_rebuild(files, tmp_path):
    """Whether its stamps tell of it or not."""
    bad = files[0] / "2.pt"
    content = bad.read_bytes()
    info = bad.stat()
    bad.write_bytes(bytes(len(content)))
    os.utime(bad, ns=(info.st_atime_ns, info.st_mtime_ns))
    pack, problems = features_of(files, tmp_path)
    assert [p.file for p in problems] == ["2.pt"] and "2.pt" not in pack.row
    bad.write_bytes(content)
    os.utime(bad, ns=(info.st_atime_ns, info.st_mtime_ns))
    pack, problems = features_of(files, tmp_path)
    assert not problems and not pack.problems
    assert_close(pack, files, "2.pt")


@pytest.mark.parametrize("bad", [0, 1])
def test_a_pack_of_an_older_version_is_opened_or_rebuilt(files, tmp_path, bad):
    """It has no key "problems"."""
    if bad:
        (files[0] / "2.pt").write_bytes(b"")
    pack, problems = features_of(files, tmp_path)
    path = pack.file.with_name(build.INDEX)
    with np.load(path) as index:
        content = dict(index)
    header = json.loads(str(content["header"]))
    del header["problems"]
    content["header"] = json.dumps(header)
    np.savez(path, **content)
    before = path.read_bytes()
    assert features_of(files, tmp_path)[1] == problems
    assert len(problems) == bad
    assert (path.read_bytes() == before) == (not bad)


def test_no_pack_is_written_of_bad_files_alone(files, tmp_path):
    for name in files[1]:
        (files[0] / name).write_bytes(b"x")
    features, problems = features_of(files, tmp_path / "packs")
    assert len(problems) == 7 and not features.paths
    assert not list((tmp_path / "packs").iterdir())


def test_without_a_pack_files_are_checked_only_if_asked(
    files, tmp_path, monkeypatch
):
    (files[0] / "2.pt").write_bytes(b"")
    opened = opened_files(monkeypatch, tmp_path)
    utterances = tuple(Utterance(n, len(m)) for n, m in files[1].items())
    corpus = Corpus(files[0], 40, test=utterances)
    features, problems = open_features(corpus, pack=False)
    assert isinstance(features, FeatureFiles)
    assert features.paths == list(files[1]) and not problems and not opened()
    features, problems = open_features(corpus, pack=False, check=True)
    assert [problem.file for problem in problems] == ["2.pt"]
    assert "2.pt" not in features.row and len(features.paths) == 6
    assert sorted(opened()) == list(files[1])


def test_an_unknown_dtype_is_refused(files, tmp_path):
    with pytest.raises(UserError, match="pack_dtype='float8' must be float16"):
        features_of(files, tmp_path, dtype="float8")


def test_a_build_that_dies_leaves_no_pack(files, tmp_path, monkeypatch):
    packs = tmp_path / "packs"
    monkeypatch.setattr(
        build.os,
        "replace",
        lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        features_of(files, packs)
    assert not list(packs.iterdir())
    monkeypatch.undo()
    assert_whole(features_of(files, packs)[0])


def test_a_full_disk_is_reported_with_the_bytes_needed(
    files, tmp_path, monkeypatch
):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.os, "fsync", full)
    frames = sum(len(m) for m in files[1].values())
    with pytest.raises(UserError, match=f"{frames * 40 * 2:,} bytes.*No space"):
        features_of(files, tmp_path / "packs")
    assert not list((tmp_path / "packs").iterdir())


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
        words = rf"{build.FRAMES}: the pack needs {need:,} bytes.*No space"
        with pytest.raises(UserError, match=words):
            features_of(many, place)
        assert not list(place.iterdir())
        # Where the space runs out only while frames are written, too.
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(build.os, "posix_fallocate")
            with pytest.raises(UserError, match=words):
                features_of(many, place)
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_build_killed_at_any_moment_leaves_no_wrong_pack(many, tmp_path):
    context = multiprocessing.get_context("fork")

    def start():
        process = context.Process(target=features_of, args=(many, tmp_path))
        process.start()
        return process

    begin = time.monotonic()
    start().join()
    duration = time.monotonic() - begin
    (folder,) = tmp_path.iterdir()
    assert_whole(PackedFeatures(folder))
    draw, interrupted = random.Random(0), 0
    for _ in range(10):
        build.shutil.rmtree(folder, ignore_errors=True)
        alive, held = os.pipe()
        process = start()
        os.close(held)
        time.sleep(draw.uniform(0, duration))
        process.kill()
        process.join()
        # The pipe's end comes once no process of the build holds it.
        assert select.select([alive], [], [], 30)[0], "processes are left over"
        os.close(alive)
        if folder.exists():
            assert_whole(PackedFeatures(folder))
        else:
            interrupted += 1
    assert interrupted
    build.shutil.rmtree(folder, ignore_errors=True)
    pack, _ = features_of(many, tmp_path)
    assert_whole(pack)
    assert pack.paths == list(many[1])


def test_an_interrupted_build_ends_at_once(many, tmp_path, monkeypatch):
    """It doesn't go on with the files that no process has begun."""
    monkeypatch.setattr(build, "CHUNK", 2)
    opened = opened_files(monkeypatch, tmp_path)
    update, packs = build.tqdm.update, tmp_path / "packs"

    def interrupt(bar, count):
        update(bar, count)
        raise KeyboardInterrupt

    monkeypatch.setattr(build.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        features_of(many, packs)
    # While the error, whose traceback has all variables, is still handled.
    assert caught and not multiprocessing.active_children()
    assert len(opened()) < 200
    assert not list(packs.iterdir())


def test_two_builds_at_once_agree(files, tmp_path, monkeypatch):
    """The slower one finds the pack that the faster one left."""
    replace, inner = os.replace, []

    def late(source, target):
        if not inner:
            inner.append(source)
            inner.append(features_of(files, tmp_path)[0])
        replace(source, target)

    monkeypatch.setattr(build.os, "replace", late)
    pack, _ = features_of(files, tmp_path)
    assert_whole(pack)
    assert pack.stamps == inner[1].stamps
    assert list(tmp_path.glob("data-*")) == [pack.file.parent]


def test_what_a_kill_left_is_swept_once_it_is_old(files, tmp_path):
    pack, _ = features_of(files, tmp_path)
    name = pack.file.parent.name
    build.shutil.rmtree(pack.file.parent)
    for end, age in (("part-old", 7200), ("part-new", 0)):
        file = tmp_path / f"{name}.{end}" / build.FRAMES
        file.parent.mkdir()
        file.write_bytes(b"x")
        past = file.stat().st_mtime - age
        os.utime(file, (past, past))
    features_of(files, tmp_path)
    left = sorted(p.name for p in tmp_path.glob("data-*"))
    assert left == [name, f"{name}.part-new"]
