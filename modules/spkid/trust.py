"""What a run's folder may hold, since a stranger may have made it.

Its hyperparams.yaml names classes. They are checked before anything is
imported, and built here, since HyperPyYAML runs whatever a file names, even
within a text in round brackets.
"""

from __future__ import annotations

import importlib
import math
import pydoc
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from spkid.errors import UserError, one_line
from spkid.files import check_stored, open_regular

# What a run's folder may name. torch.nn.Transformer and its parts are copied
# as often as an argument says, whatever memory there is; lazy modules have no
# size before they run.
CLASSES = re.compile(
    r"(spkid\.(models|features)(\.[a-z]+)?"
    r"|torch\.nn(\.modules\.[a-z]+)?(?!\.(Transformer|Lazy))"
    r"|speechbrain\.nnet\.(CNN|RNN|activations|attention|containers|dropout"
    r"|embedding|linear|normalization|pooling)"
    r"|speechbrain\.lobes\.models\.(ECAPA_TDNN|ResNet|Xvector))"
    r"\.[A-Za-z]\w*",
    re.ASCII,
)
# Functions of PyTorch that make no more than they are given.
NEVER_LARGER = {
    *("cat", "stack", "mean", "sum", "linalg_vector_norm", "glu", "_softmax"),
    *("_log_softmax", "native_layer_norm", "native_batch_norm"),
    "_scaled_dot_product_flash_attention_for_cpu",
}
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "map", "seq")
} | {"!tuple"}
MAX_VALUES = 10_000  # of a YAML file, where each alias counts as its content
SPARE = 2**26  # bytes that modules may make beside their weights
MAX_TRIAL = 2**29  # bytes of all that a model makes of a second of silence
MAX_WEIGHTS = 2**32  # bytes: a billion float32


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that ``torch.save`` wrote, by their names.

    Raises
    ------
    Exception
        PyTorch has many for a bad file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.ckpt"
    >>> torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    >>> load_weights(path)["bias"].shape
    torch.Size([3])
    """
    with open_regular(path) as file:
        if check_stored(file) > MAX_WEIGHTS:
            raise ValueError(f"it has more than {MAX_WEIGHTS:,} bytes")
        weights = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"  # others claim any size
        for name, value in weights.items()
    ):
        raise ValueError("it doesn't hold tensors by names")
    return weights


def count_values(node: Node) -> float:
    """Values within a YAML node, each alias as its content and long texts as
    several; infinity for a node that holds itself.

    Example
    -------
    >>> count_values(ruamel.yaml.YAML().compose("[&a [1, 2], *a, *a]"))
    10
    """
    counts: dict[int, float] = {}

    def count(one: Node) -> float:
        if id(one) not in counts:
            counts[id(one)] = math.inf  # until it is known
            length = len(one.value) if isinstance(one, ScalarNode) else 0
            inside = sum(map(count, _children(one)))
            counts[id(one)] = 1 + length // 100 + inside
        return counts[id(one)]

    return count(node)


def check_nodes(node: Node, blamed: str, trust: bool = False) -> None:
    """Checks that a YAML node names nothing but torch modules.

    Arguments
    ---------
    node : ruamel.yaml.nodes.Node
        Of a YAML file.
    blamed : str
        The file and the key.
    trust : bool
        Whether any installed torch module will do. Otherwise only ours,
        SpeechBrain's and PyTorch's layers; nothing else is imported.

    Raises
    ------
    UserError
        If it names anything else.

    Example
    -------
    >>> node = ruamel.yaml.YAML().compose("!new:torch.nn.Linear [2, 3]")
    >>> check_nodes(node, "a.yaml: key 'a'")
    """
    for one in _within(node):
        if one.tag not in PLAIN_TAGS:
            _find(str(one.tag), blamed, trust)


def build_modules(
    nodes: Mapping[str, Node], path: Path, trust: bool = False
) -> dict[str, torch.nn.Module]:
    """Makes the torch modules of YAML nodes, and runs nothing else.

    Arguments
    ---------
    nodes : dict
        Nodes by key. What they share is made once.
    path : pathlib.Path
        The file to blame.
    trust : bool
        As in :func:`check_nodes`.

    Raises
    ------
    UserError
        If a node is refused, or a class refuses its arguments.

    Example
    -------
    >>> node = ruamel.yaml.YAML().compose("!new:torch.nn.Linear [2, 3]")
    >>> build_modules({"a": node}, Path("a.yaml"))
    {'a': Linear(in_features=2, out_features=3, bias=True)}
    """
    plain = ruamel.yaml.YAML(typ="safe", pure=True)
    made: dict[int, Any] = {}

    def construct(node: Node, blamed: str) -> Any:
        content: Any = None
        if isinstance(node, MappingNode):
            content = {
                make(key, blamed): make(value, blamed)
                for key, value in node.value
            }
        elif isinstance(node, SequenceNode):
            content = [make(value, blamed) for value in node.value]
        elif _is_tuple(node):
            if "*" in node.value:  # count_values doesn't look into it
                raise ValueError("a tuple can't hold aliases")
            content = tuple(plain.load(f"[{node.value[1:-1]}]"))
        elif node.tag in PLAIN_TAGS:
            content = plain.constructor.construct_object(node)
        if node.tag in PLAIN_TAGS:
            return content
        found = _find(str(node.tag), blamed, trust)
        keys = content if isinstance(content, dict) else {}
        values = content if isinstance(content, list) else ()
        if str(node.tag).startswith("!new:"):
            return found(*values, **keys)
        return partial(found, *values, **keys) if content else found

    def make(node: Node, blamed: str) -> Any:
        if id(node) not in made:
            try:
                made[id(node)] = construct(node, blamed)
            except UserError:
                raise
            except Exception as error:  # whatever a class says of its values
                what = "" if node.tag in PLAIN_TAGS else f" {node.tag}"
                raise UserError(f"{blamed}{what}: {one_line(error)}.") from None
        return made[id(node)]

    for key, node in nodes.items():
        check_nodes(node, f"{path}: key '{key}'", trust)
    built = {
        key: make(node, f"{path}: key '{key}'") for key, node in nodes.items()
    }
    for key, value in built.items():
        if not isinstance(value, torch.nn.Module):
            raise UserError(
                f"{path}: key '{key}' must be a torch module; train again."
            )
    return built


class Bounded(TorchDispatchMode):
    """Foresees the size of each tensor that PyTorch makes, and refuses to make
    more than some bytes in all.

    Arguments
    ---------
    most : int
        The bytes. What is freed counts, too.
    refusal : Exception
        Is raised before they are exceeded.

    Example
    -------
    >>> with Bounded(1000, ValueError("too large")):
    ...     torch.zeros(2, 10**12)
    Traceback (most recent call last):
    ...
    ValueError: too large
    """

    def __init__(self, most: int, refusal: Exception) -> None:
        super().__init__()
        self.left, self.refusal = most, refusal

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import it, for a second

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(value.alias_info for value in func._schema.returns):
            self.left -= _foresee(func, args, kwargs)
            if self.left < 0:
                raise self.refusal
        return func(*args, **kwargs)


def _tensors(values: object) -> list[torch.Tensor]:
    """Those among nested values."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _foresee(func: Any, args: tuple, kwargs: dict) -> int:
    """Bytes that a function of PyTorch would make, or somewhat more.

    The device "meta" says it of each, but for the commonest it imports the
    compiler first, which takes a second.
    """
    given, name = _tensors((args, kwargs)), str(func)
    values = 0
    if torch.Tag.pointwise in func.tags:
        axes = zip_longest(*(x.shape[::-1] for x in given), fillvalue=1)
        values = math.prod(map(max, axes))
    elif name.split(".")[1] in NEVER_LARGER:
        values = sum(x.numel() for x in given)
    elif name.split(".")[1] in ("mm", "bmm", "addmm"):
        left, right = args[-2:]
        values = math.prod(left.shape[:-1]) * right.shape[-1]
    elif name == "aten.arange.default":
        values = math.ceil(args[0])
    elif name == "aten.convolution.default" and not args[6]:
        x, weight, _, hops, pads = args[:5]
        if len(hops) == len(pads) == x.ndim - 2:
            values = len(x) * len(weight)
            for n, pad, hop in zip(x.shape[2:], pads, hops, strict=True):
                values *= (n + 2 * pad) // hop + 1
    if values:
        return values * max((x.element_size() for x in given), default=8)

    def without_memory(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device="meta"
        )

    if "device" in kwargs:
        kwargs = kwargs | {"device": "meta"}
    args, kwargs = tree_map_only(torch.Tensor, without_memory, (args, kwargs))
    try:
        made = _tensors(func(*args, **kwargs))
    except Exception:  # it depends on values, as nonzero, or fails anyway
        return 0
    return sum(x.numel() * x.element_size() for x in made)


