"""The command line: SpeechBrain's run options, and the YAML file's keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from speechbrain.core import RunOptions
from speechbrain.utils.distributed import infer_device

from spkid.errors import UserError, one_of
from spkid.keys import FLAG, HUGE, KEYS, OPTIONAL, Range

PRECISIONS = ("fp32", "fp16", "bf16")
MODULES = ("preprocess", "embedding_model", "classifier")  # that train.py reads


class Refused(NamedTuple):
    """An option that can't work with this recipe."""

    cure: str


ANY = None
JIT = Refused("TorchScript can't read the models; give --compile instead")
# What each option of SpeechBrain may be, if KEYS doesn't say it.
OPTIONS: dict[str, Range | tuple | str | Refused | None] = {
    "test_only": FLAG,
    "debug": FLAG,
    "debug_batches": Range(1, HUGE),
    "debug_epochs": Range(-HUGE, HUGE),  # 0 or less: all
    "debug_persistently": FLAG,
    "device": ANY,  # is tried
    "data_parallel_backend": Refused("start processes by torchrun"),
    "data_parallel_count": Refused("leave it out"),
    "distributed_backend": ("nccl", "gloo", "mpi"),
    "distributed_launch": Refused("start processes by torchrun"),
    "find_unused_parameters": FLAG,
    "jit": JIT,
    "jit_module_keys": JIT,
    "compile": FLAG,  # is tried
    "compile_module_keys": ANY,
    "compile_mode": ("default", "reduce-overhead", "max-autotune"),
    "compile_using_fullgraph": FLAG,
    "compile_using_dynamic_shape_tracing": FLAG,
    "precision": PRECISIONS,
    "eval_precision": PRECISIONS,
    "auto_mix_prec": Refused("give --precision fp16"),
    "bfloat16_mix_prec": Refused("give --precision bf16"),
    "max_grad_norm": Range(-1e9, 1e9),  # 0 or less: no clipping
    "skip_nonfinite_grads": FLAG,
    "noprogressbar": FLAG,
    "ckpt_interval_steps": Range(-HUGE, HUGE),  # 0 or less: none
    # A resumed run would train and log one more epoch each time.
    "optimizer_step_limit": Refused("give --number_of_epochs"),
    "tqdm_colored_bar": FLAG,
    "tqdm_barcolor": ANY,
    "remove_vector_weight_decay": FLAG,
    "profile_training": FLAG,
    "profile_warmup": Range(0, HUGE),
    "profile_steps": Range(1, HUGE),
    "log_config": Refused("log.txt of the output folder has all lines"),
}


class _Options(RunOptions):
    """SpeechBrain's options, which leaves the YAML file's keys as they are:
    its own takes them for YAML, where " #" begins a comment."""

    @staticmethod
    def _convert_to_yaml(overrides):
        return overrides

    @staticmethod
    def _create_parser():
        parser = RunOptions._create_parser()
        # SpeechBrain reads "--prec bf16", and then doesn't obey it.
        parser.allow_abbrev = False
        parser.error = _refuse
        return parser


def _refuse(message):
    raise UserError(f"{message}; see --help.")


def parse_arguments(
    arguments: list[str],
) -> tuple[str, RunOptions, dict[str, str]]:
    """As ``sb.parse_arguments``, but values are texts, whatever they hold.

    Arguments
    ---------
    arguments : list of str
        The command line without the script's name.

    Returns
    -------
    tuple
        The YAML file, SpeechBrain's options, and texts by the file's keys.

    Raises
    ------
    UserError
        If a key is given twice or without a value.

    Example
    -------
    >>> parse_arguments(["a.yaml", "--output_folder", "voices #2"])[2]
    {'output_folder': 'voices #2'}
    """
    path, options, rest = _Options.from_command_line_args(arguments)
    given: dict[str, str] = {}
    key = ""
    for word in rest:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            if key in given:
                raise UserError(f"--{key} is given twice; keep one.")
            given[key] = value
        elif not key:
            raise UserError(f"{word!r} must be of the form --key=value.")
        else:
            given[key] = f"{given[key]} {word}".lstrip()
    for key, value in given.items():
        if not value:
            optional = key in KEYS and KEYS[key].allowed == OPTIONAL
            null = ", or null" if optional else ""
            raise UserError(f"--{key} has no value; give one{null}.")
    return path, options, given


def check_run_options(
    options: RunOptions, values: Mapping[str, Any] | None = None
) -> None:
    """Raises UserError for an option that is out of range, can't work with
    this recipe, or asks for what this machine hasn't got.

    Arguments
    ---------
    options : speechbrain.core.RunOptions
        Of the command line.
    values : mapping, optional
        The YAML file's, in which options can be given, too.

    Example
    -------
    >>> check_run_options(RunOptions(device="cpu"))
    """
    default = RunOptions().as_dict()
    chosen = options.as_dict()
    for key, value in (values or {}).items():
        if key in chosen and key not in options.overridden_args:
            chosen[key] = value
    for key, value in chosen.items():
        if value != default[key]:
            _check(key, value)
    if chosen["ckpt_interval_steps"] > 0 < chosen["ckpt_interval_minutes"]:
        raise UserError(
            "--ckpt_interval_steps and --ckpt_interval_minutes exclude each "
            "other; give --ckpt_interval_minutes 0 or --ckpt_interval_steps 0."
        )
    device = str(chosen["device"] or infer_device())
    for key in ("precision", "eval_precision"):
        if device.startswith("cpu") and chosen[key] == "fp16":
            raise UserError(
                f"--{key} fp16 needs a GPU; give fp32 or bf16 on a CPU."
            )
    with _tried(f"--device {device}", "give another one, as cpu"):
        torch.zeros(1, device=device).item()
    if chosen["compile"]:
        with _tried("--compile", "install a C++ compiler, or leave it out"):
            torch.compile(torch.neg)(torch.zeros(1, device=device))


def _check(key: str, value: Any) -> None:
    """Raises UserError unless an option may have this value."""
    allowed = KEYS[key].allowed if key in KEYS else OPTIONS.get(key)
    if isinstance(allowed, Refused):
        raise UserError(f"--{key} can't be used here: {allowed.cure}.")
    if isinstance(allowed, Range):
        allowed.check(value, f"--{key}")
    elif isinstance(allowed, tuple):
        one_of(value, allowed, f"--{key}")
    elif allowed == FLAG:
        one_of(value, (True, False), f"--{key}")
    elif key == "compile_module_keys":
        for module in value:
            one_of(module, MODULES, f"--{key}")


@contextmanager
def _tried(option: str, cure: str) -> Iterator[None]:
    """Makes a sentence of whatever a backend says."""
    try:
        yield
    except Exception as error:  # each has its own
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{option}: can't be used here ({why}); {cure}."
        ) from None
