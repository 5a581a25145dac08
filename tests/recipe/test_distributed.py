"""Several processes on CPU: they learn what one learns, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from corpus import make_corpus
from harness import (
    ENVIRONMENT,
    ROOT,
    Running,
    assert_one_sentence,
    results,
    run,
    same,
    start,
    train_arguments,
    weights,
)

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def places():
    """The variables of two processes without an agent, as under srun: nobody
    but they themselves can notice that one is gone."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    return [
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
        }
        for rank in (0, 1)
    ]


def arguments_of(data, output, *more):
    """28 utterances in batches of 5: ranks get 3 and 2, and 2 and 1."""
    more = ["--dropout=0", "--batch_size=5", *more]
    return train_arguments(data, output, *more)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """An undisturbed run of two processes."""
    output = tmp_path_factory.mktemp("two") / "out"
    arguments = arguments_of(data, output)
    both = [start("train", arguments, ROOT, place) for place in places()]
    ends = [process.wait() for process in both]
    assert [e.returncode for e in ends] == [0, 0], ends[0].stderr
    return output


def losses(output):
    rows = json.loads((output / "history.json").read_text())
    return [row[f"{part} loss"] for row in rows for part in ("train", "valid")]


def test_two_processes_learn_what_one_learns(data, two, tmp_path):
    one = tmp_path / "one"
    done = run("train", arguments_of(data, one))
    assert done.returncode == 0, done.stderr
    for name in ("valid", "test"):
        ours, theirs = results(one)[name], results(two)[name]
        assert ours["accuracy"] == theirs["accuracy"]
    assert len(losses(two)) == 8
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    done = run("train", arguments_of(data, two))
    assert_one_sentence(done, "started with processes=2, not 1")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two ranks have found, what the first has printed, and how they
    ended."""
    output = tmp_path_factory.mktemp("pair")
    both = [Running(ranks.process, output, place) for place in places()]
    ends = [process.wait() for process in both]
    files = [output / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), ends
    found = [json.loads(file.read_text()) for file in files]
    return found, ends[0].stderr, [end.returncode for end in ends]


def test_uneven_shares_weigh_and_count_right(pair):
    """The reference is one process that sees the whole batches."""
    found, said, _ = pair
    weight, epochs = ranks.learn(0, 1)
    for each in found:
        assert each["weight"] == pytest.approx(weight, rel=1e-5)
        assert each["losses"] == pytest.approx(epochs, rel=1e-5)
    # Each utterance is scored by one rank, and all are known to both.
    own = found[0]["own"] + found[1]["own"]
    assert len(found[0]["own"]) != len(found[1]["own"])
    assert sorted(own) == found[0]["all"] == found[1]["all"]
    assert len(own) == len(ranks.LENGTHS)
    # Where one rank can't save, none waits, and nothing half is left.
    assert found[0]["left"] == found[1]["left"] == [["CKPT"], ["CKPT"]]
    assert said.count("a checkpoint could not be saved") == 2


def test_the_reference_is_the_closed_form():
    weight, means = 0.0, []
    for _ in range(3):
        losses = []
        for batch in ranks.BATCHES:
            errors = [weight * x - 2 * x + 1 for x in batch]
            losses.append(sum(e * e for e in errors) / len(batch))
            slope = sum(2 * e * x for e, x in zip(errors, batch, strict=True))
            weight -= 0.01 * slope / len(batch)
        means.append(sum(losses) / len(losses))
    found = ranks.learn(0, 1)
    assert found[0] == pytest.approx(weight, rel=1e-5)
    assert found[1] == pytest.approx(means, rel=1e-5)


def test_a_signal_to_one_ends_both_with_its_code(pair):
    codes = [found["code"] for found in pair[0]]
    assert codes == [128 + signal.SIGUSR1] * 2


def test_when_one_is_killed_the_other_ends_with_a_message(pair):
    _, said, codes = pair
    assert codes == [1, -signal.SIGKILL]
    assert "Another process of this run has ended" in said
    assert "Traceback" not in said


def test_when_the_first_fails_for_all_they_end_with_its_sentence():
    both = [Running(ranks.fail_alone, place) for place in places()]
    ends = [process.wait() for process in both]
    for end in ends:
        assert_one_sentence(end, "There is no disk; buy one.")
    assert [end.stdout for end in ends] == ["this works\n", ""]


def test_when_the_first_cannot_read_the_data_all_end(tmp_path):
    bad = make_corpus(tmp_path / "data")
    (bad / "uttr-1-1.pt").write_bytes(b"rubbish")
    arguments = arguments_of(bad, tmp_path / "out")
    both = [start("train", arguments, ROOT, place) for place in places()]
    for process in both:
        assert_one_sentence(process.wait(), "uttr-1-1.pt: ")


@pytest.mark.parametrize(
    ("more", "change"),
    [
        ([], {"MASTER_ADDR": ""}),
        (["--distributed_backend=mpi"], {}),
        (["--distributed_backend=nccl"], {}),
    ],
)
def test_processes_that_cannot_meet_say_so(data, tmp_path, more, change):
    arguments = arguments_of(data, tmp_path / "out", *more)
    done = run("train", arguments, environment=places()[0] | change)
    assert_one_sentence(done, "give another --distributed_backend, as gloo")


def test_a_batch_may_leave_one_process_with_one_utterance(data, tmp_path):
    """Batch statistics are those of the whole batch, in any module."""
    more = ["--batch_size=5", "--segment_frames=16", "--number_of_epochs=1"]

    def arguments(name):
        return train_arguments(data, tmp_path / name, *more, system="ecapa")

    both = [start("train", arguments("two"), ROOT, place) for place in places()]
    ends = [process.wait() for process in both]
    assert [e.returncode for e in ends] == [0, 0], ends[0].stderr
    done = run("train", arguments("one"))
    assert done.returncode == 0, done.stderr
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert ours == pytest.approx(theirs, abs=1e-3)


def worker(agent, rank):
    """The process of a rank, a child of torchrun's agent."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == agent:
                environment = (folder / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environment:
                    return int(folder.name)
        except OSError:
            continue
    return None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_torchrun_ends_with_a_killed_rank_and_resumes(data, two, tmp_path):
    output = tmp_path / "out"
    often = ["--ckpt_interval_steps=1", "--ckpt_interval_minutes=0"]
    command = [
        *[*TORCHRUN, "--standalone", "--nproc_per_node=2", "train.py"],
        *arguments_of(data, output, *often),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("save/CKPT*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGKILL" in said
    assert not (output / "results.json").exists()
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert same(weights(two), weights(output))


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them."""
    names = [f"spkid-{side}-{os.getpid()}" for side in "ab"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        pair = ["type", "veth", "peer", "eth0", "netns", names[1]]
        ip("link", "add", "eth0", "netns", names[0], *pair)
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    finally:
        if shutil.which("ip"):
            for name in names:
                command = ["ip", "netns", "del", name]
                subprocess.run(command, check=False, capture_output=True)


def test_two_hosts_learn_what_one_learns(data, two, hosts, tmp_path):
    output = tmp_path / "out"
    processes = [
        subprocess.Popen(
            [
                *["ip", "netns", "exec", host, *TORCHRUN, "--nnodes=2"],
                *["--nproc_per_node=1", f"--node_rank={number}"],
                *["--master_addr=10.77.0.1", "--master_port=29500"],
                "train.py",
                *arguments_of(data, output),
            ],
            cwd=ROOT,
            env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, host in enumerate(hosts)
    ]
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], "".join(said)
    assert same(weights(two), weights(output))
