"""Files are whole or absent, and a folder belongs to one process."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spkid.errors import DataError, UserError
from spkid.files import (
    UNSUPPORTED,
    flush_folder,
    lock_folder,
    read_json,
    save_atomically,
)


def test_a_text_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.txt"
    save_atomically("first", path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.txt: could not be written"):
        save_atomically("second", path)
    assert path.read_text() == "first"
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "the file is missing"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "isn't text in UTF-8; save it as UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a list, not an object"),
        (b'{"a": 1, "a": 1}', "key 'a' appears twice"),
        (b'{"b": {"a": 1, "a": 2}}', "key 'a' appears twice"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text('{"é": 1}', encoding=encoding)
    assert read_json(path) == {"é": 1}


def test_all_repeated_keys_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "a": 1, "b": {"c": 1, "c": 1}}')
    with pytest.raises(DataError) as caught:
        read_json(path)
    entries = {problem.entry for problem in caught.value.problems}
    assert entries == {"key 'a'", "key 'c'"}


def a_pipe(path):
    os.mkfifo(path)


def a_link_to_a_device(path):
    path.symlink_to("/dev/zero")


def a_giant(path):
    path.touch()
    os.truncate(path, 2**40)  # a hole


@pytest.mark.skipif(os.name == "nt", reason="has neither pipes nor /dev")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_pipe, "not a regular file.*put the file itself there"),
        (a_link_to_a_device, "not a regular file.*put the file itself there"),
        (Path.mkdir, "not a regular file.*put the file itself there"),
        (a_giant, "has 1,099,511,627,776 bytes, more than.*make it smaller"),
    ],
)
def test_what_is_no_file_is_not_read(tmp_path, make, words):
    make(tmp_path / "a.json")
    with pytest.raises(UserError, match=words):
        read_json(tmp_path / "a.json")


def test_a_link_may_be_kept_inside(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / "a.json"
    link.symlink_to(tmp_path / "a.json")
    assert read_json(link) == {}
    with pytest.raises(UserError, match="is a link that leaves its folder"):
        read_json(link, inside=True)
    (tmp_path / "data" / "b.json").write_text("{}")
    (tmp_path / "other").symlink_to(tmp_path / "data")
    assert read_json(tmp_path / "other" / "b.json", inside=True) == {}


@pytest.mark.parametrize("number", sorted(UNSUPPORTED))
def test_a_file_system_that_cannot_flush_is_no_failure(
    tmp_path, monkeypatch, number
):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    save_atomically("text", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "text"
    flush_folder(tmp_path)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "change its permissions, or name another place"),
        (errno.EROFS, "name a place that can be written"),
        (errno.EIO, "check the disk"),
    ],
)
def test_the_cure_is_that_of_the_error(tmp_path, monkeypatch, number, cure):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=cure):
        save_atomically("text", tmp_path / "a.txt")
    with pytest.raises(OSError, match=os.strerror(number)):
        flush_folder(tmp_path)


HOLDER = """
import os, sys, time
from spkid.files import lock_folder
lock = lock_folder(sys.argv[1])
if os.fork() == 0:
    print("the worker is there", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_parent_with_a_live_worker_leaves_the_folder_free(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        assert parent.stdout.readline() == "the worker is there\n"
        with pytest.raises(UserError, match="another process is using it"):
            lock_folder(tmp_path)
        parent.kill()
        parent.wait()
        os.killpg(parent.pid, 0)  # the worker is alive
        assert lock_folder(tmp_path).is_locked
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def test_a_folder_is_free_again_once_the_lock_is_gone(tmp_path):
    lock = lock_folder(tmp_path / "new")
    assert lock.is_locked
    del lock
    assert lock_folder(tmp_path / "new").is_locked


def test_a_folder_that_cannot_be_written_has_no_lock(tmp_path):
    (tmp_path / "file").touch()
    assert lock_folder(tmp_path / "file" / "out") is None


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link, real = tmp_path / "a.txt", tmp_path / "disk" / "b.txt"
    link.symlink_to(real)
    for text in ("first", "second"):  # a link to nothing, then to a file
        save_atomically(text, link)
        assert link.is_symlink() and real.read_text() == text
    assert [path.name for path in real.parent.iterdir()] == ["b.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_not_replaced(tmp_path, linked):
    """As /dev/null or, a link to a pipe, /dev/stdout."""
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    words = "is no regular file; move it away, or name another place"
    with pytest.raises(UserError, match=words):
        save_atomically("text", path)
    assert pipe.is_fifo() and path.is_symlink() == linked
    assert len(list(tmp_path.iterdir())) == 1 + linked


def test_of_many_repeated_keys_one_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(['{"a": 1, "a": 2}'] * 1_001) + "]")
    with pytest.raises(DataError, match="more than 1,000 keys") as caught:
        read_json(path)
    assert len(caught.value.problems) == 1


def test_json_as_large_as_what_its_reader_takes(tmp_path):
    """Parsed, it needs 25 times its bytes."""
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 64 * 2**20 + 1)
    with pytest.raises(UserError, match="more than 67,108,864; make it small"):
        read_json(path)
