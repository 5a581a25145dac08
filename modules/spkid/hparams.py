"""Reading a HyperPyYAML file so that mistakes in it cost one sentence."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import speechbrain as sb
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.core import RunOptions

from spkid.errors import FULL, UserError


class _PlainLoader(yaml.SafeLoader):
    """Reads scalars and lists; whatever has a tag becomes None."""


_PlainLoader.add_multi_constructor("!", lambda loader, tag, node: None)
# HyperPyYAML reads YAML 1.2, where 1e-3 is a number; PyYAML reads 1.1.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}
EQUALS = "\ue000"  # no character of any script


def parse_arguments(arguments: list[str]) -> tuple[str, RunOptions, str]:
    """``sb.parse_arguments``, where a value may hold a "=": by itself it
    makes a space of it, so that results went to another folder.

    Arguments
    ---------
    arguments : list
        The command line without the script's name.

    Returns
    -------
    tuple
        The YAML file, SpeechBrain's options, and the overrides as YAML text.

    Example
    -------
    >>> parse_arguments(["a.yaml", "--output_folder", "runs/lr=0.1"])[2]
    'output_folder: runs/lr=0.1'
    """
    safe = []
    for argument in arguments:
        key, equals, value = "", "", argument
        if argument.startswith("--"):
            key, equals, value = argument.partition("=")
        safe.append(key + equals + value.replace("=", EQUALS))
    path, options, overrides = sb.parse_arguments(safe)
    path, overrides = (x.replace(EQUALS, "=") for x in (path, overrides))
    return path, replace(options, param_file=path), overrides


def override(overrides: str, values: dict) -> str:
    """Overrides with other values for some keys.

    Arguments
    ---------
    overrides : str
        YAML text, as :func:`parse_arguments` makes it.
    values : dict
        Keys and the values that they shall have.

    Returns
    -------
    str

    Example
    -------
    >>> override("seed: 1\\nlr: 0.1", {"lr": 0.2})
    'seed: 1\\nlr: 0.2'
    """
    kept = [
        line
        for line in overrides.splitlines()
        if line.partition(":")[0] not in values
    ]
    kept += [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(kept)


def all_values(path: str | Path, overrides: str = "") -> dict:
    """All that a HyperPyYAML file says, for telling two runs apart.

    Arguments
    ---------
    path, overrides
        As in :func:`plain_values`.

    Returns
    -------
    dict
        The plain values, then "yaml " and a digest for each object.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.yaml"
    >>> _ = path.write_text("m: !new:spkid.models.layers.X\\n    size: 3\\nlr: 0.1")
    >>> before, after = all_values(path), all_values(path, "lr: 0.2")
    >>> list(before), before["m"] == after["m"], before["m"][:5]
    (['lr', 'm'], True, 'yaml ')
    """
    plain = plain_values(path, overrides)
    text = Path(path).read_text(encoding="utf-8")
    root = yaml.compose(resolve_references(text, overrides), _PlainLoader)
    digests = {}
    for key, value in root.value:
        if "!" in value.tag:
            content = yaml.serialize(value).encode()
            digest = hashlib.blake2b(content, digest_size=8).hexdigest()
            digests[key.value] = f"yaml {digest}"
    plain = {key: value for key, value in plain.items() if key not in digests}
    return plain | digests


def plain_values(
    path: str | Path, overrides: str = "", only_given: bool = False
) -> dict:
    """The plain values of a HyperPyYAML file; no object of it is made.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.
    overrides : str
        YAML text of top-level keys to replace, as :func:`parse_arguments`
        makes it from the command line.
    only_given : bool
        Only the overrides themselves.

    Returns
    -------
    dict
        Keys and values, references resolved; None for each object.

    Raises
    ------
    UserError
        If the file cannot be read, or has no such key to override.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.yaml"
    >>> _ = path.write_text("lr: 0.1\\ndouble: !ref <lr> * 2\\nm: !new:int")
    >>> plain_values(path, "lr: 0.2")
    {'lr': 0.2, 'double': 0.4, 'm': None}
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: the hyperparameter file can't be read "
            f"({error.strerror}); see the folder hparams/ for those there are."
        ) from None
    try:
        known = yaml.load(text, _PlainLoader) or {}
        given = yaml.load(overrides, _PlainLoader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error}).") from None
    if not isinstance(given, dict):
        raise UserError(
            f"'{overrides}' isn't of the form --key=value; see {path} for keys."
        )
    if empty := re.search(r"^(\w+): *$", overrides, re.MULTILINE):
        raise UserError(f"--{empty[1]} has no value; give one, or null.")
    names = re.findall(r"^(\w+):", overrides, re.MULTILINE)
    for key in given:
        if names.count(key) > 1:
            raise UserError(f"--{key} is given twice; keep one.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see its keys."
            raise UserError(f"{path}: has no key '{key}' to override; {hint}")
        _check_kind(key, given[key], type(known[key]))
    if only_given:
        return given
    try:
        resolved = resolve_references(text, overrides)
    except Exception as error:
        raise UserError(f"{path}: {error}") from None
    return yaml.load(resolved, _PlainLoader)


def _check_kind(key, value, kind):
    """A value is of the kind that the YAML file's own one has."""
    kinds = (int, float) if kind is float else (kind,)
    if kind in KINDS and type(value) not in kinds:
        raise UserError(f"--{key}={value} must be {KINDS[kind]}.")


def check_values(
    path: str | Path, values: dict, limits: dict[str, tuple[float, float]]
) -> None:
    """Raises UserError for a number out of its limits or a folder that is
    none.

    Arguments
    ---------
    path : str or pathlib.Path
        The YAML file that is to blame.
    values : dict
        From :func:`plain_values`.
    limits : dict
        Key to the lowest and the highest value, both allowed; floats: any
        number between them. Keys that the file lacks don't matter.

    Example
    -------
    >>> check_values("a.yaml", {"lr": 0.1}, {"lr": (0.0, 1.0)})
    """
    for key, (low, high) in limits.items():
        value = values.get(key)
        if value is None:
            continue
        kind = float if isinstance(low + high, float) else int
        _check_kind(key, value, kind)
        if not low <= value <= high:
            raise UserError(
                f"{path}: {key}={value} isn't in [{low}, {high}]; correct it "
                f"there, or give another --{key}."
            )
    for key, value in values.items():
        if key.endswith("_folder") and not isinstance(value, str | None):
            raise UserError(
                f"{path}: {key}={value} is no path; write ./{value} if it is."
            )


def check_device(name: str) -> None:
    """Raises UserError for a device that can't be used here.

    Arguments
    ---------
    name : str
        As PyTorch names it.

    Raises
    ------
    UserError
        If not one number can be put there.

    Example
    -------
    >>> check_device("cpu")
    """
    try:
        torch.zeros(1, device=name)
    except Exception as error:  # each backend has its own
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"--device {name}: can't be used here ({why}); give another one, "
            "as cpu."
        ) from None


def load_hparams(path: str | Path, overrides: str = "") -> dict:
    """Makes a HyperPyYAML file's objects.

    Arguments
    ---------
    path, overrides
        As in :func:`plain_values`.

    Returns
    -------
    dict
        Keys and objects.

    Raises
    ------
    UserError
        If an object refuses its values, or can't make its folder.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.yaml"
    >>> _ = path.write_text("m: !new:fractions.Fraction [1, 2]")
    >>> load_hparams(path)["m"]
    Fraction(1, 2)
    """
    plain_values(path, overrides)
    try:
        with open(path, encoding="utf-8") as file:
            return load_hyperpyyaml(file, overrides)
    except OSError as error:
        if error.errno in FULL:
            raise
        named = f"{error.filename}: {error.strerror}; name another one."
        raise UserError(
            named if error.filename else f"{path}: {error}"
        ) from None
    except Exception as error:  # whatever an object says of its values
        raise UserError(f"{path}: {error}") from None
