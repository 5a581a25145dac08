"""Mistakes in a YAML file or on the command line."""

from pathlib import Path

import pytest

import prepare
from ml2022hw4_prepare import LIMITS
from spkid.errors import UserError, run_command
from spkid.hparams import (
    check_values,
    load_hparams,
    parse_arguments,
    plain_values,
)

HPARAMS = Path(__file__).resolve().parents[1] / "hparams"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "rate: 0.1\nhalf: !ref <rate> / 2\n"
        "layer: !new:torch.nn.Linear\n    in_features: 2\n"
        "    out_features: 3\n"
    )
    return path


def test_plain_values_and_objects(file):
    assert plain_values(file, "rate: 0.4") == {
        "rate": 0.4,
        "half": 0.2,
        "layer": None,
    }
    assert plain_values(file, "rate: 0.4", only_given=True) == {"rate": 0.4}
    assert load_hparams(file, "rate: 0.4")["layer"].out_features == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("rat: 1", "has no key 'rat' to override; did you mean --rate"),
        ("xyz: 1", "has no key 'xyz' to override; see its keys"),
        ("rate: 1\nrate: 2", "--rate is given twice"),
        ("rate", "isn't of the form --key=value"),
        ("rate: [1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(file, overrides, words):
    with pytest.raises(UserError, match=words):
        load_hparams(file, overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !new:torch.nn.Linear\n    in_feature: 2", "in_feature"),
        ("a: !new:torch.nn.Liner", "Liner"),
        ("a: !new:no_such_module.Thing", "no_such_module"),
        ("a: !ref <bee>", "bee"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_hparams(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"b\.yaml: the hyperparameter file"):
        plain_values(tmp_path / "b.yaml")


def test_numbers_are_read_as_hyperpyyaml_reads_them(file):
    assert plain_values(file, "rate: 1e-3")["half"] == 5e-4
    assert plain_values(file, "rate: 1e-3")["rate"] == 1e-3
    assert load_hparams(file, "rate: 1e-3")["rate"] == 1e-3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size: abc", "--batch_size=abc must be a whole number"),
        ("batch_size: 2.5", "must be a whole number"),
        ("batch_size: true", "must be a whole number"),
        ("batch_size: [1, 2]", "must be a whole number"),
        ("batch_size: 1", r"batch_size=1 isn't in \[2, "),
        ("lr: x", "--lr=x must be a number"),
        ("lr:", "--lr has no value; give one"),
        ("lr: null", "--lr=None must be a number"),
        ("lr: .nan", "lr=nan isn't in"),
        ("lr: -1", "lr=-1 isn't in"),
        ("valid_fraction: 2", r"valid_fraction=2 isn't in \[0.0, 1.0\]"),
        ("number_of_epochs: -1", "number_of_epochs=-1 isn't in"),
        ("number_of_epochs: 1.5", "must be a whole number"),
        ("seed: -1", "seed=-1 isn't in"),
        ("num_workers: -2", "num_workers=-2 isn't in"),
        ("average_checkpoints: 0", "average_checkpoints=0 isn't in"),
        ("use_tensorboard: maybe", "must be True or False"),
        ("dropout: 1.5", "dropout=1.5 isn't in"),
        ("d_model: -4", "d_model=-4 isn't in"),
        ("data_folder: 7", "data_folder=7 is no path; write ./7"),
        ("output_folder: 2024", "output_folder=2024 is no path"),
    ],
)
def test_a_wrong_value_costs_one_sentence(override, words):
    path = HPARAMS / "conformer.yaml"
    with pytest.raises(UserError, match=words) as caught:
        check_values(path, plain_values(path, override), LIMITS)
    assert "\n" not in str(caught.value)


def test_values_are_checked_before_the_data_are_read():
    with pytest.raises(UserError, match="lr=-1 isn't in"):
        prepare.resolve_data(HPARAMS / "ecapa.yaml", "lr: -1")


@pytest.mark.parametrize("path", sorted(HPARAMS.glob("*.yaml")))
def test_the_systems_own_values_pass(path):
    check_values(path, plain_values(path), LIMITS)


def test_a_key_without_a_value_is_no_default(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data_folder: null\nlr: 0.1")
    for arguments in (["--data_folder"], ["--data_folder=", "--lr=1"]):
        *_, overrides = parse_arguments([str(path), *arguments])
        with pytest.raises(UserError, match="--data_folder has no value"):
            plain_values(path, overrides)
    assert plain_values(path, "data_folder: null")["data_folder"] is None


def test_a_folder_that_is_forbidden_costs_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: (tmp_path / "file" / "out").mkdir())
    said = str(ended.value.code)
    assert said.startswith(f"Error: {tmp_path / 'file' / 'out'}: Not a dir")
    assert "name another folder" in said


def test_a_folder_that_an_object_cannot_make_is_named(tmp_path):
    path, folder = tmp_path / "a.yaml", tmp_path / "file" / "save"
    path.write_text(
        "checkpointer: !new:spkid.training.checkpoints.AtomicCheckpointer\n"
        f"    checkpoints_dir: {folder}\n"
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="; name another one") as told:
        load_hparams(path)
    assert str(told.value).startswith(f"{folder}: Not a directory")
    path.write_text("port: !apply:socket.create_connection [[localhost, 1]]")
    with pytest.raises(UserError, match=r"a\.yaml: .*refused"):
        load_hparams(path)


@pytest.mark.parametrize("joint", ["=", " "])
def test_a_value_may_hold_an_equals_sign(joint):
    arguments = f"e=1.yaml --output_folder{joint}lr=0.1/a --device{joint}cpu"
    path, options, overrides = parse_arguments(arguments.split())
    assert path == options.param_file == "e=1.yaml"
    assert options.device == "cpu"
    assert overrides == "output_folder: lr=0.1/a"
