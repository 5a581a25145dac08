"""Runs that are killed, or whose disk is full, at each kind of moment.

Each is a forked process, which spares the imports: train.py with one function
that kills it, or fills its disk, at a chosen call.
"""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
import speechbrain as sb
import torch
import torch._dynamo  # else each process imports it, by its first optimiser
from corpus import make_corpus
from test_recipe import ROOT, TINY, same, weights

import results
import train
from spkid.errors import run_command
from spkid.files import lock_folder

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="forking is for Linux"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


def go(data, output, *more, fate=None, do=chaos.die):
    """train.py in a process of its own: its exit code and what it said."""
    arguments = [
        str(ROOT / "hparams" / "conformer.yaml"),
        f"--data_folder={data}",
        f"--output_folder={output}",
        f"--pack_folder={data.parent}/packs",
        *TINY,
        "--batch_size=4",  # 7 batches an epoch
        "--ckpt_interval_minutes=0",
        "--ckpt_interval_steps=1",
        "--noprogressbar",
        "--number_of_epochs=2",
        *more,
    ]
    said = data.parent / "said.txt"

    def child():
        os.setsid()
        with open(said, "w") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), line_buffering=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb"), line_buffering=True)
        torch.set_num_threads(1)
        sb.core.get_environment_description = str  # asks pip, for a second
        sys.argv = ["train.py", *arguments]
        if fate:
            chaos.at(*fate[:2], do, after=fate[2])
        run_command(train.main)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    return process.exitcode, said.read_text()


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


def test_a_run_killed_at_every_edge_ends_in_the_same_bits(data, tmp_path):
    """In bfloat16, with groups of 3, 3 and 1 batches."""
    more = ["--precision=bf16", "--grad_accumulation_factor=3"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    code, said = go(data, calm, *more)
    assert code == 0, said
    codes = [go(data, killed, *more, fate=fate)[0] for fate in FATES]
    assert codes == [-signal.SIGKILL] * len(FATES)
    code, said = go(data, killed, *more)
    assert code == 0, said
    assert same(weights(calm), weights(killed))
    assert chaos.log(killed) == chaos.log(calm)  # each epoch has one line


def test_two_runs_in_one_folder_are_refused(data, tmp_path):
    output = tmp_path / "out"
    lock_folder(output)  # this process has it, and train.py is another one
    code, said = go(data, output)
    assert code == 1
    assert f"{output}: another process is at work in it; wait until" in said
    assert "Traceback" not in said
    assert [path.name for path in output.iterdir()] == ["lock"]
    code, said = go(data, tmp_path / "other")
    assert code == 0, said


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
    code, said = go(data, output)
    assert code == 0, said
    return output


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        (("saving", 20, False), "a checkpoint could not be saved"),
        (("logging", 2, False), "train_log.txt: could not be written"),
        (("submission", 1, False), "submission.csv: could not be written"),
    ],
    ids=["checkpoint", "log", "submission"],
)
def test_a_full_disk_loses_nothing(data, calm, disk, monkeypatch, fate, words):
    place = results, "write_submission"
    monkeypatch.setitem(chaos.ACTS, "submission", place)
    output = disk / "out"
    code, said = go(data, output, fate=fate, do=lambda: fill(disk))
    assert words in said
    assert "No space left" in said
    assert code == 1
    assert said.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in said
    assert not (output / "results.json").exists()
    assert list((output / "save").glob("CKPT*"))
    (disk / "filler").unlink()
    code, said = go(data, output)
    assert code == 0, said
    assert same(weights(calm), weights(output))
    assert chaos.log(output) == chaos.log(calm)


def test_a_run_goes_on_without_bad_files_and_lists_them(data, tmp_path):
    copy, output = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    (copy / "uttr-2-3.pt").write_bytes(b"<html>404</html>")
    (copy / "uttr-test-4.pt").unlink()
    code, said = go(copy, output)
    assert code == 1
    assert said.count("uttr-2-3.pt") == said.count("uttr-test-4.pt") == 1
    assert "2 problems" in said
    assert not (output / "skipped.txt").exists()
    code, said = go(copy, output, "--on_bad_file=skip", "--max_bad_share=0.1")
    assert code == 0, said
    assert "skipped.txt: 2 bad files" in said
    listed = (output / "skipped.txt").read_text().splitlines()[1:]
    assert {line.split()[0] for line in listed} == {
        "uttr-2-3.pt",
        "uttr-test-4.pt",
    }
    rows = (output / "submission.csv").read_text().splitlines()[1:]
    assert len(rows) == 6
    assert rows[4].startswith("uttr-test-4.pt,id0")
    assert "1 test utterances could not be read" in said
    manifests = [p.read_text() for p in (output / "manifests").iterdir()]
    assert not any("uttr-2-3.pt" in text for text in manifests)
