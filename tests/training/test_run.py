"""A run's folder: what it was started with, and who may use it."""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from corpus import make_corpus
from speechbrain.core import RunOptions

from ml2022hw4_prepare import read_corpus
from spkid.errors import UserError
from spkid.evaluation import Expectation
from spkid.files import lock_folder
from spkid.hparams import Settings
from spkid.training import AtomicCheckpointer
from spkid.training.run import (
    RunFolder,
    check_identity,
    check_start,
    debug_settings,
    expectation_line,
    readable_log_errors,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_corpus(tmp_path_factory.mktemp("run") / "data")
    return read_corpus(folder)[0]


class Features:
    """A pack that says what it holds."""

    content = "a"

    def digest(self):
        return self.content


def make(folder, corpus, options=None, **overrides):
    path = ROOT / "hparams" / "conformer.yaml"
    overrides["output_folder"] = str(folder)
    options = options or RunOptions(device="cpu")
    settings = Settings(path, overrides)
    return RunFolder(settings, options, corpus, Features())


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


FOLDERS = {
    "output_folder": "out",
    "save_folder": "deep/saves",
    "manifest_folder": "lists",
    "train_log": "logs/log.txt",
}


@pytest.mark.parametrize("key", FOLDERS)
@pytest.mark.parametrize("linked", [False, True])
def test_whatever_a_run_writes_to_it_owns(tmp_path, corpus, key, linked):
    """Another run may name the folder by another path."""
    theirs = {k: str(tmp_path / "a" / v) for k, v in FOLDERS.items()}
    ours = {k: str(tmp_path / "b" / v) for k, v in FOLDERS.items()}
    run = make(theirs.pop("output_folder"), corpus, **theirs)
    ours[key] = str(tmp_path / "a" / FOLDERS[key])
    if linked:
        (tmp_path / "link").symlink_to(tmp_path / "a")
        ours[key] = str(tmp_path / "link" / FOLDERS[key])
    output = ours.pop("output_folder")
    with pytest.raises(UserError, match="another process is using it") as e:
        make(output, corpus, **ours)
    assert f"or give another --{key}." in str(e.value)
    del run
    make(output, corpus, **ours)


def test_a_folder_inside_a_run_is_the_runs_own(tmp_path, corpus):
    run = make(tmp_path / "a", corpus)
    inner = str(tmp_path / "a" / "save")
    with pytest.raises(UserError, match="give another --save_folder"):
        make(tmp_path / "b", corpus, save_folder=inner)
    del run


def test_a_refused_run_has_touched_nothing(tmp_path, corpus):
    """Its checkpointer would sweep what the other one is saving."""
    (tmp_path / "a" / "save" / "saving+CKPT+1").mkdir(parents=True)
    lock = lock_folder(tmp_path / "a" / "save")
    with pytest.raises(UserError, match="another process is using it"):
        make(tmp_path / "a", corpus)
    assert (tmp_path / "a" / "save" / "saving+CKPT+1").exists()
    lock.release()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("output_folder", "submission.csv"),
        ("output_folder", "train.py"),
        ("output_folder", "model"),
        ("manifest_folder", "train.json"),
    ],
)
def test_files_of_the_users_own_are_not_written_over(
    tmp_path, corpus, key, name
):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    paths = {"output_folder": str(tmp_path / "out"), key: str(folder)}
    words = f"{name}: is there already, and no run has written it"
    with pytest.raises(UserError, match=words) as caught:
        make(paths["output_folder"], corpus, **paths)
    assert f"give another --{key}" in str(caught.value)
    assert [path.name for path in folder.iterdir()] == [name]
    (folder / name).rename(tmp_path / "away")
    make(paths["output_folder"], corpus, **paths)


def test_a_run_that_died_before_it_was_started_is_no_user(tmp_path, corpus):
    make(tmp_path, corpus)
    (tmp_path / "hyperparams.yaml").touch()
    (tmp_path / "log.txt").touch()
    (tmp_path / "manifests" / "split.json").touch()
    (tmp_path / "manifests" / "train.json").touch()
    make(tmp_path, corpus)


def test_a_split_that_was_deleted_is_made_again(tmp_path, corpus):
    begin(tmp_path, corpus)
    (tmp_path / "manifests" / "train.json").touch()
    make(tmp_path, corpus)


@pytest.mark.parametrize("name", ["results.json", "train.py"])
def test_a_lock_alone_makes_no_file_a_runs(tmp_path, corpus, name):
    """Another run's log may have locked the user's own folder."""
    make(tmp_path, corpus)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name}: is there already"):
        make(tmp_path, corpus)


