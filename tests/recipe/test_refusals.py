"""A mistake is one sentence, and nothing is written before it is found."""

import json
import shutil
import socket

import pytest
from corpus import make_corpus
from harness import (
    ROOT,
    assert_one_sentence,
    run,
    run_train,
    start,
    train_arguments,
)

from spkid.files import lock_folder


def contents(folder):
    return {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("unpacked") / "data")


CHOICES = [
    (["--valid_fraction", "0"], "valid_fraction=0 must lie in (0.0, 1.0)"),
    (["--valid_fraction=0.0"], "valid_fraction=0.0 must lie in (0.0, 1.0)"),
    (["--split", "sesion"], "split='sesion' must be session, folds, random or"),
    (["--window_hop", "900"], "window_hop=900 must be at most window_frames="),
    (["--fold", "9"], "fold=9 must be at most n_folds - 1=4"),
    (["--n_heads", "5"], "n_heads=5"),
    (["--sampler", "balancd"], "sampler='balancd' must be all or balanced"),
    (["--evaluation=crops"], "evaluation='crops' must be whole or windows"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    (["--eval_precision=fp16"], "--eval_precision fp16 needs a GPU"),
    (["--grad_accumulation_factor=0"], "grad_accumulation_factor=0 must lie"),
    (["--nonfinite_patience=-2"], "--nonfinite_patience=-2 must lie in [0, "),
    (["--test_only"], "there is no checkpoint to test; train first"),
    (["--device", "nonsense"], "--device nonsense: can't be used here"),
    (["--learning_rate=1"], "no key 'learning_rate'"),
    (["--drop_out=1"], "did you mean --dropout?"),
    (["--lr=1", "--lr=2"], "--lr is given twice"),
    (["--lr="], "--lr has no value; give one."),
    (["--n_speakers=3"], "--n_speakers is set by the data; remove it"),
    (["--batch_size=1"], "batch_size=1 must lie in [2, "),
    (["--embedding_size=0"], "embedding_size=0 must lie in [1, "),
]


@pytest.mark.parametrize(
    ("given", "words"), CHOICES, ids=[" ".join(given) for given, _ in CHOICES]
)
def test_wrong_choices_are_refused_before_the_data(
    unpacked, tmp_path, given, words
):
    """The data are there, but none is opened, and no pack is built."""
    output = tmp_path / "out"
    arguments = [
        str(ROOT / "hparams" / "conformer.yaml"),
        f"--data_folder={unpacked}",
        f"--output_folder={output}",
        f"--pack_folder={tmp_path / 'packs'}",
        *given,
    ]
    before = contents(unpacked)
    done = run("train", arguments, folder=tmp_path)
    assert_one_sentence(done, words)
    assert contents(unpacked) == before
    assert not list(tmp_path.iterdir())
    # Not even the data folder is looked at.
    arguments[1] = "--data_folder=/no/such"
    assert_one_sentence(run("train", arguments, folder=tmp_path), words)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first(content):
    return next(iter(content["speakers"].values()))[0]


DATA_MISTAKES = {
    "a missing folder": (shutil.rmtree, "no such folder"),
    "a corrupt feature file": (
        lambda d: (d / "uttr-1-1.pt").write_bytes(b"PK\x03\x04rubbish"),
        "uttr-1-1.pt: not a readable feature file",
    ),
    "a missing feature file": (
        lambda d: (d / "uttr-1-1.pt").unlink(),
        "uttr-1-1.pt: the feature file is missing",
    ),
    "a speaker that mapping.json lacks": (
        lambda d: edit(
            d / "metadata.json",
            lambda c: c["speakers"].update(id9=[]),
        ),
        "speaker 'id9' isn't in mapping.json",
    ),
    "a mel_len that lies": (
        lambda d: edit(
            d / "metadata.json", lambda c: first(c).update(mel_len=7)
        ),
        "'mel_len' in the JSON says 7",
    ),
    "half a JSON": (
        lambda d: (d / "testdata.json").write_text('{"n_mels": 40,'),
        "testdata.json: not valid JSON",
    ),
    "a path that climbs out": (
        lambda d: edit(
            d / "metadata.json",
            lambda c: first(c).update(feature_path="../x.pt"),
        ),
        "leaves the data folder",
    ),
}


@pytest.mark.parametrize("name", DATA_MISTAKES)
def test_a_mistake_in_the_data_costs_one_sentence(name, tmp_path):
    change, words = DATA_MISTAKES[name]
    data = make_corpus(tmp_path / "data")
    change(data)
    done = run_train(data, tmp_path / "out")
    assert_one_sentence(done, words)
    assert not list(tmp_path.glob("out/save/CKPT*")), "training had begun"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--seed=7", "started with seed=1986, not 7; resume with 1986, or"),
        ("--valid_fraction=0.5", "started with valid_fraction=0.1, not 0.5"),
        ("--kernel_size=7", "started with kernel_size=15, not 7"),
        ("--margin=0.5", "started with margin=0.2, not 0.5"),
        ("--precision=bf16", "started with precision=fp32, not bf16"),
        ("--pack=False", "started with pack=True, not False"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--test_only"]], ids=["", "test only"])
def test_a_run_resumes_only_with_its_settings(
    data, finished, option, words, more
):
    before = contents(finished[0])
    done = run_train(data, finished[0], option, *more)
    assert_one_sentence(done, "run.json: this run was", words)
    assert "give another --output_folder to start a new one" in done.stderr
    assert contents(finished[0]) == before, "nothing of the run is touched"


def test_scoring_may_change_only_where_nothing_is_trained(
    data, finished, tmp_path
):
    more = ["--evaluation=windows", "--window_frames=20", "--window_hop=10"]
    done = run_train(data, finished[0], *more)
    assert_one_sentence(done, "started with evaluation=whole, not windows")
    output = shutil.copytree(finished[0], tmp_path / "out")
    done = run_train(data, output, *more, "--test_only")
    assert done.returncode == 0, done.stderr


def test_an_object_changed_in_the_yaml_file_is_another_run(
    data, finished, tmp_path
):
    text = (ROOT / "hparams" / "conformer.yaml").read_text()
    assert "begin: 0.0" in text
    changed = tmp_path / "conformer.yaml"
    changed.write_text(text.replace("begin: 0.0", "begin: 0.1"))
    arguments = train_arguments(data, finished[0])
    done = run("train", [changed, *arguments[1:]])
    words = "started with another 'margin_schedule' in its YAML file"
    assert_one_sentence(done, words)


def test_other_data_are_another_run(data, finished, tmp_path):
    other = make_corpus(tmp_path / "other", seed=1)
    done = run_train(other, finished[0])
    assert_one_sentence(done, f"started with other data, from {data}")


def test_the_same_data_in_another_folder_are_the_same_run(
    data, finished, tmp_path
):
    moved = shutil.copytree(data, tmp_path / "moved")
    output = shutil.copytree(finished[0], tmp_path / "out")
    done = run_train(moved, output)
    assert done.returncode == 0, done.stderr


def test_test_only_without_a_checkpoint_is_refused(data, tmp_path):
    done = run_train(data, tmp_path / "out", "--test_only")
    assert_one_sentence(done, "there is no checkpoint to test")


@pytest.mark.parametrize(
    ("wrong", "words", "right"),
    [
        (
            ["--lr=1000", "--nonfinite_patience=0", "--max_grad_norm=0"],
            "in a row: start a run in another --output_folder with a lower",
            [],
        ),
        (
            ["--split=folds", "--n_folds=1000", "--fold=999"],
            "fold=999 holds nothing out",
            ["--split=folds", "--fold=1"],
        ),
    ],
    ids=["diverged", "an empty fold"],
)
def test_a_failed_start_does_not_bind_the_next_one(
    data, tmp_path, wrong, words, right
):
    output = tmp_path / "out"
    done = run_train(data, output, *wrong)
    assert_one_sentence(done, words)
    done = run_train(data, output, *right, "--number_of_epochs=1")
    assert done.returncode == 0, done.stderr
    assert (output / "results.json").exists()


def two_ranks(arguments):
    """How both processes of a run end."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place["WORLD_SIZE"] = "2"
    ranks = [
        start("train", arguments, environment={**place, **own})
        for own in ({"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1"))
    ]
    return [process.wait(60) for process in ranks]


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_all(data, tmp_path):
    """Whether it fails over the data, a lock, or what it can't write."""
    output = tmp_path / "out"
    broken = make_corpus(tmp_path / "broken")
    (broken / "uttr-1-1.pt").write_bytes(b"<html>404</html>")
    for done in two_ranks(train_arguments(broken, output)):
        assert_one_sentence(done, "uttr-1-1.pt")
    lock = lock_folder(output / "save")
    for done in two_ranks(train_arguments(data, output)):
        assert_one_sentence(done, "another process is using it")
    lock.release()
    (output / "hyperparams.yaml").mkdir()
    for done in two_ranks(train_arguments(data, output)):
        assert_one_sentence(done, "hyperparams.yaml: is no regular file")
