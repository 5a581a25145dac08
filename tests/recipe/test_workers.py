"""A loader's worker that fails costs a sentence, whatever it fails of."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from harness import (
    ENVIRONMENT,
    ROOT,
    TIMEOUT,
    assert_one_sentence,
    run_train,
    same,
    train_arguments,
    weights,
)

pytestmark = pytest.mark.slow
SMALL = ["--batch_size=2", "--number_of_epochs=2"]  # 14 batches an epoch


def kill_the_workers():
    """As the kernel does where memory is short; most batches aren't read."""
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_workers_are_one_sentence_and_the_run_resumes(data, tmp_path):
    output, alone = tmp_path / "out", tmp_path / "alone"
    fate, more = ("step", 15, False), [*SMALL, "--num_workers=2"]
    done = run_train(data, output, *more, fate=fate, do=kill_the_workers)
    assert_one_sentence(done, "--num_workers")
    assert list(output.glob("save/CKPT*"))
    for folder, given in ((output, more), (alone, SMALL)):
        done = run_train(data, folder, *given)
        assert done.returncode == 0, done.stderr
    assert same(weights(alone), weights(output))


def train_with_shared_memory(size, arguments):
    """Training in a container whose /dev/shm has this many bytes."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    container = ["unshare", "--mount", "sh", "-c"]
    tried = [*container, mount]
    try:
        subprocess.run(tried, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespace can be made here: {error}")
    return subprocess.run(
        [
            *[*container, f'{mount} && exec "$@"', "sh"],
            *[sys.executable, "train.py", *arguments],
        ],
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def test_batches_need_no_shared_memory(data, tmp_path):
    """One batch is larger than it."""
    big = ["--batch_size=28", "--segment_frames=60", "--number_of_epochs=1"]
    output = tmp_path / "out"
    arguments = train_arguments(data, output, *big, "--num_workers=2")
    done = train_with_shared_memory(200 * 1024, arguments)
    assert done.returncode == 0, done.stderr
    done = run_train(data, tmp_path / "alone", *big)
    assert same(weights(output), weights(tmp_path / "alone"))


def test_no_shared_memory_at_all_names_the_cure_which_helps(data, tmp_path):
    output, size = tmp_path / "out", 8 * 1024
    short = "--number_of_epochs=1"
    arguments = train_arguments(data, output, short, "--num_workers=2")
    done = train_with_shared_memory(size, arguments)
    assert_one_sentence(done, "No space left on device", "give --num_workers 0")
    arguments = train_arguments(data, output, short, "--num_workers=0")
    done = train_with_shared_memory(size, arguments)
    assert done.returncode == 0, done.stderr
