"""The command line: SpeechBrain's run options, and the YAML file's keys."""

from __future__ import annotations

import torch
from speechbrain.core import RunOptions
from speechbrain.utils.distributed import infer_device

from spkid.errors import UserError
from spkid.keys import KEYS, Range


class _Options(RunOptions):
    """SpeechBrain's options, which leaves the YAML file's keys as they are:
    its own takes them for YAML, where " #" begins a comment."""

    @staticmethod
    def _convert_to_yaml(overrides):
        return overrides


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
            raise UserError(f"--{key} has no value; give one, or null.")
    return path, options, given


def check_run_options(options: RunOptions) -> None:
    """Raises UserError for an option that is out of range, and for a device or
    a precision that can't be used here.

    Example
    -------
    >>> check_run_options(RunOptions(device="cpu"))
    """
    device = options.device or infer_device()
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # each backend has its own
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"--device {device}: can't be used here ({why}); give "
            "another one, as cpu."
        ) from None
    for key in ("precision", "eval_precision"):
        if str(device).startswith("cpu") and getattr(options, key) == "fp16":
            raise UserError(
                f"--{key} fp16 needs a GPU; give fp32 or bf16 on a CPU."
            )
    for key in options.overridden_args:
        allowed = KEYS[key].allowed if key in KEYS else None
        if isinstance(allowed, Range):
            allowed.check(getattr(options, key), f"--{key}")
