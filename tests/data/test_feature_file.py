"""A feature file is what it should be, or a problem; no code in it runs."""

import errno
import io
import os
import pickle

import numpy as np
import pytest
import torch
from corpus import features_of

from spkid.data import (
    FeatureFiles,
    Utterance,
    check_feature_files,
    feature_file,
    load_feature_file,
)
from spkid.errors import DataError, Problem

BAD = {
    "NaN": (torch.full((5, 40), float("nan")), "NaN or infinite"),
    "infinite": (torch.full((5, 40), float("inf")), "NaN or infinite"),
    "bands": (torch.zeros(5, 39), "not (frames, n_mels=40)"),
    "dimensions": (torch.zeros(200), "not (frames, n_mels=40)"),
    "integers": (torch.zeros(5, 40, dtype=torch.int64), "no float tensor"),
    "list": ([1, 2], "no float tensor"),
    "length": (torch.zeros(6, 40), "'mel_len' in the JSON says 5"),
    "empty": (torch.zeros(0, 40), "has 0 frames"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_problem_wherever_it_is_read(files, tmp_path, what):
    content, words = BAD[what]
    torch.save(content, files[0] / "0.pt")
    with pytest.raises(DataError) as caught:
        load_feature_file(files[0], "0.pt", 40, 5)
    (problem,) = caught.value.problems
    assert (problem.file, problem.entry) == ("0.pt", "")
    assert words in problem.what and problem.cure
    assert str(caught.value) == problem.sentence(files[0])
    utterances = [Utterance(name, len(m)) for name, m in files[1].items()]
    assert check_feature_files(files[0], utterances, 40) == [problem]
    assert features_of(files, tmp_path)[1] == [problem]


def test_a_missing_file_is_a_problem(tmp_path):
    (problem,) = check_feature_files(tmp_path, [Utterance("a.pt", 5)], 40)
    assert problem == Problem(
        "a.pt", "", "the feature file is missing", "make or download it again"
    )


def test_values_beyond_half_precision_are_a_problem_of_half_packs(
    files, tmp_path
):
    torch.save(torch.full((5, 40), -7e4), files[0] / "0.pt")
    for _ in range(2):  # the second time, the pack is there
        (problem,) = features_of(files, tmp_path)[1]
        assert problem.what == "has values beyond float16"
        assert "--pack_dtype float32" in problem.cure
    pack, problems = features_of(files, tmp_path, dtype="float32")
    assert not problems
    assert (pack.frames(0) == -7e4).all()


RANDOM = np.random.default_rng(0)


def of_numpy(save):
    file = io.BytesIO()
    save(file, RANDOM.random((5, 40), dtype=np.float32))
    return file.getvalue()


def of_torch(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


NUMPY_CURE = "save it with torch.save(torch.from_numpy(x), path)"
OTHERS = {
    "npy": (of_numpy(np.save), "a NumPy array", NUMPY_CURE),
    "npz": (of_numpy(np.savez), "a NumPy archive", NUMPY_CURE),
    "deflated npz": (
        of_numpy(np.savez_compressed),
        "a NumPy archive",
        NUMPY_CURE,
    ),
    "saved array": (of_torch(np.zeros((5, 40))), "a NumPy array", NUMPY_CURE),
    "pickle": (pickle.dumps([1.0]), "a pickle", "with torch.save"),
    "old pickle": (pickle.dumps([1.0], 2), "a pickle", "with torch.save"),
    "module": (of_torch(torch.nn.Linear(2, 3)), "no float", "one float tensor"),
    "state": (
        of_torch(torch.nn.Linear(2, 3).state_dict()),
        "no float",
        "one float tensor",
    ),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt ", "a recording", "log-mel"),
    "flac": (b"fLaC\0\0\0\x22", "a recording", "log-mel"),
    "mp3": (b"ID3\x04\0", "a recording", "log-mel"),
    "page": (b"\n<!DOCTYPE html><html>", "a web page", "download the file"),
    "pointer": (b"version https://git-lfs.github.com", "a Git LFS", "git lfs"),
    "gzip": (b"\x1f\x8b\x08\0", "compressed", "unpack it"),
    "json": (b'{"a": 1}', "a JSON file", "with torch.save"),
    "empty": (b"", "it is empty", "make or download it again"),
    "cut off": (of_torch(torch.zeros(5, 40))[:-99], "cut off", "again"),
    "noise": (RANDOM.bytes(999), "damaged", "again"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_file_is_instead_is_said(tmp_path, what):
    content, words, cure = OTHERS[what]
    (tmp_path / "a.pt").write_bytes(content)
    (problem,) = check_feature_files(tmp_path, [Utterance("a.pt", 5)], 40)
    assert words in problem.what and cure in problem.cure
    assert ("again" in problem.cure) == (cure.endswith("again"))


def test_what_the_advice_for_an_array_gives_is_read(tmp_path):
    x = np.ones((5, 40), dtype=np.float64)
    torch.save(torch.from_numpy(x), tmp_path / "a.pt")
    assert (load_feature_file(tmp_path, "a.pt", 40, 5) == 1).all()


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder"])
def test_only_regular_files_are_read(tmp_path, name):
    """Opening a pipe would wait for ever, a device would never end."""
    path = tmp_path / "a.pt"
    if name == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes here")
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    else:
        path.symlink_to(name)
    (problem,) = check_feature_files(tmp_path, [Utterance("a.pt", 5)], 40)
    assert problem.what.startswith("not a readable feature file (")
    assert problem.cure == "put the file itself there"


def test_a_file_that_may_not_be_read_is_not_to_be_made_again(
    tmp_path, monkeypatch
):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(feature_file, "open_regular", refuse)
    (problem,) = check_feature_files(tmp_path, [Utterance("a.pt", 5)], 40)
    assert "Permission denied" in problem.what
    assert problem.cure.startswith("change its permissions")


def test_a_giant_is_refused_unread(tmp_path):
    with open(tmp_path / "a.pt", "wb") as file:
        file.truncate(2**35)
    (problem,) = check_feature_files(tmp_path, [Utterance("a.pt", 5)], 40)
    assert "too many for 5 frames" in problem.what


def test_the_digest_of_files_is_that_of_their_bytes(files):
    folder, mels = files
    utterances = [Utterance(name, len(mel)) for name, mel in mels.items()]
    first = FeatureFiles(folder, utterances, 40).digest()
    assert len(first) == 32
    assert FeatureFiles(folder, utterances, 40).digest() == first
    assert FeatureFiles(folder, utterances[::-1], 40).digest() != first
    torch.save(mels["3.pt"] + 1, folder / "3.pt")
    assert FeatureFiles(folder, utterances, 40).digest() != first
    (folder / "3.pt").unlink()
    with pytest.raises(DataError, match=r"3\.pt: can't be read \(No such file"):
        FeatureFiles(folder, utterances, 40).digest()


class Canary:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_feature_file_runs(files, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"x": Canary(canary)}, files[0] / "0.pt")
    (problem,) = features_of(files, tmp_path)[1]
    assert problem.what.startswith("not a readable feature file (")
    assert not canary.exists()
    torch.load(files[0] / "0.pt", weights_only=False)
    assert canary.exists(), "the canary itself must work"


def test_files_and_a_pack_of_full_precision_give_the_same(files, tmp_path):
    folder, mels = files
    pack, _ = features_of(files, tmp_path, dtype="float32")
    utterances = [Utterance(name, len(mel)) for name, mel in mels.items()]
    direct = FeatureFiles(folder, utterances, n_mels=40)
    assert direct.paths == pack.paths
    assert direct.row == pack.row
    assert direct.n_mels == pack.n_mels == 40
    assert np.array_equal(direct.lengths, pack.lengths)
    rows, starts, counts = [3, 0, 6, 3], [0, 2, 4, 1], [8, 3, 1, 2]
    for one, other in zip(
        direct.batch(rows, starts, counts),
        pack.batch(rows, starts, counts),
        strict=True,
    ):
        assert torch.equal(one, other)
    for row in range(7):
        assert np.array_equal(direct.frames(row, 1, 3), pack.frames(row, 1, 3))
        assert torch.equal(direct.statistics(row), pack.statistics(row))


@pytest.mark.parametrize("value", [1e13, -1e15, 3e38])
def test_values_that_no_log_mel_has_are_refused(files, tmp_path, value):
    """Their squares would be infinite; and no dtype is a cure."""
    torch.save(torch.full((5, 40), value), files[0] / "0.pt")
    for dtype in ("float16", "float32"):
        (problem,) = features_of(files, tmp_path, dtype=dtype)[1]
        assert problem.what == "has values beyond 1e+12, which no log-mel has"
        assert problem.cure == "make or download it again"
