"""A corpus and a finished run, which tests leave as they are."""

import pytest
from corpus import make_corpus
from harness import run_train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """An undisturbed run: its output folder, and what it printed."""
    output = tmp_path_factory.mktemp("run") / "out"
    done = run_train(data, output, report=True)
    assert done.returncode == 0, done.stderr
    return output, done
