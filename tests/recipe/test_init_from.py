"""Runs that start from the weights of another one (--init_from)."""

import hashlib
import json
import shutil
import signal
import socket

import pytest
from corpus import make_corpus
from harness import (
    CAN_FORK,
    ROOT,
    assert_one_sentence,
    results,
    run_train,
    same,
    start,
    train_arguments,
    weights,
)

from spkid.hparams import Settings

EPOCH = "--number_of_epochs=1"
OFTEN = [EPOCH, "--ckpt_interval_minutes=0", "--ckpt_interval_steps=1"]


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """The same speakers, and one more."""
    return make_corpus(tmp_path_factory.mktemp("more") / "data", n_speakers=5)


@pytest.fixture(scope="module")
def tuned(more, finished, tmp_path_factory):
    """The finished run's system, trained for these speakers."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    done = run_train(more, output, *OFTEN, f"--init_from={finished[0]}")
    assert done.returncode == 0, done.stderr
    said = f"Starts from {finished[0] / 'model' / 'embedding_model.ckpt'}: "
    said += "the embedding model, and the classes of 4 of 5 speakers"
    assert said in done.stdout
    return output


def first_loss(output):
    return json.loads((output / "history.json").read_text())[0]["train loss"]


def trained(output):
    """Weights but for what batches have passed through."""
    counted = ("running", "num_batches", "margin")
    return {
        name: weight
        for name, weight in weights(output).items()
        if not any(part in name for part in counted)
    }


def test_it_starts_better_than_from_nothing(more, finished, tuned, tmp_path):
    done = run_train(more, tmp_path / "out", *OFTEN)
    assert done.returncode == 0, done.stderr
    assert first_loss(tuned) < first_loss(tmp_path / "out") - 1
    found, path = results(tuned), finished[0] / "model" / "embedding_model.ckpt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["init_from"] == str(finished[0])
    assert found["init_from_sha256"] == digest
    assert results(tmp_path / "out")["init_from"] is None


@pytest.mark.skipif(not CAN_FORK, reason="can't fork here")
def test_a_resumed_run_needs_it_no_more(more, finished, tuned, tmp_path):
    first = shutil.copytree(finished[0], tmp_path / "first")
    output, given = tmp_path / "out", f"--init_from={first}"
    done = run_train(more, output, *OFTEN, given, fate=("step", 3, True))
    assert done.returncode == -signal.SIGKILL, done.stderr
    shutil.rmtree(first)
    done = run_train(more, output, *OFTEN)
    assert_one_sentence(done, f"started with init_from={first}, not None")
    done = run_train(more, output, *OFTEN, given)
    assert done.returncode == 0, done.stderr
    assert "Starts from" not in done.stdout
    assert same(weights(tuned), weights(output))
    ours, theirs = results(output), results(tuned)
    assert ours["init_from_sha256"] == theirs["init_from_sha256"]


def test_each_weight_is_where_it_was(data, finished, tmp_path):
    """At a learning rate of 0, also of the final fit; its folder is relative
    to the current one."""
    shutil.copytree(finished[0], tmp_path / "first")
    given = ["--init_from=first", "--lr=0", EPOCH, "--final_fit=True"]
    done = run_train(data, tmp_path / "out", *given, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the classes of 4 of 4 speakers") == 2
    for output in (tmp_path / "out", tmp_path / "out" / "final"):
        assert same(trained(output), trained(finished[0]))
        source = Settings.of_run(output).values["init_from"]
        assert source == str(tmp_path / "first")


def test_another_model_is_refused_before_the_data(finished, tmp_path):
    given = [f"--init_from={finished[0]}", "--d_model=32"]
    done = run_train(tmp_path / "nowhere", tmp_path / "out", *given)
    assert_one_sentence(done, "d_model=24, not 32; give --d_model=24, or")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason="can't fork here")
def test_two_processes_start_from_the_same(data, finished, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    output = tmp_path / "out"
    given = [f"--init_from={finished[0]}", "--lr=0", EPOCH]
    arguments = train_arguments(data, output, *given)
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in (0, 1)
    ]
    both = [start("train", arguments, ROOT, rank) for rank in ranks]
    ends = [process.wait() for process in both]
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr
    assert "".join(end.stdout for end in ends).count("Starts from") == 1
    assert same(trained(output), trained(finished[0]))