@pytest.mark.parametrize("name", ["history.json", "log.txt", "save"])
def test_a_log_takes_no_other_files_place(tmp_path, name):
    (tmp_path / "save").mkdir()
    settings = settings_of(tmp_path, train_log=str(tmp_path / name))
    with pytest.raises(UserError, match=r"--train_log .* name another file"):
        check_start(settings, RunOptions())
    check_start(settings_of(tmp_path), RunOptions())
    elsewhere = str(tmp_path / "other" / "log.txt")
    check_start(settings_of(tmp_path, train_log=elsewhere), RunOptions())


def test_debug_and_test_only_exclude_each_other(tmp_path):
    begun = RunOptions(debug=True, test_only=True)
    with pytest.raises(UserError, match="give one"):
        check_start(settings_of(tmp_path), begun)


def test_checkpoints_of_another_run_are_not_resumed(tmp_path, corpus):
    """Neither where this run has a model of its own."""
    for name, seed in (("a", 1), ("b", 2)):
        begin(tmp_path / name, corpus, seed=seed)
        (tmp_path / name / "model").mkdir()
    saved = str(tmp_path / "a" / "save")
    with pytest.raises(UserError, match=r"save/run\.json.* seed=1, not 2"):
        make(tmp_path / "b", corpus, save_folder=saved, seed=2)


def test_checkpoints_of_an_unknown_run_are_not_resumed(tmp_path, corpus):
    begin(tmp_path / "a", corpus)
    (tmp_path / "a" / "save" / "run.json").unlink()
    saved = str(tmp_path / "a" / "save")
    with pytest.raises(UserError, match=r"run\.json.* give another --save"):
        make(tmp_path / "b", corpus, save_folder=saved)


def test_a_run_knows_its_features(tmp_path, corpus, monkeypatch):
    begin(tmp_path, corpus)
    make(tmp_path, corpus)
    monkeypatch.setattr(Features, "content", "b")
    words = f"started with other features, from {corpus.folder}"
    with pytest.raises(UserError, match=words):
        make(tmp_path, corpus)


def settings_of(folder, **overrides):
    path = ROOT / "hparams" / "conformer.yaml"
    return Settings(path, {"output_folder": str(folder), **overrides})


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_debug_run_deletes_only_what_it_made(tmp_path, there, fails):
    output, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "saving+CKPT+1").mkdir()
    given = {"save_folder": str(mine), "manifest_folder": str(mine)}
    if there:
        (output / "debug").mkdir(parents=True)
        (output / "debug" / "thesis.txt").touch()
    error = RuntimeError("a fault")
    with (
        pytest.raises(RuntimeError) if fails else nullcontext(),
        debug_settings(settings_of(output, **given)) as debugged,
    ):
        values = debugged.values
        place = Path(values["output_folder"])
        assert place.parent == output
        for key in FOLDERS:
            assert Path(values[key]).is_relative_to(place)
        AtomicCheckpointer(values["save_folder"]).save_checkpoint()
        if fails:
            raise error
    assert output.exists() == there
    assert not there or (output / "debug" / "thesis.txt").exists()
    assert not there or len(list(output.iterdir())) == 1
    assert [path.name for path in mine.iterdir()] == ["saving+CKPT+1"]


def test_tensorboard_is_looked_for_before_any_data(tmp_path, monkeypatch):
    check_start(settings_of(tmp_path, use_tensorboard=True), RunOptions())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    check_start(settings_of(tmp_path), RunOptions())
    with pytest.raises(UserError, match="pip install tensorboard, or give"):
        check_start(settings_of(tmp_path, use_tensorboard=True), RunOptions())


def test_a_bug_in_the_log_keeps_its_traceback(tmp_path):
    with (
        pytest.raises(ValueError, match="a bug"),
        readable_log_errors(tmp_path),
    ):
        raise ValueError("a bug")


def test_a_runs_settings_are_all_in_its_folder(tmp_path, corpus):
    make(tmp_path, corpus, seed=7).save_settings()
    again = Settings.of_run(tmp_path)
    assert again.values["seed"] == 7
    assert again.values["output_folder"] == str(tmp_path)
    text = (tmp_path / "hyperparams.yaml").read_text()
    assert str(ROOT / "hparams" / "conformer.yaml") in text


def test_a_damaged_identity_is_named(tmp_path, corpus):
    begin(tmp_path, corpus)
    (tmp_path / "save" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"save/run\.json: not valid JSON"):
        make(tmp_path, corpus)
    shutil.rmtree(tmp_path / "save")
    (tmp_path / "model").mkdir()
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
