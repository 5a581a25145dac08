"""A YAML file and its overrides: every mistake is found before the data."""

import itertools
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.core import RunOptions

from spkid.errors import UserError
from spkid.hparams import Settings
from spkid.keys import (
    DECIDED_BY_DATA,
    FLAG,
    KEYS,
    NEEDED,
    OBJECT,
    OPTIONAL,
    TEXT,
    Range,
)
from spkid.run_options import check_run_options, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "hparams").glob("*.yaml"))
CONFORMER = ROOT / "hparams" / "conformer.yaml"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "rate: 0.1\nhalf: !ref <rate> / 2\n"
        "layer: !new:torch.nn.Linear\n    in_features: 2\n"
        "    out_features: 3\n"
        "folder: null\nfile: !ref <folder>/a.txt\n"
    )
    return path


# --- reading --------------------------------------------------------------


def test_plain_values_and_objects(file):
    settings = Settings(file, {"rate": "0.4"})
    assert settings.values["rate"] == 0.4
    assert settings.values["half"] == 0.2
    assert settings.values["layer"] is None
    assert settings.overrides == {"rate": 0.4}
    built = settings.build()
    assert built["layer"].out_features == 3
    assert built["half"] == 0.2
    assert settings.build(["rate"]) == {"rate": 0.4}


def test_an_override_may_be_a_value_of_python(file):
    settings = Settings(file).replace(rate=0.4)
    assert settings.values["half"] == 0.2
    assert settings.without("rate").values["half"] == 0.05
    assert settings.values["half"] == 0.2, "settings don't change"


def test_numbers_are_read_as_hyperpyyaml_reads_them(file):
    settings = Settings(file, {"rate": "1e-3"})
    assert settings.values["half"] == 5e-4
    assert settings.values["rate"] == settings.build()["rate"] == 1e-3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_built_is_what_hyperpyyaml_builds(path):
    with open(path) as file:
        theirs = load_hyperpyyaml(file, {"seed": 3})
    ours = Settings(path, {"seed": "3"}).build()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, str | int | float | None):
            assert ours[key] == value, key
        elif isinstance(value, torch.nn.Module):
            assert str(ours[key]) == str(value)
            pairs = zip(ours[key].parameters(), value.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), key


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rat": "1"}, "has no key 'rat' to override; did you mean --rate"),
        ({"xyz": "1"}, "has no key 'xyz' to override; see its keys"),
        ({"rate": "[1"}, "--rate=.1: not valid YAML"),
        ({"rate": "x"}, "--rate=x must be a number"),
        ({"rate": "true"}, "--rate=true must be a number"),
    ],
)
def test_a_wrong_override_is_named(file, overrides, words):
    with pytest.raises(UserError, match=words):
        Settings(file, overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !new:torch.nn.Linear\n    in_feature: 2", "in_feature"),
        ("a: !new:torch.nn.Liner", "Liner"),
        ("a: !new:no_such_module.Thing", "no_such_module"),
        ("a: !ref <bee>", "bee"),
        ("a: [", "not valid YAML"),
        ("- 1", "keys and values"),
        ("just words", "keys and values"),
        ("a: 1\na: 2", "duplicate"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        Settings(path).build()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\n\tb: 2\n", "not valid YAML"),
        (b"a: \x00\n", "not valid YAML"),
        (b"a: \xff\n", "isn't text in UTF-8; save it as UTF-8"),
        ("# caf\xe9".encode("latin-1"), "isn't text in UTF-8; save it"),
        ("a: 1".encode("utf-16"), "isn't text in UTF-8; save it"),
        (b"a: !ref <a>\n", "refers to itself"),
        (b"a: !ref <b>\nb: !ref <a>\n", "refers to itself"),
        (b"a: !include:a.yaml\n", "refers to itself"),
        (b"a: &z {b: 1}\n<<: *z\n", "isn't a name; write each key out"),
        (b"1: 2\n", "key '1' isn't a name|key 1 isn't a name"),
        (b"True: 2\n", "isn't a name; write each key out"),
        (b"# " + b"x" * 2**18, "bytes, more than 262,144"),
        (b"a: " + b"[" * 3000, "recursion"),
        (b"a: !include:none.yaml\n", r"none\.yaml: .* can't be read"),
        (b"a: !new:torch.nn.Linear [1, x]\n", r"a !new:torch\.nn\.Linear: "),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        Settings(path).check()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfrate: 0.1\n")
    assert Settings(tmp_path / "a.yaml").values == {"rate": 0.1}


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_number_must_be_finite(value):
    """Also of keys that only a model reads: each step would be skipped."""
    with pytest.raises(UserError, match=r"scale=.* must be finite"):
        Settings(CONFORMER, {"scale": value}).check()


def test_an_output_folder_must_be_utf_8():
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(UserError, match="isn't text in UTF-8; name another"):
        Settings(CONFORMER, {"output_folder": name})
    settings = Settings(CONFORMER, {"data_folder": name})
    assert settings.values["data_folder"] == name


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("2020-13-45", "--rate=2020-13-45: not valid YAML"),
        ("9" * 5000, "--rate=9+: not valid YAML"),
        ("!apply:os.getcwd", "not valid YAML"),
        ("yes", "--rate=yes must be a number"),
    ],
)
def test_an_override_that_yaml_refuses_is_blamed_alone(file, value, words):
    with pytest.raises(UserError, match=words):
        Settings(file, {"rate": value})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"b\.yaml: the hyperparameter file"):
        Settings(tmp_path / "b.yaml")