def check_size(
    build: Callable[[], object],
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    path: Path,
) -> None:
    """Checks modules against their weights before they take memory.

    Arguments
    ---------
    build : callable
        Makes them; is called on PyTorch's device "meta", without memory.
    weights : dict
        Of each module, as in its ``state_dict()``; a module that is not
        there has none.
    path : pathlib.Path
        The file to blame.

    Raises
    ------
    UserError
        If they would be larger than their weights.

    Example
    -------
    >>> layer = torch.nn.Linear(2, 3)
    >>> check_size(lambda: {"a": torch.nn.Linear(2, 3)},
    ...            {"a": layer.state_dict()}, Path("a.yaml"))
    """
    tensors = [value for one in weights.values() for value in one.values()]
    storages = [t.untyped_storage() for t in tensors]
    sizes = {one.data_ptr(): one.nbytes() for one in storages}
    most, registered = 10 * len(tensors) + 1000, 0
    refusal = UserError(
        f"{path}: describes a larger model than the run's weights are of; "
        "train again."
    )

    def count(*_: object) -> None:
        nonlocal registered
        registered += 1
        if registered > most:
            raise refusal

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:  # weights may be made of others, as orthogonal ones are
        room = 4 * sum(sizes.values()) + SPARE
        with torch.device("meta"), Bounded(room, refusal):
            build()
    finally:
        for handle in handles:
            handle.remove()


