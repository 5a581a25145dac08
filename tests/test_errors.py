"""What a user reads when something is wrong."""

import errno
import pickle
from pathlib import Path

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
