"""A HyperPyYAML file and its overrides: read once, checked before data."""

from __future__ import annotations

import difflib
import hashlib
import io
from collections.abc import Iterable
from math import inf, isfinite
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from spkid.errors import FULL, UserError, cure_of, one_line, one_of
from spkid.files import read_bounded
from spkid.keys import (
    DECIDED_BY_DATA,
    FLAG,
    FREE,
    KEYS,
    OBJECT,
    OPTIONAL,
    SCORING,
    TEXT,
    TRAINED,
    Range,
)
from spkid.run_options import MODULES
from spkid.trust import (
    MAX_VALUES,
    PLAIN_TAGS,
    build_modules,
    check_nodes,
    count_values,
)

MAX_BYTES = 2**18  # of a YAML file; ours have 7 KB
OUTDATED = (
    "the folder was written by an older version or another program: train again"
)
CALLED = ("opt_class", "lr_schedule", "margin_schedule")
OBJECTS = (
    *(key for key, (allowed, _) in KEYS.items() if allowed == OBJECT),
    *(*TRAINED, *CALLED, "preprocess", "label_encoder", "modules"),
    "epoch_counter",
)
LESS = "\ue000"  # stands for "<" in a text that holds no reference


class Settings:
    """A HyperPyYAML file with some of its keys overridden.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.
    overrides : dict
        Top-level keys and their values. A text is taken as it is for a key
        that holds a text, and otherwise read as YAML.

    Raises
    ------
    UserError
        If the file can't be read, or lacks a key that is overridden.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.yaml"
    >>> _ = path.write_text("lr: 0.1\\ndouble: !ref <lr> * 2\\n"
    ...                     "half: !new:fractions.Fraction [1, 2]")
    >>> settings = Settings(path, {"lr": "0.2"})
    >>> settings.values
    {'lr': 0.2, 'double': 0.4, 'half': None}
    >>> settings.build()["half"]
    Fraction(1, 2)
    """

    def __init__(
        self, path: str | Path, overrides: dict[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        try:
            text = _read_text(path)
            known, nodes = _values(text), _nodes(text)
            for key in overrides or {}:
                if key in nodes and _makes_object(nodes[key]):
                    raise UserError(
                        f"--{key} can't be given here; change it in a copy of "
                        f"{path}."
                    )
            self.overrides = {
                key: self._read(key, value, known)
                for key, value in (overrides or {}).items()
            }
            file = io.StringIO(text)
            file.name = str(path)  # for !include
            try:
                resolved = resolve_references(file, _hide(self.overrides))
            except RecursionError:
                raise UserError(
                    f"{path}: refers to itself by !include or !ref; give a "
                    "value there."
                ) from None
            self._set_text(resolved.getvalue().replace(LESS, "<"))
            for key, node in self._nodes.items():
                if node.tag == "!ref":  # HyperPyYAML leaves it as it is
                    raise UserError(
                        f"{path}: {key} refers to itself, maybe through "
                        "others; give it a value."
                    )
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: the hyperparameter file can't be "
                f"read ({one_line(error)}); hparams/ holds those there are."
            ) from None
        except UserError:
            raise
        except Exception as error:  # of YAML, of a reference
            raise UserError(
                f"{path}: not valid YAML ({one_line(error)})."
            ) from None

    @classmethod
    def of_run(cls, folder: str | Path) -> Settings:
        """The settings that a run has saved; nothing is resolved again."""
        settings = cls.__new__(cls)
        settings.path = Path(folder) / "hyperparams.yaml"
        settings.overrides = {}
        try:
            settings._set_text(_read_text(settings.path))
        except UserError:
            raise
        except Exception as error:  # ruamel.yaml has many for a bad file
            raise UserError(
                f"{settings.path}: can't be read ({one_line(error)}); name the "
                "--output_folder of a finished run, or write it again with "
                "train.py --test_only."
            ) from None
        settings._check_each()
        return settings

    def replace(self, **overrides: Any) -> Settings:
        """The same file with other values for some keys."""
        return Settings(self.path, self.overrides | overrides)

    def without(self, *keys: str) -> Settings:
        """The same file, these keys not overridden."""
        left = {k: v for k, v in self.overrides.items() if k not in keys}
        return Settings(self.path, left)

    def _set_text(self, text: str) -> None:
        self.text, self.values = text, _values(text)
        self._nodes = _nodes(text)
        # YAML reads "<<" as what it merges, and 1 as no text.
        for key in self._nodes.keys() ^ self.values.keys():
            raise UserError(
                f"{self.path}: key {key!r} isn't a name; write each key out at "
                "the top level, in quotes if it looks like a number, True or "
                "null."
            )

    def _read(self, key: str, value: Any, known: dict[str, Any]) -> Any:
        """An override as the value that the YAML file would have."""
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see its keys."
            raise UserError(
                f"{self.path}: has no key '{key}' to override; {hint}"
            )
        if not isinstance(value, str):
            return value
        default = known[key]
        allowed = KEYS[key].allowed if key in KEYS else None
        if allowed == OPTIONAL and value == "null":
            return None
        if allowed == TEXT and any("\ud800" <= c <= "\udfff" for c in value):
            # No file of a run could name it.
            raise UserError(
                f"--{key}={value}: isn't text in UTF-8; name another place, or "
                "set the environment variable PYTHONUTF8=1."
            )
        if allowed in (TEXT, OPTIONAL) or isinstance(default, str):
            return value
        try:
            read = ruamel.yaml.YAML(typ="safe", pure=True).load(value)
        except Exception:  # ruamel.yaml has more than its own
            raise UserError(f"--{key}={value}: not valid YAML.") from None
        if isinstance(allowed, Range):
            allowed.check(read, f"--{key}")
            return read
        kinds = {bool: FLAG, int: "a whole number", float: "a number"}
        kind = type(default)
        if kind in kinds and type(read) not in (
            (int, float) if kind is float else (kind,)
        ):
            raise UserError(f"--{key}={value} must be {kinds[kind]}.")
        return read

    def check(self, n_processes: int = 1, needed: Iterable[str] = ()) -> None:
        """Raises UserError for whatever is wrong with a value.

        Nothing of the data is looked at, and no folder is made: the objects
        are built once, on trial, except those that write.

        Arguments
        ---------
        n_processes : int
            Processes that share a batch.
        needed : iterable of str
            Keys that the file must have.
        """
        self.need(needed, "add it, as in hparams/conformer.yaml")
        for key in DECIDED_BY_DATA:
            if key in self.overrides:
                raise UserError(f"--{key} is set by the data; remove it.")
        self._check_each()
        self._check_together(n_processes)
        self._check_objects()
        for key in TRAINED:
            if key in self._nodes:  # what can't be loaded isn't trained
                check_nodes(self._nodes[key], f"{self.path}: {key}", trust=True)
        with torch.random.fork_rng(devices=[]):
            self._check_made(
                self.build(
                    key
                    for key in self._nodes
                    if not key.startswith("__")
                    and not (key in KEYS and KEYS[key].allowed == OBJECT)
                )
            )

    def _check_objects(self) -> None:
        """That objects are where train.py needs them."""
        for key in OBJECTS:
            node = self._nodes.get(key)
            if node and not _makes_object(node):
                raise UserError(
                    f"{self.path}: {key} must be an object, as in "
                    "hparams/conformer.yaml."
                )

    def _check_made(self, made: dict[str, Any]) -> None:
        """The objects' kinds."""
        for key, what in made.items():
            if key in MODULES or key in TRAINED:
                fits, kind = isinstance(what, torch.nn.Module), "a torch module"
            elif key == "modules":
                fits = isinstance(what, dict) and {*MODULES} <= what.keys()
                kind = f"a mapping with the keys {', '.join(MODULES)}"
            else:
                fits, kind = key not in CALLED or callable(what), "callable"
            if not fits:
                raise UserError(
                    f"{self.path}: {key} must be {kind}, as in "
                    "hparams/conformer.yaml."
                )

    def need(self, keys: Iterable[str], cure: str) -> None:
        """Raises UserError if the file lacks a key."""
        for key in keys:
            if key not in self.values:
                raise UserError(f"{self.path}: key '{key}' is missing; {cure}.")

    def _check_each(self) -> None:
        """Each value against the table of keys."""
        for key, value in self.values.items():
            if isinstance(value, float) and not isfinite(value):
                raise UserError(f"{self.path}: {key}={value} must be finite.")
            if key not in KEYS or KEYS[key].allowed == OBJECT:
                continue
            allowed, blamed = KEYS[key].allowed, f"{self.path}: {key}"
            if isinstance(allowed, Range):
                allowed.check(value, blamed)
            elif isinstance(allowed, tuple):
                one_of(value, allowed, blamed)
            elif allowed == FLAG:
                one_of(value, (True, False), blamed)
            elif not (
                isinstance(value, str)
                or (allowed == OPTIONAL and value is None)
            ):
                raise UserError(f"{blamed}={value} must be a text; quote it.")

    def _check_together(self, n_processes: int) -> None:
        """Values that limit each other."""
        values = self.values
        for key, highest, what in (
            ("fold", values.get("n_folds", inf) - 1, "n_folds - 1"),
            ("window_hop", values.get("window_frames", inf), "window_frames"),
        ):
            if values.get(key, 0) > highest:
                raise UserError(
                    f"{self.path}: {key}={values[key]} must be at most "
                    f"{what}={highest}."
                )
        if values.get("batch_size", n_processes) < n_processes:
            raise UserError(
                f"{self.path}: batch_size={values['batch_size']} must be at "
                f"least {n_processes}, an utterance for each process."
            )
        if values.get("pack_on_device") and not values.get("pack", True):
            raise UserError(
                f"{self.path}: pack_on_device=True needs pack=True; change one."
            )

    def build(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """Makes the objects of the file, or of some of its keys.

        Returns
        -------
        dict
            Keys and values or objects.

        Raises
        ------
        UserError
            If an object refuses its values, or can't make its folder.
        """
        chosen = self._nodes if keys is None else dict.fromkeys(keys)
        try:
            return self._load(chosen)
        except OSError as error:
            if error.errno in FULL:
                raise
            what = error.strerror or one_line(error)
            raise UserError(
                f"{error.filename}: {what}; {cure_of(error)}."
                if error.filename
                else f"{self.path}: {what}."
            ) from None
        except Exception as error:  # whatever an object says of its values
            key = next(filter(self._fails, chosen), "")
            raise UserError(
                f"{self.path}: {key} {self._nodes[key].tag}: {one_line(error)}."
                if key
                else f"{self.path}: {one_line(error)}."
            ) from None

    def _load(self, keys: Iterable[str]) -> dict[str, Any]:
        """The objects of some keys, as HyperPyYAML makes them."""
        text = _serialize({key: self._nodes[key] for key in keys})
        return load_hyperpyyaml(text) if self._nodes else {}

    def _fails(self, key: str) -> bool:
        """Whether the object of a key can't be made."""
        try:
            self._load([key])
        except Exception:
            return True
        return False

    def build_modules(
        self, keys: Iterable[str], trust: bool = False
    ) -> dict[str, torch.nn.Module]:
        """Makes torch modules, and calls nothing else that the file names.

        So a stranger's file can't run code. No random number is drawn.

        Arguments
        ---------
        keys : iterable of str
            Of the modules.
        trust : bool
            Whether the file may name any torch module that is installed, as
            one of its author's, instead of ours, SpeechBrain's and PyTorch's
            layers alone. Importing it runs its code.

        Raises
        ------
        UserError
            If a key is missing, or names anything but such a module.
        """
        keys = list(keys)
        self.need(keys, OUTDATED)
        nodes = {key: self._nodes[key] for key in keys}
        with torch.random.fork_rng(devices=[]):
            return build_modules(nodes, self.path, trust)

    def fixed(self, test_only: bool = False) -> dict[str, Any]:
        """What a resumed run may not change: plain values, and "yaml " with a
        digest for each object.

        Arguments
        ---------
        test_only : bool
            Nothing is trained, so that scoring may change, too.
        """
        free = {FREE, SCORING} if test_only else {FREE}
        found = {}
        for key, node in self._nodes.items():
            if key in KEYS and KEYS[key].change in free:
                continue
            found[key] = self.values[key]
            if not isinstance(node, ScalarNode) or node.tag not in PLAIN_TAGS:
                content = _serialize({key: node}).encode()
                digest = hashlib.blake2b(content, digest_size=8).hexdigest()
                found[key] = f"yaml {digest}"
        return found

    def scoring(self) -> dict[str, Any]:
        """How utterances are scored; confidences compare only if it is the
        same."""
        return {
            key: self.values.get(key)
            for key, (_, change) in KEYS.items()
            if change == SCORING
        }


class _Reader(ruamel.yaml.constructor.SafeConstructor):
    """Reads plain values; an object, whatever it is, becomes None."""


_Reader.add_multi_constructor("!", lambda *_: None)


def _read_text(path: str | Path) -> str:
    """A YAML file's text."""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: isn't text in UTF-8; save it as UTF-8."
        ) from None


def _values(text: str) -> dict[str, Any]:
    """Keys and plain values of a YAML text."""
    reader = ruamel.yaml.YAML(typ="safe", pure=True)
    reader.Constructor = _Reader
    root = reader.compose(text)
    if root is None:
        return {}
    if not isinstance(root, MappingNode):
        raise ValueError("it must hold keys and values")
    if count_values(root) > MAX_VALUES:  # merging them would take for ever
        raise ValueError(f"more than {MAX_VALUES:,} values, aliases included")
    return reader.constructor.construct_document(root)


def _nodes(text: str) -> dict[str, Node]:
    """Keys of a YAML text and what they hold, with tags and references."""
    root = ruamel.yaml.YAML(typ="safe", pure=True).compose(text)
    return {key.value: node for key, node in root.value} if root else {}


def _makes_object(node: Node) -> bool:
    """Whether a node holds more than a plain value, a list or a reference."""
    tags = ("!new:", "!name:", "!apply:", "!applyref:", "!module:", "!copy")
    return isinstance(node, MappingNode) or str(node.tag).startswith(tags)


def _serialize(nodes: dict[str, Node]) -> str:
    """YAML text of these keys; what they share stays shared."""
    pairs = [
        (ScalarNode("tag:yaml.org,2002:str", key), node)
        for key, node in nodes.items()
    ]
    text = io.StringIO()
    root = MappingNode("tag:yaml.org,2002:map", pairs)
    ruamel.yaml.YAML(pure=True).serialize(root, text)
    return text.getvalue()


def _hide(values: dict[str, Any]) -> dict[str, Any]:
    """Texts in which "<" doesn't begin a reference."""
    return {
        key: value.replace("<", LESS) if isinstance(value, str) else value
        for key, value in values.items()
    }
