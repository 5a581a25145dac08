"""Files are whole or absent, and a folder belongs to one process."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from spkid.errors import UserError
from spkid.files import lock_folder, read_json, save_atomically


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
        (b"\xff{}", "not valid JSON"),
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
