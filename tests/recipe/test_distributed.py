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
from test_recipe import ENVIRONMENT, ROOT, command, run, same, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ALONE = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
SCRIPT = str(Path(ranks.__file__))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


def train(data, output, *more):
    """28 utterances in batches of 5: ranks get 3 and 2, and 2 and 1."""
    arguments = command(data, output, "--dropout=0", *more)
    return [a.replace("batch_size=4", "batch_size=5") for a in arguments]


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """An undisturbed run of two processes."""
    output = tmp_path_factory.mktemp("two") / "out"
    done = run([*ALONE, *train(data, output)[1:]])
    assert done.returncode == 0, done.stderr
    return output


def losses(output):
    rows = json.loads((output / "history.json").read_text())
    return [row[f"{part} loss"] for row in rows for part in ("train", "valid")]


def test_two_processes_learn_what_one_learns(data, two, tmp_path):
    one = train(data, tmp_path / "one")
    assert run(one).returncode == 0
    results = [
        json.loads((output / "results.json").read_text())
        for output in (tmp_path / "one", two)
    ]
    for name in ("valid", "test"):
        accuracies = [result[name]["accuracy"] for result in results]
        assert accuracies[0] == accuracies[1]
    assert len(losses(two)) == 8
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    done = run([a.replace(str(tmp_path / "one"), str(two)) for a in one])
    assert done.returncode == 1
    assert "begun with processes=2, not 1" in done.stderr


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes without an agent, as under srun: nobody but they
    themselves can notice that one is gone."""
    output = tmp_path_factory.mktemp("pair")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(output)],
            env={
                **ENVIRONMENT,
                **place,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    processes[1].wait(120)
    said = processes[0].communicate(timeout=60)[1]
    return output, said, [process.returncode for process in processes]


def found_by(output):
    files = [output / f"rank{rank}.json" for rank in (0, 1)]
    return [json.loads(file.read_text()) for file in files]


def test_uneven_shares_weigh_and_count_right(pair):
    """The reference is one process that sees the whole batches."""
    output, said, _ = pair
    found = found_by(output)
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


def test_a_signal_to_one_ends_both_with_its_code(pair):
    codes = [found["code"] for found in found_by(pair[0])]
    assert codes == [128 + signal.SIGUSR1] * 2


def test_when_one_is_killed_the_other_ends_with_a_message(pair):
    _, said, codes = pair
    assert codes == [1, -signal.SIGKILL]
    assert "Another process of this run has ended" in said
    assert "Traceback" not in said


def test_the_mean_loss_of_an_epoch_weighs_utterances():
    weight, losses = 0.0, []
    for _ in range(3):
        total = 0.0
        for batch in ranks.BATCHES:
            errors = [weight * x - 2 * x + 1 for x in batch]
            total += sum(e * e for e in errors)
            slope = sum(2 * e * x for e, x in zip(errors, batch, strict=True))
            weight -= 0.01 * slope / len(batch)
        losses.append(total / sum(map(len, ranks.BATCHES)))
    found = ranks.learn(0, 1)
    assert found[0] == pytest.approx(weight, rel=1e-5)
    assert found[1] == pytest.approx(losses, rel=1e-5)


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
def test_a_killed_rank_ends_all_and_the_run_goes_on(data, two, tmp_path):
    output = tmp_path / "out"
    often = ["--ckpt_interval_steps=1", "--ckpt_interval_minutes=0"]
    arguments = [*ALONE, *train(data, output, *often)[1:]]
    process = subprocess.Popen(
        arguments,
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
    done = run(arguments)
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
                *train(data, output)[1:],
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