def _children(node: Node) -> list[Node]:
    """The nodes within a node."""
    if isinstance(node, MappingNode):
        return [one for pair in node.value for one in pair]
    return node.value if isinstance(node, SequenceNode) else []


def _within(node: Node) -> Iterator[Node]:
    """A node and all within it; what is shared comes each time."""
    yield node
    for child in _children(node):
        yield from _within(child)


def _is_tuple(node: Node) -> bool:
    """Whether HyperPyYAML takes a scalar for a tuple, as (1, 2)."""
    if not isinstance(node, ScalarNode):
        return False
    bracketed = node.style is None and re.fullmatch(r"\(.*\)", node.value)
    return node.tag == "!tuple" or bool(bracketed)


def _find(tag: str, blamed: str, trust: bool) -> type[torch.nn.Module]:
    """The class of a tag; nothing is imported that isn't trusted."""
    kind, _, name = tag.partition(":")
    module, _, own = name.rpartition(".")
    if kind not in ("!new", "!name"):
        found = None
    elif CLASSES.fullmatch(name):
        try:
            found = vars(importlib.import_module(module)).get(own)
        except ImportError:
            found = None
        if isinstance(found, type):  # not what that module itself imports
            home = f"{found.__module__}.{found.__name__}"
            found = found if CLASSES.fullmatch(home) else None
    elif trust:
        try:
            found = pydoc.locate(name)
        except Exception as error:  # of the module that is imported
            raise UserError(
                f"{blamed}: {tag} can't be imported ({one_line(error)})."
            ) from None
    else:
        raise UserError(
            f"{blamed}: {tag} isn't one of the classes that a run's folder may "
            "name; if you trust whoever made it, give --trust (in Python: "
            "trust=True)."
        )
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        return found
    raise UserError(
        f"{blamed}: {tag} isn't a torch module that is installed here; a "
        "trained system is made of nothing else."
    )
