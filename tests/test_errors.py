"""What a user reads when something is wrong."""

import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from spkid.errors import (
    DataError,
    Problem,
    UserError,
    one_of,
    raise_for,
    run_command,
)

PROBLEM = Problem("a.pt", "", "is empty", "remove it")


def ending(error):
    """How a command ends that meets this error."""

    def main(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    return ended.value.code


def test_a_users_error_is_one_sentence():
    said = ending(UserError("a.json: not valid JSON; make it again."))
    assert said == "Error: a.json: not valid JSON; make it again."


def test_a_loader_workers_error_loses_its_traceback():
    text = (
        "Caught UserError in DataLoader worker process 0.\nTraceback ...\n"
        "spkid.errors.UserError: a.pt: is empty; remove it."
    )
    assert ending(UserError(text)) == "Error: a.pt: is empty; remove it."


def test_a_workers_chained_errors_give_the_last_sentence_whole():
    text = (
        "Caught DataError in DataLoader worker process 1.\nOriginal Traceback:"
        "\n  File ...\nspkid.errors.UserError: the first.\n\nDuring handling "
        "of the above exception, another exception occurred:\n\nTraceback:\n"
        "  File ...\nspkid.errors.DataError: data: 2 problems.\nfile  entry\n"
        "a.pt  key 'spkid.errors.UserError: x'"
    )
    said = ending(DataError(text))
    assert said == (
        "Error: data: 2 problems.\nfile  entry\n"
        "a.pt  key 'spkid.errors.UserError: x'"
    )


def test_a_worker_that_cannot_read_is_one_sentence():
    """torch remakes the error of its text, without a number."""
    text = (
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback:"
        "\n  File ...\nOSError: [Errno 24] Too many open files: 'a.pt'"
    )
    said = ending(OSError(text))
    assert said.startswith("Error: a.pt: Too many open files; raise the limit")
    text = text.replace("[Errno 24]", "[Errno 9]")
    with pytest.raises(OSError, match="Too many"):
        run_command(mock.Mock(side_effect=OSError(text)))


def test_memory_that_is_full_is_one_sentence():
    assert "the memory is full" in ending(MemoryError())


def process(code, **more):
    """A process of its own; its exit code and what it printed."""
    code = "from spkid.errors import run_command\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE there")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("n_lines", [2, 10_000])
def test_a_reader_that_goes_ends_the_command_quietly(unbuffered, n_lines):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    code = f"""
def main(_):
    print("first", flush=True)
    input()
    for _ in range({n_lines}):
        print("x" * 100)
run_command(main)
"""
    command = process(code, stdin=subprocess.PIPE, env=environment)
    assert command.stdout.readline() == b"first\n"
    command.stdout.close()
    command.stdin.write(b"\n")
    command.stdin.close()
    assert command.stderr.read() == b""
    assert command.wait() == 141


def test_a_broken_pipe_that_is_not_the_output_s_is_an_error():
    with pytest.raises(BrokenPipeError):
        run_command(mock.Mock(side_effect=BrokenPipeError(32, "Broken pipe")))


def test_names_that_a_terminal_lacks_are_escaped():
    environment = {
        **os.environ,
        **{"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "PYTHONIOENCODING": "ascii:strict",
    }
    code = "run_command(lambda _: print('voix \\xe9 \\udcff'))"
    said, errors = process(code, env=environment).communicate()
    assert errors == b""
    assert said.split() == [b"voix", b"\\xe9", b"\\udcff"]


@pytest.mark.skipif(os.name == "nt", reason="another Ctrl-C there")
def test_ctrl_c_is_quiet_in_a_scripts_imports_and_after_them():
    """With the lines that the recipe's scripts begin with."""
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("importing", flush=True)
input()
def main(_):
    print("running", flush=True)
    input()
run_command(main)
"""
    for places, code_then in (1, (-signal.SIGINT, 130)), (2, (130,)):
        command = process(code, stdin=subprocess.PIPE)
        for place in range(places):
            command.stdout.readline()
            if place + 1 < places:
                command.stdin.write(b"\n")
                command.stdin.flush()
        command.send_signal(signal.SIGINT)
        assert command.wait() in code_then
        assert command.stderr.read() == b""


def test_a_folder_that_is_forbidden_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: (tmp_path / "file" / "out").mkdir())
    said = str(ended.value.code)
    assert said.startswith(f"Error: {tmp_path / 'file' / 'out'}: Not a dir")
    assert "name a folder, not a file" in said


def test_a_full_disk_is_one_sentence():
    said = ending(OSError(errno.ENOSPC, "No space left on device", "a.txt"))
    assert said.startswith("Error: a.txt: No space left on device; free")
    assert "a run resumes from its last checkpoint" in said


def test_ctrl_c_ends_as_shells_expect():
    assert ending(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "broken"), ValueError()]
)
def test_a_bug_keeps_its_traceback(error):
    def main(_):
        raise error

    with pytest.raises(type(error)):
        run_command(main)


def test_problems_survive_the_way_between_processes():
    error = DataError([PROBLEM, PROBLEM], Path("data"))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.problems == [PROBLEM] * 2
    assert again.folder == Path("data")


def test_problems_are_raised_all_at_once():
    raise_for([], Path("data"))
    with pytest.raises(DataError, match=r"data/a\.pt: is empty; remove it\."):
        raise_for(iter([PROBLEM]), Path("data"))
    with pytest.raises(DataError, match="data: 2 problems"):
        raise_for([PROBLEM] * 2, Path("data"))


def test_choices_are_listed():
    one_of("a", ("a", "b", "c"), "key")
    with pytest.raises(UserError, match=r"^key='d' must be a, b or c\.$"):
        one_of("d", ("a", "b", "c"), "key")
    with pytest.raises(UserError, match=r"^key='d' must be a\.$"):
        one_of("d", ("a",), "key")
