"""Mistakes in a YAML file or on the command line."""

import pytest

from spkid.errors import UserError
from spkid.hparams import load_hparams, plain_values


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
