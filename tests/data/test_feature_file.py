"""A feature file is what it should be, or a problem; no code in it runs."""

import os

import numpy as np
import pytest
import torch
from corpus import features_of

from spkid.data import (
    FeatureFiles,
    Utterance,
    check_feature_files,
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