def test_a_folder_that_an_object_cannot_make_is_named(tmp_path):
    path, folder = tmp_path / "a.yaml", tmp_path / "file" / "save"
    path.write_text(
        "checkpointer: !new:spkid.training.AtomicCheckpointer\n"
        f"    checkpoints_dir: {folder}\n"
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="; name a folder, not a") as told:
        Settings(path).build()
    assert str(told.value).startswith(f"{folder}: Not a directory")
    path.write_text("port: !apply:socket.create_connection [[localhost, 1]]")
    with pytest.raises(UserError, match=r"a\.yaml: .*refused"):
        Settings(path).build()


def test_a_runs_own_settings_are_read_again(file, tmp_path):
    settings = Settings(file, {"rate": "0.4"})
    (tmp_path / "hyperparams.yaml").write_text(settings.text)
    again = Settings.of_run(tmp_path)
    assert again.values == settings.values
    assert again.fixed() == settings.fixed()
    (tmp_path / "hyperparams.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"hyperparams\.yaml: can't be read"):
        Settings.of_run(tmp_path)


# --- the command line -----------------------------------------------------

TEXTS = [
    "run #2",
    "a: b",
    "r<seed>x",
    "lr=0.1/a",
    "7",
    "1e3",
    "true",
    "[1",
    "!new:os.mkdir",
    "'quoted'",
    "*star",
    "<",
    "--",
    "ümläut",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["output_folder", "data_folder", "pack_folder"])
def test_a_folder_is_the_text_that_was_given(key, text):
    *_, overrides = parse_arguments([str(CONFORMER), f"--{key}={text}"])
    settings = Settings(CONFORMER, overrides)
    assert settings.values[key] == settings.build([key])[key] == text
    if key == "output_folder":
        assert settings.values["train_log"] == f"{text}/train_log.txt"


def test_null_means_nothing_where_nothing_is_usual():
    given = ["--data_folder=null", "--output_folder=null"]
    *_, overrides = parse_arguments([str(CONFORMER), *given])
    settings = Settings(CONFORMER, overrides)
    assert settings.values["data_folder"] is None
    assert settings.values["output_folder"] == "null"


@pytest.mark.parametrize("joint", ["=", " "])
def test_a_value_may_hold_an_equals_sign(joint):
    arguments = f"e=1.yaml --output_folder{joint}lr=0.1/a --device{joint}cpu"
    path, options, overrides = parse_arguments(arguments.split())
    assert path == options.param_file == "e=1.yaml"
    assert options.device == "cpu"
    assert overrides == {"output_folder": "lr=0.1/a"}


def test_the_last_key_of_the_options_is_speechbrains():
    arguments = ["a.yaml", "--precision=bf16", "--lr", "1e-3", "--debug"]
    path, options, overrides = parse_arguments(arguments)
    assert (path, overrides) == ("a.yaml", {"lr": "1e-3"})
    assert options.precision == "bf16"
    assert options.debug
    assert set(options.overridden_args) >= {"precision", "debug"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr=1", "--lr=2"], "--lr is given twice; keep one"),
        (["--lr", "1", "--lr=2"], "--lr is given twice; keep one"),
        (["--data_folder"], "--data_folder has no value; give one, or null."),
        (["--output_folder="], "--output_folder has no value; give one."),
        (["--data_folder=", "--lr=1"], "--data_folder has no value"),
        (["--data_folder", "--lr=1"], "--data_folder has no value"),
        (["lr=1"], "'lr=1' must be of the form --key=value"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        parse_arguments([str(CONFORMER), *arguments])


# --- checking -------------------------------------------------------------


def refused(path, **overrides):
    """The one sentence that refuses these values."""
    with pytest.raises(UserError) as caught:
        Settings(path, overrides).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_systems_own_values_pass(path):
    Settings(path).check()
    Settings(path).check(n_processes=2)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batch_size", "abc", "--batch_size=abc must be a whole number"),
        ("batch_size", "2.5", "must be a whole number"),
        ("batch_size", "true", "must be a whole number"),
        ("batch_size", "[1, 2]", "must be a whole number"),
        ("batch_size", "1", "batch_size=1 must lie in [2, "),
        ("lr", "x", "--lr=x must be a number"),
        ("lr", "null", "--lr=null must be a number"),
        ("lr", ".nan", "lr=nan must lie in"),
        ("lr", "-1", "lr=-1 must lie in"),
        ("lr", ".inf", "lr=inf must lie in"),
        ("valid_fraction", "2", "valid_fraction=2 must lie in (0.0, 1.0)"),
        ("number_of_epochs", "-1", "number_of_epochs=-1 must lie in"),
        ("number_of_epochs", "1.5", "must be a whole number"),
        ("seed", "-1", "seed=-1 must lie in"),
        ("num_workers", "-2", "num_workers=-2 must lie in"),
        ("average_checkpoints", "0", "average_checkpoints=0 must lie in"),
        ("use_tensorboard", "maybe", "must be True or False"),
        ("use_tensorboard", "1", "must be True or False"),
        ("dropout", "1.5", "dropout=1.5 must lie in"),
        ("d_model", "-4", "d_model=-4 must lie in"),
        ("n_heads", "5", "n_heads=5"),
        ("split", "sesion", "split='sesion' must be session, "),
        ("window_hop", "900", "window_hop=900 must be at most window_frames"),
        ("fold", "9", "fold=9 must be at most n_folds - 1=4"),
        ("n_speakers", "4", "--n_speakers is set by the data; remove it"),
        ("n_mels", "40", "--n_mels is set by the data; remove it"),
        ("normalization", "z", "normalization='z' must be"),
    ],
)
def test_a_wrong_value_is_one_sentence(key, value, words):
    assert words in refused(CONFORMER, **{key: value})


def wrong_values(allowed):
    """Values that a key of the table can't have."""
    if isinstance(allowed, Range):
        step = 1 if isinstance(allowed.low, int) else 1e-3
        yield from (allowed.low - step, allowed.high * 1.001 + step)
        yield from ("abc", True, None, math.nan, math.inf)
        if isinstance(allowed.low, int):
            yield allowed.low + 0.5
        if allowed.open:
            yield from (allowed.low, allowed.high)
    elif isinstance(allowed, tuple):
        yield from ("nonsense", None, 7, allowed[0].upper())
    elif allowed == FLAG:
        yield from ("nonsense", None, 7)
    elif allowed == TEXT:
        yield from (7, 1.5, True, ["a"], None)
    elif allowed == OPTIONAL:
        yield from (7, 1.5, True, ["a"])


@pytest.fixture(scope="module")
def tables():
    return {path: Settings(path) for path in FILES}


BOUNDED = [key for key, (allowed, _) in KEYS.items() if allowed != OBJECT]


@pytest.mark.parametrize("key", BOUNDED)
def test_each_key_of_the_table_refuses_what_it_cannot_be(tables, key):
    """In a file, where nothing has looked at the value's kind before."""
    found = [s for s in tables.values() if key in s.values]
    if not found:
        assert key in RunOptions().as_dict(), "no YAML file has this key"
        return
    before = found[0].values[key]
    for value in wrong_values(KEYS[key].allowed):
        found[0].values[key] = value
        try:
            with pytest.raises(UserError, match=f"{key}=") as caught:
                found[0].check()
        finally:
            found[0].values[key] = before
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{found[0].path}: {key}=")


def right_values(allowed):
    """The ends of what a key can be."""
    if isinstance(allowed, Range):
        if allowed.open:
            yield (allowed.low + allowed.high) / 2
        else:
            yield from (allowed.low, allowed.high)
    elif isinstance(allowed, tuple):
        yield from allowed
    elif allowed == FLAG:
        yield from (True, False)
    elif allowed == TEXT:
        yield from ("a", "7")
    elif allowed == OPTIONAL:
        yield from ("a", "7", None)


@pytest.mark.parametrize("key", BOUNDED)
def test_each_key_of_the_table_takes_its_extremes(tables, key, monkeypatch):
    """Whether they make sense together is for the objects to say."""
    having = [s for s in tables.values() if key in s.values]
    settings = having[0] if having else tables[CONFORMER]
    monkeypatch.setattr(settings, "build", dict.fromkeys)
    monkeypatch.setattr(settings, "_check_made", id)
    monkeypatch.setitem(settings.values, "fold", 0)
    for other in ("n_folds", "window_frames"):
        monkeypatch.setitem(settings.values, other, KEYS[other].allowed.high)
    for value in right_values(KEYS[key].allowed):
        if key != "fold" or value < KEYS["n_folds"].allowed.high:
            monkeypatch.setitem(settings.values, key, value)
            monkeypatch.setitem(settings.values, "window_hop", 1)
            settings.check()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_of_a_file_has_limits(tables, path):
    """But those that one object alone takes, and refuses itself."""
    own = {"scale", "margin", "max_grad_norm", "precision", *DECIDED_BY_DATA}
    for key, value in tables[path].values.items():
        if isinstance(value, int | float | str) and not key.startswith("__"):
            assert key in KEYS or key in own, key


def test_a_batch_is_shared_by_all_processes():
    Settings(CONFORMER, {"batch_size": 4}).check(n_processes=4)
    with pytest.raises(UserError, match="batch_size=4 must be at least 5"):
        Settings(CONFORMER, {"batch_size": 4}).check(n_processes=5)


def states():
    _, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), words.tolist(), rest, random.random


