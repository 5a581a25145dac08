"""Runs that are killed, or whose disk is full, at each kind of moment."""

import errno
import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path

import chaos
import pytest
import torch
from harness import (
    CAN_FORK,
    assert_one_sentence,
    results,
    run_train,
    same,
    weights,
)

from spkid.files import lock_folder

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="can't fork here")


def go(data, output, *more, **options):
    """A run with a checkpoint after each of its 7 batches an epoch."""
    often = ["--ckpt_interval_minutes=0", "--ckpt_interval_steps=1"]
    more = [*often, "--number_of_epochs=2", *more]
    return run_train(data, output, *more, **options)


# One run's fates, one after the other; counts are those of each process.
FATES = [
    ("step", 2, True),  # nothing is saved yet
    ("optimiser", 2, False),
    ("saving", 3, False),  # a checkpoint is there in part
    ("validation", 1, True),
    ("logging", 1, True),  # the epoch's end has no checkpoint yet
    ("deleting", 1, False),
    ("step", 1, True),  # the first of an epoch
    ("renaming", 3, False),  # a checkpoint is complete, but has no name yet
    ("logging", 1, False),
]


@pytest.mark.slow
def test_a_run_killed_at_every_edge_ends_in_the_same_bits(data, tmp_path):
    """In bfloat16, with groups of 3, 3 and 1 batches."""
    more = ["--precision=bf16", "--grad_accumulation_factor=3"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    done = go(data, calm, *more)
    assert done.returncode == 0, done.stderr
    ends = [go(data, killed, *more, fate=fate) for fate in FATES]
    assert [e.returncode for e in ends] == [-signal.SIGKILL] * len(FATES)
    done = go(data, killed, *more)
    assert done.returncode == 0, done.stderr
    assert same(weights(calm), weights(killed))
    assert chaos.log(killed) == chaos.log(calm)  # each epoch has one line


def test_two_runs_in_one_folder_are_refused(data, tmp_path):
    output = tmp_path / "out"
    lock = lock_folder(output)  # this process has it; train.py is another one
    done = go(data, output)
    assert_one_sentence(done, f"{output}: another process is using it")
    assert {path.name for path in output.iterdir()} <= {"lock", "packs"}
    lock.release()
    done = go(data, output)
    assert done.returncode == 0, done.stderr


def test_two_runs_with_one_save_folder_are_refused(data, calm, tmp_path):
    saved, output = tmp_path / "saved", tmp_path / "out"
    (saved / "saving+CKPT+save-000001").mkdir(parents=True)
    lock = lock_folder(saved)
    done = go(data, output, f"--save_folder={saved}")
    words = f"{saved}: another process is using it; wait until it ends, or "
    assert_one_sentence(done, words + "give another --save_folder.")
    assert len(list(saved.iterdir())) == 2, "what the other one saves is swept"
    lock.release()
    done = go(data, output, f"--save_folder={saved}")
    assert done.returncode == 0, done.stderr
    assert same(weights(calm), weights(output))


@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="under nohup"
)
def test_a_closed_connection_saves_and_the_run_resumes(data, calm, tmp_path):
    """The signal goes to the loaders' processes, too."""
    hang_up = functools.partial(killpg_own, signal.SIGHUP)
    more = ["--num_workers=2", "--ckpt_interval_steps=100"]
    fate = ("step", 3, False)
    done = go(data, tmp_path / "out", *more, fate=fate, do=hang_up)
    assert done.returncode == 129, done.stderr
    assert "command again to resume" in done.stdout + done.stderr
    assert len(list(tmp_path.glob("out/save/CKPT*"))) == 1
    done = go(data, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    assert same(weights(calm), weights(tmp_path / "out"))


def killpg_own(number):
    os.killpg(os.getpid(), number)


def test_other_features_are_another_run(data, tmp_path):
    """They have replaced the first ones between a kill and a resume."""
    copy, output = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    done = go(copy, output, fate=("step", 3, True))
    assert done.returncode == -signal.SIGKILL
    path = copy / "uttr-1-1.pt"
    torch.save(torch.load(path) + 0.5, path)
    done = go(copy, output)
    assert_one_sentence(done, f"started with other features, from {copy}")
    shutil.copy2(data / path.name, path)
    done = go(copy, output)
    assert done.returncode == 0, done.stderr


def test_a_damaged_checkpoint_is_not_tested(data, calm, tmp_path):
    output = shutil.copytree(calm, tmp_path / "out")
    *_, newest = sorted((output / "save").glob("CKPT*"))
    (newest / "counter.ckpt").write_text("")
    done = go(data, output, "--test_only")
    assert done.returncode == 0, done.stderr
    assert "counter.ckpt is damaged" in done.stdout + done.stderr
    assert results(output)["averaged_checkpoints"] == 1
    done = go(data, output)  # trains the epoch again
    assert done.returncode == 0, done.stderr
    assert same(weights(calm), weights(output))


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def no_more_space():
    torch.save = lambda *_, **__: no_space()


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_that_cannot_be_saved_ends_the_run(
    data, calm, tmp_path, epoch
):
    output = tmp_path / "out"
    done = go(data, output, fate=("logging", epoch, True), do=no_more_space)
    words = f"epoch {epoch} could not be saved (No space left on device)"
    assert_one_sentence(done, words, "free some space, and give the same")
    assert not (output / "results.json").exists()
    done = go(data, output)
    assert done.returncode == 0, done.stderr
    assert same(weights(calm), weights(output))


LEFT = [
    *("results.json", "submission.csv", "evaluation.npz", "speakers.txt"),
    *("report.html", "hyperparams.yaml", "run.json", "log.txt"),
    *("model/embedding_model.ckpt", "manifests/train.json"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT)
def test_what_can_not_be_written_costs_a_sentence(data, calm, tmp_path, name):
    """A folder stands in its place; without it, the same command ends well."""
    output = tmp_path / "out"
    (output / name / "x").mkdir(parents=True)
    (output / "split.json").touch()  # a run has been here
    (output / name).parent.joinpath("split.json").touch()
    packs = f"--pack_folder={data.parent / 'packs'}"
    done = go(data, output, packs, report=True)
    assert_one_sentence(done, name.rpartition("/")[2])
    shutil.rmtree(output / name)
    done = go(data, output, packs, report=True)
    assert done.returncode == 0, done.stderr
    assert same(weights(calm), weights(output))


@pytest.fixture
def disk(tmp_path):
    """A real file system of a few megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path):
    """Takes the last byte."""
    with open(place / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    """A run whose disk has room."""
    output = tmp_path_factory.mktemp("calm") / "out"
    done = go(data, output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fate", "words"),
    [
        (("saving", 20, False), "a checkpoint could not be saved ("),
        (("logging", 2, False), "train_log.txt: could not be written (No sp"),
        (("submission", 1, False), "submission.csv: could not be written (No"),
    ],
    ids=["checkpoint", "log", "submission"],
)
def test_a_full_disk_loses_nothing(data, calm, disk, fate, words):
    output, do = disk / "out", functools.partial(fill, disk)
    packs = f"--pack_folder={data.parent / 'packs'}"
    done = go(data, output, packs, fate=fate, do=do)
    said = done.stdout + done.stderr  # loggers may write to either
    assert words in said
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in said
    assert not (output / "results.json").exists()
    assert list((output / "save").glob("CKPT*"))
    (disk / "filler").unlink()
    done = go(data, output, packs)
    assert done.returncode == 0, done.stderr
    assert same(weights(calm), weights(output))
    assert chaos.log(output) == chaos.log(calm)


def test_a_run_goes_on_without_bad_files_and_lists_them(data, tmp_path):
    copy, output = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    (copy / "uttr-2-3.pt").write_bytes(b"<html>404</html>")
    (copy / "uttr-test-4.pt").unlink()
    done = go(copy, output)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert said.count("uttr-2-3.pt") == said.count("uttr-test-4.pt") == 1
    assert "2 problems" in said
    assert "Traceback" not in said
    assert not (output / "skipped.txt").exists()
    done = go(copy, output, "--on_bad_file=skip", "--max_bad_share=0.1")
    assert done.returncode == 0, done.stderr
    assert "skipped.txt: 2 unreadable files" in done.stdout
    listed = (output / "skipped.txt").read_text().splitlines()[1:]
    assert {line.split()[0] for line in listed} == {
        "uttr-2-3.pt",
        "uttr-test-4.pt",
    }
    rows = (output / "submission.csv").read_text().splitlines()[1:]
    assert len(rows) == 6
    assert rows[4].startswith("uttr-test-4.pt,id0")
    said = done.stdout + done.stderr
    assert "1 test utterances could not be read" in said
    manifests = [p.read_text() for p in (output / "manifests").iterdir()]
    assert not any("uttr-2-3.pt" in text for text in manifests)
