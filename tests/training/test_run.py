"""A run's folder: what it was started with, and who may use it."""

import json
from pathlib import Path

import pytest
from corpus import make_corpus
from speechbrain.core import RunOptions

from ml2022hw4_prepare import read_corpus
from spkid.errors import UserError
from spkid.evaluation import Expectation
from spkid.hparams import Settings
from spkid.training.run import RunFolder, check_identity, expectation_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_corpus(tmp_path_factory.mktemp("run") / "data")
    return read_corpus(folder)[0]


def make(folder, corpus, options=None, **overrides):
    path = ROOT / "hparams" / "conformer.yaml"
    overrides["output_folder"] = str(folder)
    options = options or RunOptions(device="cpu")
    return RunFolder(Settings(path, overrides), options, corpus)


def begin(folder, corpus, **overrides):
    """A run that has started; its process has ended."""
    run = make(folder, corpus, **overrides)
    run.save_settings()
    run.save_identity()
    (folder / "save" / "CKPT+1").mkdir(parents=True)


def test_another_identity_is_refused():
    path = Path("run.json")
    started = {"seed": 1, "data": "a", "data_folder": "x", "pooling": "yaml 0"}
    for change, words in (
        (
            {"seed": 2},
            "started with seed=1, not 2; resume with 1, or give another",
        ),
        ({"data": "b"}, "started with other data, from x; give another"),
        ({"pooling": "yaml 1"}, "started with another 'pooling' in its YAML"),
        ({"new": 3}, "started with new=None, not 3"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            check_identity(path, started, started | change)
        assert str(caught.value).startswith("run.json: this run was ")
        assert "--output_folder to start a new one" in str(caught.value)
    check_identity(path, started, started | {"data_folder": "y"})


def test_a_run_resumes_only_with_its_settings(tmp_path, corpus):
    begin(tmp_path, corpus)
    make(tmp_path, corpus)
    make(tmp_path, corpus, num_workers=2, final_fit=True)
    with pytest.raises(UserError, match="seed=1986, not 7; resume with 1986"):
        make(tmp_path, corpus, seed=7)
    with pytest.raises(UserError, match="evaluation=whole, not windows"):
        make(tmp_path, corpus, evaluation="windows")
    tests = RunOptions(device="cpu", test_only=True)
    make(tmp_path, corpus, tests, evaluation="windows")
    with pytest.raises(UserError, match="seed=1986, not 7"):
        make(tmp_path, corpus, tests, seed=7)


def test_what_has_no_checkpoint_was_not_started(tmp_path, corpus):
    run = make(tmp_path, corpus)
    run.save_identity()
    del run
    make(tmp_path, corpus, seed=7)
    (tmp_path / "save" / "saving+CKPT+1").mkdir(parents=True)
    make(tmp_path, corpus, seed=7)


def test_a_folder_has_one_run_at_a_time(tmp_path, corpus):
    run = make(tmp_path, corpus)
    with pytest.raises(UserError, match="another process is using it"):
        make(tmp_path, corpus)
    del run
    make(tmp_path, corpus)


def test_a_runs_settings_are_all_in_its_folder(tmp_path, corpus):
    make(tmp_path, corpus, seed=7).save_settings()
    again = Settings.of_run(tmp_path)
    assert again.values["seed"] == 7
    assert again.values["output_folder"] == str(tmp_path)
    text = (tmp_path / "hyperparams.yaml").read_text()
    assert str(ROOT / "hparams" / "conformer.yaml") in text


def test_a_damaged_identity_is_named(tmp_path, corpus):
    begin(tmp_path, corpus)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not valid JSON"):
        make(tmp_path, corpus)


def test_the_identity_is_readable(tmp_path, corpus):
    begin(tmp_path, corpus)
    identity = json.loads((tmp_path / "run.json").read_text())
    assert identity["seed"] == 1986
    assert identity["processes"] == 1
    assert identity["precision"] == "fp32"
    assert identity["data"] == corpus.digest()
    assert identity["encoder"].startswith("yaml ")


def test_the_estimate_says_its_interval():
    assert expectation_line(None) == ""
    line = expectation_line(Expectation(0.75, 0.7, 0.8))
    assert line == (
        "Estimated test accuracy (from confidence): 0.7500 (0.7000 to 0.8000)\n"
    )


def test_a_finished_run_is_not_overwritten_though_its_checkpoints_are_gone(
    tmp_path, corpus
):
    begin(tmp_path, corpus)
    (tmp_path / "save" / "CKPT+1").rmdir()
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"started with lr=0\.001, not"):
        make(tmp_path, corpus, lr=0.5)