def test_a_check_writes_nothing_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = states(), random.getstate()
    Settings(CONFORMER, {"use_tensorboard": True, "seed": 7}).check()
    assert (states(), random.getstate()) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "nonsense"}, "--device nonsense: can't be used here"),
        ({"device": "cpu", "precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(options, words):
    with pytest.raises(UserError, match=words) as caught:
        check_run_options(RunOptions(**options))
    assert "\n" not in str(caught.value)
    check_run_options(RunOptions(device="cpu", precision="bf16"))


# --- what a run is --------------------------------------------------------


def test_what_a_resumed_run_may_change():
    first = Settings(CONFORMER).fixed()
    for key in ("data_folder", "output_folder", "num_workers", "checkpointer"):
        assert key not in first
    free = Settings(CONFORMER, {"num_workers": 2, "output_folder": "x"})
    assert free.fixed() == first
    other = Settings(CONFORMER, {"evaluation": "windows"})
    assert other.fixed() != first
    assert other.fixed(test_only=True) == Settings(CONFORMER).fixed(True)
    changed = Settings(CONFORMER, {"d_model": 96}).fixed()
    differing = {key for key in first if changed[key] != first[key]}
    assert "d_model" in differing
    assert changed["encoder"].startswith("yaml ")
    assert "lr_schedule" not in differing


def test_comments_change_nothing(tmp_path):
    text = CONFORMER.read_text()
    assert "\n# Evaluation." in text
    path = tmp_path / "conformer.yaml"
    path.write_text(text.replace("\n# Evaluation.", "\n# How to score."))
    assert Settings(path).fixed() == Settings(CONFORMER).fixed()


def test_asking_twice_gives_the_same():
    settings = Settings(CONFORMER)
    first = settings.fixed(True)
    settings.build(["encoder"])
    assert settings.fixed() == settings.fixed()
    assert settings.fixed(True) == first


def test_how_utterances_are_scored():
    first = Settings(CONFORMER).scoring()
    assert first["evaluation"] == "whole"
    assert Settings(CONFORMER, {"lr": 1.0}).scoring() == first
    assert Settings(CONFORMER, {"window_hop": 10}).scoring() != first


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_yaml_is_used(tables, path):
    """By train.py, the package, SpeechBrain's run options or the YAML; but
    compute_features is for recordings, in Python."""
    text = path.read_text()
    code = "".join(
        p.read_text()
        for folder in ("modules", "recipes")
        for p in (ROOT / folder).rglob("*.py")
        if p.name != "keys.py"
    )
    options = RunOptions().as_dict()
    for key in tables[path].values:
        used = (
            f"<{key}>" in text
            or f'"{key}"' in code
            or f"hparams.{key}" in code
            or key in options
            or key in ("__set_seed", "compute_features")
        )
        assert used, key


# --- a stranger's file ----------------------------------------------------

ATTACKS = {
    "apply": "!apply:os.mkdir [{place}]",
    "new": "!new:subprocess.Popen\n    args: [mkdir, {place}]",
    "name": "!name:os.mkdir\n    path: {place}",
    "python": "!!python/object/apply:os.mkdir [{place}]",
    "module": "!module:this",
    "copy": "!copy <other>",
    "include": "!include:{place}.yaml",
    "function of torch": "!apply:torch.save [1, {place}]",
    "no module of torch": "!new:torch.utils.data.DataLoader [[1]]",
}
LAYER = "!new:torch.nn.Linear\n    in_features: 2\n    out_features: {}\n"


@pytest.mark.parametrize(
    ("attack", "nested"),
    list(itertools.product(ATTACKS, [False, True])),
)
def test_a_strangers_yaml_runs_nothing(tmp_path, attack, nested):
    place = tmp_path / "ran"
    text = ATTACKS[attack].format(place=place)
    if nested:
        text = text.replace("\n", "\n      ")
        text = f"!new:torch.nn.Sequential\n    - {text}"
    path = tmp_path / "hyperparams.yaml"
    path.write_text(f"other: 1\nlayer: {LAYER.format(3)}key: {text}\n")
    with pytest.raises(UserError) as caught:
        Settings.of_run(tmp_path).build_modules(["layer", "key"])
    assert re.search(
        "isn't a torch module|isn't one of|can't be read", str(caught.value)
    )
    assert not place.exists()


def test_keys_that_nobody_asked_for_are_not_built(tmp_path):
    place = tmp_path / "ran"
    path = tmp_path / "hyperparams.yaml"
    path.write_text(
        f"__set_seed: !apply:os.mkdir [{place}]\n"
        f"key: !apply:os.mkdir [{place}]\nlayer: {LAYER.format(3)}"
    )
    state = torch.get_rng_state()
    made = Settings.of_run(tmp_path).build_modules(["layer"])
    assert made["layer"].out_features == 3
    assert list(made) == ["layer"]
    assert torch.equal(state, torch.get_rng_state())
    assert not place.exists()
    with pytest.raises(UserError, match="key 'encoder' is missing"):
        Settings.of_run(tmp_path).build_modules(["encoder"])


def changed(tmp_path, old, new):
    """A copy of conformer.yaml with another line."""
    text = CONFORMER.read_text()
    assert old in text
    path = tmp_path / "changed.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(tables, monkeypatch, key):
    settings = tables[CONFORMER]
    monkeypatch.delitem(settings.values, key)
    with pytest.raises(UserError, match=f"key '{key}' is missing; add it"):
        settings.check(needed=NEEDED)


@pytest.mark.parametrize("path", FILES)
def test_the_systems_have_all_keys_that_are_needed(path):
    Settings(path).check(needed=NEEDED)


def test_what_could_not_be_loaded_later_is_not_trained(tmp_path):
    old = "pooling: !new:spkid.models.AttentiveStatisticsPooling\n"
    apply = "pooling: !apply:spkid.models.AttentiveStatisticsPooling\n"
    with pytest.raises(UserError, match="!apply:spkid"):
        Settings(changed(tmp_path, old, apply)).check()


def test_the_name_of_a_torch_module_is_loaded(tmp_path):
    """As SpeechBrain's models take their activations."""
    (tmp_path / "hyperparams.yaml").write_text(
        "embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN\n"
        "    input_size: 40\n    activation: !name:torch.nn.LeakyReLU\n"
    )
    made = Settings.of_run(tmp_path).build_modules(["embedding_model"])
    kinds = {type(module) for module in made["embedding_model"].modules()}
    assert torch.nn.LeakyReLU in kinds


def test_a_range_says_a_numbers_kind_not_the_files_own_value(tmp_path):
    path = changed(tmp_path, "weight_decay: 0.01", "weight_decay: 0")
    settings = Settings(path, {"weight_decay": "0.1"})
    assert settings.values["weight_decay"] == 0.1


def test_only_a_pack_lies_on_a_device():
    with pytest.raises(UserError, match="pack_on_device=True needs pack=True"):
        Settings(CONFORMER, {"pack": "False", "pack_on_device": "True"}).check()


OBJECT_KEYS = (
    *("mean_var_norm", "preprocess", "label_encoder", "modules", "opt_class"),
    *("lr_schedule", "margin_schedule", "epoch_counter", "train_logger"),
    *("checkpointer", "classifier", "embedding_model", "tensorboard_logger"),
)


@pytest.mark.parametrize("key", [*OBJECT_KEYS, "encoder", "__set_seed"])
@pytest.mark.parametrize("value", ["1", "null", "{a: 1}"])
def test_an_object_is_no_override(key, value):
    words = f"--{key} can't be given here; change it in a copy of {CONFORMER}"
    with pytest.raises(UserError, match=words):
        Settings(CONFORMER, {key: value})


def with_key(tmp_path, key, value):
    """A copy of conformer.yaml in which a key holds something else."""
    text, n = re.subn(
        rf"^{key}:.*\n(?: .*\n)*",
        f"{key}: {value}\n",
        CONFORMER.read_text(),
        flags=re.M,
    )
    assert n == 1
    path = tmp_path / "changed.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("key", OBJECT_KEYS)
@pytest.mark.parametrize("value", ["1", "null", "x"])
def test_an_object_must_be_one(tmp_path, key, value):
    path = with_key(tmp_path, key, value)
    assert f"{path}: {key} must be an object" in refused(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("preprocess", "!new:fractions.Fraction [1]", "a torch module"),
        ("mean_var_norm", "!name:torch.nn.ReLU", "a torch module"),
        ("modules", "{a: 1}", "a mapping with the keys preprocess, "),
        ("lr_schedule", "!new:fractions.Fraction [1]", "callable"),
        ("margin_schedule", "!new:fractions.Fraction [1]", "callable"),
        ("opt_class", "!new:fractions.Fraction [1]", "callable"),
    ],
)
def test_an_object_must_be_of_its_kind(tmp_path, key, value, words):
    path = with_key(tmp_path, key, value)
    assert f"{path}: {key} must be {words}" in refused(path)
