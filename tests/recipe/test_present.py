import json
import shutil

from corpus import make_corpus
from harness import assert_one_sentence, run_predict, run_train


def test_those_who_are_there_are_trained_on(tmp_path):
    """Also where the whole mapping.json comes with new test utterances."""
    data = make_corpus(tmp_path / "data")
    whole = shutil.copytree(data, tmp_path / "whole")
    content = json.loads((data / "metadata.json").read_text())
    for name in ("id00000", "id00002"):
        del content["speakers"][name]
    (data / "metadata.json").write_text(json.dumps(content))
    output = tmp_path / "out"
    done = run_train(data, output)
    assert_one_sentence(done, "give --speakers present")
    done = run_train(data, output, "--speakers=present")
    assert done.returncode == 0, done.stderr
    speakers = (output / "speakers.txt").read_text().splitlines()
    assert speakers == ["id00003", "id00001"]
    before = (output / "submission.csv").read_text()
    for more in ([], [f"--data_folder={whole}"]):
        done = run_predict(output, *more)
        assert done.returncode == 0, done.stderr
    for name in ("submission.csv", "submission-whole.csv"):
        assert (output / name).read_text() == before
