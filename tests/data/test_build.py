"""A pack is complete and up to date, or it isn't there."""

import errno
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from corpus import features_of
from filelock import FileLock

from spkid.data import (
    Corpus,
    FeatureFiles,
    PackedFeatures,
    Utterance,
    build,
    feature_file,
    open_features,
    places,
    processes,
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
    monkeypatch.setattr(processes.sys, "platform", "elsewhere")
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
    assert len(opened()) == 8  # the one that looks new, then all
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


def test_a_pack_of_an_older_version_is_rebuilt(files, tmp_path, caplog):
    """Its header has no seal."""
    pack, _ = features_of(files, tmp_path)
    path = pack.file.with_name(build.INDEX)
    with np.load(path) as index:
        content = dict(index)
    header = json.loads(str(content["header"]))
    del header["seal"]
    content["header"] = json.dumps(header)
    np.savez(path, **content)
    found, problems = features_of(files, tmp_path)
    assert "it is rebuilt" in caplog.text and not problems
    assert found.digest() == pack.digest()


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
        shutil.rmtree(folder, ignore_errors=True)
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
    shutil.rmtree(folder, ignore_errors=True)
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


def test_who_comes_second_waits_and_finds_the_pack(
    files, tmp_path, monkeypatch, caplog
):
    opened, second, replace = (
        opened_files(monkeypatch, tmp_path),
        [],
        os.replace,
    )

    def late(source, target):
        """The second one begins while the first one ends."""
        if not second:
            second.append(
                ThreadPoolExecutor().submit(features_of, files, packs)
            )
            for _ in range(3000):
                if "another process builds it; waiting" in caplog.text:
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("it doesn't wait")
        replace(source, target)

    packs = tmp_path / "packs"
    monkeypatch.setattr(build.os, "replace", late)
    pack, _ = features_of(files, packs)
    found, _ = second[0].result(timeout=60)
    assert_whole(found)
    assert sorted(opened()) == list(files[1])
    assert os.listdir(packs) == [found.file.parent.name]
    assert found.stamp == pack.stamp


def test_packs_of_both_dtypes_lie_side_by_side(files, tmp_path):
    half, _ = features_of(files, tmp_path)
    full, _ = features_of(files, tmp_path, dtype="float32")
    assert (half.dtype, full.dtype) == ("float16", "float32")
    assert half.file.exists() and half.file.parent != full.file.parent
    assert features_of(files, tmp_path)[0].stamp == half.stamp


def test_only_what_dead_builds_left_is_swept(files, tmp_path, monkeypatch):
    """Whatever the clock says; and nothing that no build has made."""
    pack, _ = features_of(files, tmp_path)
    name = pack.file.parent.name
    shutil.rmtree(pack.file.parent)
    dead, alive = "dead-01234567-89abcdef", "alive-01234567-89abcdef"
    parts = [f"{n}.part-{i:08x}" for i, n in enumerate((name, dead, alive))]
    theirs = ["exp.part-1", f"{dead}.part-1", "thesis.part-01234567"]
    for part in theirs:
        (tmp_path / part).mkdir()
        (tmp_path / part / build.FRAMES).touch()
    (tmp_path / "thesis.lock").touch()
    for number, part in enumerate(parts):
        file = tmp_path / part / build.FRAMES
        file.parent.mkdir()
        file.write_bytes(b"x")
        os.utime(file, (4e9, 4e9) if number else (0, 0))
    (tmp_path / parts[1] / "notes.txt").write_text("mine")
    (tmp_path / parts[1] / "sources-mine.txt").touch()
    (tmp_path / parts[1] / "sources-01234567.npy").touch()
    (tmp_path / parts[1] / "sources-01234567.npy.9.part").touch()
    with FileLock(tmp_path / f"{alive}.lock"):
        features_of(files, tmp_path)
    left = {p.name for p in tmp_path.iterdir()} - {"data", f"{alive}.lock"}
    assert left == {name, *parts[1:], *theirs, "thesis.lock"}
    for part in theirs:
        assert os.listdir(tmp_path / part) == [build.FRAMES]
    left = {*os.listdir(tmp_path / parts[1])}
    assert left == {"notes.txt", "sources-mine.txt"}
    assert os.listdir(tmp_path / parts[2]) == [build.FRAMES]


def test_where_nothing_can_be_locked_a_build_sweeps_nothing(
    files, tmp_path, monkeypatch
):
    def refuse(*args, **options):
        raise NotImplementedError

    part = tmp_path / "packs" / "x-01234567-89abcdef.part-01234567"
    part.mkdir(parents=True)
    monkeypatch.setattr(places.FileLock, "acquire", refuse)
    pack, _ = features_of(files, tmp_path / "packs")
    assert_whole(pack)
    assert part.exists()


def test_a_users_files_in_a_packs_folder_stay(files, tmp_path):
    pack, _ = features_of(files, tmp_path)
    note = pack.file.with_name("notes.txt")
    note.write_text("mine")
    torch.save(files[1]["0.pt"] + 1, files[0] / "0.pt")
    found, _ = features_of(files, tmp_path)
    assert note.read_text() == "mine"
    assert found.digest() != pack.digest()
    assert found.digest() == PackedFeatures(note.parent).digest()
    assert {*os.listdir(note.parent)} == {
        note.name,
        build.FRAMES,
        build.INDEX,
        *(p.name for p in note.parent.glob("sources-*.npy")),
    }


def replaced(path, content):
    """As tar and rsync do it: with the old time stamp."""
    info = path.stat()
    path.with_name("new").write_bytes(content)
    os.replace(path.with_name("new"), path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_file_of_the_same_size_and_time_is_noticed(
    files, tmp_path, monkeypatch, dtype
):
    opened = opened_files(monkeypatch, tmp_path)
    pack, _ = features_of(files, tmp_path, dtype)
    path, mel = files[0] / "3.pt", files[1]["3.pt"]
    content = path.read_bytes()
    opened()
    replaced(path, content)  # the same content
    found, _ = features_of(files, tmp_path, dtype)
    assert opened() == ["3.pt"]
    assert found.stamp == pack.stamp
    features_of(files, tmp_path, dtype)
    assert not opened()
    values = mel.numpy().tobytes()
    near = mel.numpy() + np.float32(0.01)
    crc = zlib.crc32(values).to_bytes(4, "little")
    new = zlib.crc32(near.tobytes()).to_bytes(4, "little")
    replaced(path, content.replace(values, near.tobytes()).replace(crc, new))
    found, _ = features_of(files, tmp_path, dtype)
    assert "3.pt" in opened()
    assert found.digest() != pack.digest()
    assert found.statistics(3).tolist() != pack.statistics(3).tolist()


def test_another_processor_rounds_moments_otherwise(
    files, tmp_path, monkeypatch
):
    """A pack on a shared disk is no other one for that."""
    pack, _ = features_of(files, tmp_path)
    for path in files[0].glob("*.pt"):
        replaced(path, path.read_bytes())
    real = build.utterance_moments
    monkeypatch.setattr(
        build, "utterance_moments", lambda mel: np.nextafter(real(mel), 9)
    )
    found, _ = features_of(files, tmp_path)
    assert found.stamp == pack.stamp
    assert found.digest() == pack.digest()


def test_a_moved_or_copied_folder_keeps_its_pack(files, tmp_path, monkeypatch):
    opened, packs = opened_files(monkeypatch, tmp_path), tmp_path / "packs"
    pack, _ = features_of(files, packs)
    shutil.copytree(files[0], tmp_path / "copy")
    opened()
    for again in range(2):
        found, _ = features_of((tmp_path / "copy", files[1]), packs)
        assert found.stamp == pack.stamp
        assert sorted(opened()) == ([] if again else list(files[1]))
    assert features_of(files, packs)[0].stamp == pack.stamp
    assert not opened()
    # A copy that differs gets a pack of its own.
    torch.save(files[1]["0.pt"] + 1, tmp_path / "copy" / "0.pt")
    found, _ = features_of((tmp_path / "copy", files[1]), packs)
    assert found.file != pack.file and found.digest() != pack.digest()
    opened()
    assert features_of(files, packs)[0].stamp == pack.stamp
    assert not opened()
    os.rename(files[0], tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere", files[1]
    assert features_of(moved, packs)[0].stamp == pack.stamp
    assert len(os.listdir(packs)) == 2


def test_a_pack_that_nobody_may_write_is_used(files, tmp_path, monkeypatch):
    """As on a read-only file system, from another machine's place."""
    packs = tmp_path / "packs"
    pack, _ = features_of(files, packs)
    os.rename(files[0], tmp_path / "elsewhere")

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(places.FileLock, "acquire", refuse)
    found, _ = features_of((tmp_path / "elsewhere", files[1]), packs)
    assert found.stamp == pack.stamp


@pytest.mark.parametrize(
    "name",
    [
        "x" * 250,
        "voices #2 {a} [b] *",
        "Stimmen für mich",
        os.fsdecode(b"voices \xff"),
    ],
)
def test_a_data_folder_may_have_any_name(files, tmp_path, name):
    try:
        folder = shutil.copytree(files[0], tmp_path / name)
    except OSError:
        pytest.skip("the file system doesn't take this name")
    packs = tmp_path / "packs"
    pack, _ = features_of((folder, files[1]), packs)
    assert_whole(pack)
    assert pack.file.parent.name.isascii()
    assert len(pack.file.parent.name) < 60
    other = name[:-1] + "y"
    shutil.copytree(folder, tmp_path / other)
    torch.save(files[1]["0.pt"] + 1, tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / other / "0.pt")
    found, _ = features_of((tmp_path / other, files[1]), packs)
    assert found.file != pack.file
    assert features_of((folder, files[1]), packs)[0].stamp == pack.stamp


def test_a_pack_follows_the_umask(files, tmp_path):
    old = os.umask(0o022)
    try:
        pack, _ = features_of(files, tmp_path / "packs")
    finally:
        os.umask(old)
    assert stat.S_IMODE(pack.file.parent.stat().st_mode) == 0o755
    for file in pack.file.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_pack_is_built_without_what_other_systems_lack(
    many, tmp_path, monkeypatch
):
    expected = features_of(many, tmp_path)[0].digest()
    for name in ("pwrite", "posix_fallocate", "fork", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    pack, _ = features_of(many, tmp_path / "other")
    assert pack.digest() == expected
    assert_whole(PackedFeatures(pack.file.parent))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_may_refuse_to_reserve(
    files, tmp_path, monkeypatch, code
):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    monkeypatch.setattr(os, "fsync", refuse)
    assert_whole(features_of(files, tmp_path / "packs")[0])


@pytest.mark.parametrize(
    "name", ["a file", "a file/packs", "/proc/packs", "x" * 300]
)
def test_a_pack_folder_that_is_none_is_named_with_its_key(
    files, tmp_path, name
):
    if name.startswith("/proc") and not os.path.exists("/proc"):
        pytest.skip("no /proc here")
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(UserError) as caught:
        features_of(files, tmp_path / name)
    message = str(caught.value)
    assert (
        "name another folder by --pack_folder, or give --pack False" in message
    )
    assert "\n" not in message and "free the space" not in message
    assert (tmp_path / "a file").read_text() == "mine"
    assert_whole(features_of(files, tmp_path / "another folder")[0])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_pack_folder_that_cannot_be_written_is_named_with_its_key(
    files, tmp_path, monkeypatch, code
):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refuse)
    words = rf"{os.strerror(code)}.*name another folder by --pack_folder"
    with pytest.raises(UserError, match=words):
        features_of(files, tmp_path / "packs")


@pytest.mark.skipif(sys.platform != "linux", reason="one process packs there")
@pytest.mark.parametrize("job", ["packing", "checking"])
def test_a_killed_worker_is_one_sentence(many, tmp_path, monkeypatch, job):
    """Though its parent keeps SIGTERM, by which the others are ended."""
    packs, parent, folder = tmp_path / "packs", os.getpid(), many[0]
    if job == "checking":
        features_of(many, packs)
        folder = shutil.copytree(folder, tmp_path / "copy")
    before = [*packs.iterdir()] if job == "checking" else []
    load = build.load_feature_file

    def killed(folder, path, *more):
        if path == "300.pt" and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(folder, path, *more)

    monkeypatch.setattr(build, "load_feature_file", killed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with pytest.raises(UserError, match=r"was killed, .* free some memory"):
            features_of((folder, many[1]), packs)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        signal.signal(signal.SIGTERM, handler)
    assert not multiprocessing.active_children()
    assert [*packs.iterdir()] == before
    monkeypatch.setattr(build, "load_feature_file", load)
    assert_whole(features_of((folder, many[1]), packs)[0])


def test_without_semaphores_one_process_packs(many, tmp_path, monkeypatch):
    """A container may have no room in /dev/shm, or none at all."""

    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(processes, "ProcessPoolExecutor", refuse)
    assert_whole(features_of(many, tmp_path / "packs")[0])


@pytest.mark.skipif(sys.platform != "linux", reason="one process packs there")
def test_where_no_more_processes_are_allowed_one_packs(
    many, tmp_path, monkeypatch
):
    fork, calls = os.fork, []

    def limited():
        calls.append(1)
        if len(calls) > 1:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "fork", limited)
    assert_whole(features_of(many, tmp_path / "packs")[0])
    assert len(calls) == 2 and not multiprocessing.active_children()


@pytest.mark.parametrize("job", ["packing", "checking"])
def test_ctrl_c_leaves_what_was_there(many, tmp_path, monkeypatch, job):
    packs, folder = tmp_path / "packs", many[0]
    if job == "checking":
        features_of(many, packs)
        folder = shutil.copytree(folder, tmp_path / "copy")
    before = sorted(packs.rglob("*"))

    def interrupt(bar, count):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build.tqdm, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            features_of((folder, many[1]), packs)
    assert not multiprocessing.active_children()
    assert sorted(packs.rglob("*")) == before
    assert_whole(features_of((folder, many[1]), packs)[0])


def test_advice_for_large_values_works(files, tmp_path):
    """With a pack that is there, and also for those who skip."""
    for name in ("0.pt", "4.pt"):
        torch.save(files[1][name] * 1e5, files[0] / name)
    for _ in range(2):
        pack, problems = features_of(files, tmp_path)
        assert [p.file for p in problems] == ["0.pt", "4.pt"]
        assert {p.cure for p in problems} == {"give --pack_dtype float32"}
        assert len(pack.paths) == 5
    for _ in range(2):
        pack, problems = features_of(files, tmp_path, dtype="float32")
        assert not problems and len(pack.paths) == 7


def test_a_file_may_be_of_any_year(files, tmp_path):
    """Beyond what an int64 counts in nanoseconds, and before 1970."""
    for name, year in (("0.pt", 2300), ("1.pt", 1960)):
        seconds = (year - 1970) * 31_556_952
        os.utime(files[0] / name, (seconds, seconds))
    pack, _ = features_of(files, tmp_path)
    assert features_of(files, tmp_path)[0].stamp == pack.stamp


@pytest.mark.parametrize("bad", ["0.pt", "6.pt"])
def test_no_space_is_taken_for_frames_that_no_file_has(
    files, tmp_path, monkeypatch, bad
):
    reserved, reserve = [], build._reserve

    def logged(file, size):
        reserved.append(size)
        assert size < 10**6
        reserve(file, size)

    monkeypatch.setattr(build, "_reserve", logged)
    mels = {name: len(mel) for name, mel in files[1].items()}
    utterances = tuple(
        Utterance(name, 9_000_000 if name == bad else length)
        for name, length in mels.items()
    )
    corpus = Corpus(files[0], 40, test=utterances)
    for _ in range(2):  # the second time, the pack is there
        pack, (problem,) = open_features(
            corpus, tmp_path / "packs", progress=False
        )
        assert problem.file == bad and problem.cure == "make the two agree"
        assert "in the JSON says 9000000" in problem.what
    assert reserved == [(sum(mels.values()) - mels[bad]) * 40 * 2]
    assert_whole(pack)
    assert_close(pack, files, "3.pt")


def test_a_file_rewritten_in_place_with_its_old_time_is_noticed(
    files, tmp_path
):
    """Size, time of change and inode are the same; its inode's time isn't."""
    pack, _ = features_of(files, tmp_path)
    path = files[0] / "3.pt"
    before = path.stat()
    info = before.st_atime_ns, before.st_mtime_ns
    part = files[1]["3.pt"] + 1
    torch.save(part, path)
    os.utime(path, ns=info)
    after = path.stat()
    for key in ("st_size", "st_mtime_ns", "st_ino"):
        assert getattr(after, key) == getattr(before, key)
    found, _ = features_of(files, tmp_path)
    assert found.digest() != pack.digest()
    assert np.abs(found.frames(3) - part.numpy()).max() < 8e-3


def test_a_pack_that_is_moved_in_halves_is_none(files, tmp_path, monkeypatch):
    """Killed between the moves: the index, which makes it a pack, is last."""
    packs, replace = tmp_path / "packs", os.replace
    pack, _ = features_of(files, packs)
    target = pack.file.parent
    (target / "notes.txt").touch()  # so the files are moved one by one
    torch.save(files[1]["0.pt"] + 1, files[0] / "0.pt")
    moves = []

    def killed(source, to):
        if os.path.dirname(to) == str(target):
            moves.append(os.path.basename(to))
            assert (target / build.INDEX).exists() is False
            if len(moves) == 3:
                raise KeyboardInterrupt
        replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(places.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            features_of(files, packs)
    assert moves[-1] == build.INDEX and build.FRAMES in moves[:2]
    found, _ = features_of(files, packs)
    assert_whole(found)
    assert found.digest() != pack.digest()


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def deflated(path):
    with np.load(path) as index:
        content = dict(index)
    np.savez_compressed(path, **content)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
@pytest.mark.parametrize("name", [build.INDEX, build.FRAMES, "sources"])
@pytest.mark.parametrize("change", [a_pipe, deflated, a_folder])
def test_what_is_no_file_of_a_pack_is_replaced(files, tmp_path, name, change):
    """Or refused in a sentence whose advice works."""
    pack, _ = features_of(files, tmp_path / "packs")
    path = pack.file.with_name(name)
    if name == "sources":
        (path,) = pack.file.parent.glob("sources-*.npy")
    if change is deflated and name != build.INDEX:
        pytest.skip("is no archive")
    change(path)
    if change is a_folder and name != "sources":
        with pytest.raises(UserError, match="folder by --pack_folder"):
            features_of(files, tmp_path / "packs")
        found, _ = features_of(files, tmp_path / "others")
    else:
        found, _ = features_of(files, tmp_path / "packs")
    assert_whole(found)
    assert found.digest() == pack.digest()
    assert change is a_folder or path.is_file()
    assert change is not deflated or found.stamp != pack.stamp  # rebuilt
