"""Each option of SpeechBrain works, or is refused in a sentence."""

from dataclasses import fields, replace

import pytest
import torch
from speechbrain.core import RunOptions

from spkid.errors import UserError
from spkid.keys import KEYS
from spkid.run_options import (
    OPTIONS,
    Refused,
    check_run_options,
    parse_arguments,
)

OURS = {"param_file", "overridden_args"}  # what SpeechBrain keeps there itself
# For each option: what is allowed, and what isn't, and the words of its error.
# tests/recipe/test_commands.py trains with all that is allowed.
CASES = {
    "debug_batches": (["3"], ["0"], "must lie in [1, "),
    "debug_epochs": (["0", "1"], ["x"], "invalid int value: 'x'; see --help"),
    "device": (["cpu", "cpu:0"], ["meta", "cuda:99", "x"], "can't be used"),
    "distributed_backend": (["gloo"], ["foo"], "must be nccl, gloo or mpi"),
    "compile_mode": (["reduce-overhead"], ["x"], "must be default, "),
    "compile_module_keys": (["classifier"], ["x"], "must be preprocess, "),
    "precision": (["bf16"], ["int8", "fp16"], "p"),
    "eval_precision": (["bf16"], ["int8", "fp16"], "p"),
    "max_grad_norm": (["-1", "1"], ["nan", "inf"], "must lie in "),
    "nonfinite_patience": (["0"], ["-1"], "must lie in [0, "),
    "ckpt_interval_minutes": (["0", "9"], ["-1", "0.5"], "ckpt_interval_m"),
    "ckpt_interval_steps": (["0", "9"], ["x"], "invalid int"),
    "grad_accumulation_factor": (["2"], ["0"], "must lie in [1, "),
    "profile_warmup": (["0"], ["-1"], "must lie in [0, "),
    "profile_steps": (["1"], ["0"], "must lie in [1, "),
}
NO_OPTIONS = ["data_parallel_count", "distributed_launch", "tqdm_barcolor"]
REFUSED = [key for key, what in OPTIONS.items() if isinstance(what, Refused)]
FLAGS = [
    field.name
    for field in fields(RunOptions)
    if field.default is False and field.name not in REFUSED
]


def checked(*words):
    check_run_options(parse_arguments(["a.yaml", *words])[1])


@pytest.mark.parametrize("key", sorted(RunOptions().as_dict().keys() - OURS))
def test_somebody_has_decided_about_each_option(key):
    assert key in OPTIONS or key in KEYS
    assert key in CASES or key in REFUSED or key in FLAGS or key in NO_OPTIONS


@pytest.mark.parametrize("key", CASES)
def test_an_option_is_checked(key):
    allowed, wrong, words = CASES[key]
    for value in allowed:
        checked(f"--{key}", value)
    for value in wrong:
        with pytest.raises(UserError, match=key) as error:
            checked(f"--{key}", value)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", FLAGS)
def test_a_flag_is_a_flag(key, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    checked(f"--{key}")
    with pytest.raises(UserError, match="ignored explicit argument 'yes'"):
        checked(f"--{key}=yes")


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_work_is_refused_wherever_it_is_given(key):
    cure = OPTIONS[key].cure
    with pytest.raises(UserError, match=f"--{key} can't be used here: {cure}"):
        check_run_options(replace(RunOptions(), **{key: "x"}))
    with pytest.raises(UserError, match=f"--{key} can't be used here: {cure}"):
        check_run_options(RunOptions(), {key: "x"})
    default = getattr(RunOptions(), key)
    check_run_options(RunOptions(), {key: default})


def test_an_abbreviated_option_is_no_option():
    """SpeechBrain's parser takes it, and its Brain doesn't obey it."""
    _, options, given = parse_arguments(["a.yaml", "--prec=bf16"])
    assert options.precision == "fp32"
    assert given == {"prec": "bf16"}
    with pytest.raises(UserError, match="param_file; see --help"):
        parse_arguments([])


def test_two_intervals_exclude_each_other():
    values = {"ckpt_interval_minutes": 10}
    options = RunOptions.from_dictionary({"ckpt_interval_steps": 5})
    with pytest.raises(UserError, match="give --ckpt_interval_minutes 0 or"):
        check_run_options(options, values)
    cured = {"ckpt_interval_steps": 5, "ckpt_interval_minutes": 0}
    check_run_options(RunOptions.from_dictionary(cured), values)


def test_the_command_line_goes_before_the_file():
    options = RunOptions.from_dictionary({"precision": "fp32"})
    check_run_options(options, {"precision": "fp16"})
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        check_run_options(RunOptions(device="cpu"), {"precision": "fp16"})


def test_no_compiler_is_one_sentence(monkeypatch):
    def broken(function):
        raise RuntimeError("Failed to find C++ compiler.\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"--compile: .*\(Failed to find C\+\+"):
        check_run_options(RunOptions(compile=True))
