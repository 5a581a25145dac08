"""Reading a HyperPyYAML file so that mistakes in it cost one sentence."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references

from spkid.errors import UserError


class _PlainLoader(yaml.SafeLoader):
    """Reads scalars and lists; whatever has a tag becomes None."""


_PlainLoader.add_multi_constructor("!", lambda loader, tag, node: None)


def plain_values(
    path: str | Path, overrides: str = "", only_given: bool = False
) -> dict:
    """The plain values of a HyperPyYAML file; no object of it is made.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.
    overrides : str
        YAML text of top-level keys to replace, as ``sb.parse_arguments``
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
    names = re.findall(r"^(\w+):", overrides, re.MULTILINE)
    for key in given:
        if names.count(key) > 1:
            raise UserError(f"--{key} is given twice; keep one.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see its keys."
            raise UserError(f"{path}: has no key '{key}' to override; {hint}")
    if only_given:
        return given
    try:
        resolved = resolve_references(text, overrides)
    except Exception as error:
        raise UserError(f"{path}: {error}") from None
    return yaml.load(resolved, _PlainLoader)


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
        If an object refuses its values.

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
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from None
