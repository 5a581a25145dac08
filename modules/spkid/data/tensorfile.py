"""Reading a file of ``torch.save`` without ``torch.load``.

What ``torch.save`` writes for one float32 matrix always begins alike: a zip's
member ``data.pkl``, which holds the shape in 90 fixed bytes, and then, stored
uncompressed, ``data/0``. :func:`parse_matrix` matches these bytes at the speed
of reading them. Any other layout is left to :func:`read_tensor`, whose pickle
can name tensors and nothing else, and whose every size is checked before
memory is taken.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

# A zip member's header: not compressed. Then follow the sizes of its name and
# of an extra field, these two themselves (the field is b"FB" and padding), and
# the member.
_HEADER = rb"PK\x03\x04.{4}\x00\x00.{16}"
_INTEGER = rb"(K.|M..|J....)"  # pickled: of one, two or four bytes
_MATRIX = re.compile(
    _HEADER
    + rb".{4}[^/]{1,255}/data\.pklFB..Z*"
    + rb"\x80\x02ctorch\._utils\n_rebuild_tensor_v2\nq\x00\(\("
    rb"X\x07\x00\x00\x00storageq\x01ctorch\nFloatStorage\nq\x02"
    rb"X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04"
    + _INTEGER  # values of the storage
    + rb"tq\x05QK\x00"  # the tensor begins at its first value
    + _INTEGER * 2  # shape
    + rb"\x86q\x06"
    + _INTEGER * 2  # strides
    + rb"\x86q\x07\x89ccollections\nOrderedDict\nq\x08\)Rq\ttq\nRq\x0b\."
    + rb"PK\x07\x08(....).{8}"  # its checksum; its size, twice
    + rb"(.{0,999}?)"  # other members, of newer versions
    + _HEADER
    + rb"(....)[^/]{1,255}/data/0FB",
    re.DOTALL,
)
_UNCHECKED = bytes(4)  # instead of each checksum, where PyTorch left them out
MAX_PICKLE = 8192  # bytes; a tensor's has 150
_SAVE = "save one float tensor [frames, n_mels] with torch.save"
_NONE = "holds no float tensor, or more than one"
_AGAIN = "make or download it again"


class NotATensor(Exception):
    """What a file is instead, and the cure.

    Example
    -------
    >>> error = NotATensor("it is a JSON file", "save a tensor")
    >>> error.what, error.cure
    ('not a readable feature file (it is a JSON file)', 'save a tensor')
    """

    def __init__(
        self, reason: str, cure: str = _AGAIN, what: str | None = None
    ) -> None:
        super().__init__(reason)
        self.what = what or f"not a readable feature file ({reason})"
        self.cure = cure


def parse_matrix(content: bytes | bytearray) -> np.ndarray | None:
    """The matrix in a file of ``torch.save``, if it has the usual layout.

    Arguments
    ---------
    content : bytes-like
        The whole file.

    Returns
    -------
    numpy.ndarray [rows, columns], optional
        float32, a view of ``content``; None if this isn't, whole and with the
        right checksum, what ``torch.save`` writes for one contiguous float32
        matrix on a CPU.

    Example
    -------
    >>> import io, torch
    >>> file = io.BytesIO()
    >>> torch.save(torch.ones(2, 3), file)
    >>> parse_matrix(file.getvalue())
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    >>> parse_matrix(b"something else") is None
    True
    """
    found = _MATRIX.match(content)
    if not found or content[-22:-18] != b"PK\x05\x06":  # else it is cut off
        return None
    *integers, other, between, sizes = found.groups()
    values, rows, columns, stride, one = (
        int.from_bytes(integer[1:], "little") for integer in integers
    )
    begin = found.end(8) + sum(struct.unpack("<HH", sizes))
    end = begin + 4 * values
    checksum, tail = content[end + 4 : end + 8], content[end + 8 : end + 16]
    if (
        (stride, one) != (columns, 1)
        or values != rows * columns
        or content[end : end + 4] != b"PK\x07\x08"
        or tail != struct.pack("<LL", 4 * values, 4 * values)
        or (b"byteorder" in between and b"little" not in between)
    ):
        return None
    crc = zlib.crc32(memoryview(content)[begin:end])
    if crc.to_bytes(4, "little") != checksum and not (
        checksum == other == _UNCHECKED
    ):
        return None
    matrix = np.frombuffer(content, "<f4", values, begin)
    return matrix.reshape(rows, columns)


def read_tensor(content: bytes | bytearray) -> torch.Tensor:
    """The float tensor in any file of ``torch.save``.

    It may be of any float type, a view, a parameter, or saved in the format
    before zip or by another pickle protocol.

    Arguments
    ---------
    content : bytes-like
        The whole file.

    Returns
    -------
    torch.Tensor
        A view of a copy of its storage.

    Raises
    ------
    NotATensor
        If it is something else or damaged.

    Example
    -------
    >>> import io, torch
    >>> file = io.BytesIO()
    >>> torch.save(torch.ones(2, 3).T.half(), file)
    >>> read_tensor(file.getvalue()).shape
    torch.Size([3, 2])
    """
    try:
        read = _read_zip if content[:2] == b"PK" else _read_legacy
        return read(content)
    except NotATensor:
        raise
    except Exception as error:  # damage has many faces
        name = type(error).__name__
        raise NotATensor(f"it is damaged or cut off: {name}") from None


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    values: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    negated: bool

    def of(self, data: memoryview, swap: bool) -> torch.Tensor:
        """The tensor, in a copy of its storage's bytes."""
        storage, dtype = self.storage, self.dtype
        counts = self.offset, *self.size, *self.stride
        if any(type(count) is not int for count in counts):
            raise ValueError
        place = storage.values * storage.dtype.itemsize
        last = self.offset + sum(
            (n - 1) * step
            for n, step in zip(self.size, self.stride, strict=True)
        )
        if place != len(data) or min(counts) < 0:
            raise NotATensor("its sizes contradict each other")
        if not all(self.size):
            return torch.zeros(self.size, dtype=dtype)
        if (last + 1) * dtype.itemsize > place:
            raise NotATensor("its sizes contradict each other")
        if math.prod(self.size) * dtype.itemsize > place + MAX_PICKLE:
            raise NotATensor(
                "an expanded view, larger than its file",
                "save x.clone() instead of x",
            )
        copy = bytearray(data)
        if swap:
            numbers = np.frombuffer(copy, f"u{dtype.itemsize}")
            numbers.byteswap(inplace=True)
        whole = torch.frombuffer(copy, dtype=dtype)
        tensor = whole.as_strided(self.size, self.stride, self.offset)
        return -tensor if self.negated else tensor


def _rebuild(storage, offset, size, stride, _, hooks, metadata=None):
    """As torch._utils._rebuild_tensor_v2, but only a description."""
    return _rebuild_typed(
        storage, offset, size, stride, _, hooks, storage.dtype, metadata
    )


def _rebuild_typed(storage, offset, size, stride, _, hooks, dtype, meta=None):
    """As torch._utils._rebuild_tensor_v3."""
    negated = type(meta) is dict and bool(meta.get("neg"))
    return _Tensor(storage, offset, size, stride, dtype, negated)


def _first(data, *_):
    return data


def _call(function, _, arguments, __):
    """As torch._tensor._rebuild_from_type_v2."""
    return function(*arguments)


_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
}
# What a pickle may name, and what it gets.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _call,
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("collections", "OrderedDict"): lambda *_: {},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", f"{n}Storage"): dtype for n, dtype in _STORAGES.items()},
    **{
        ("torch", name): dtype
        for name, dtype in vars(torch).items()
        if isinstance(dtype, torch.dtype)
    },
}


class _Unpickler(pickle._Unpickler):
    """Python's own, which gives only what is in ``_GLOBALS``."""

    dispatch: ClassVar[dict[int, Callable]] = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()
        # They make objects or sets, hash what may be tuples of tuples, or take
        # the memory that they name.
        if code not in b"iodsu\x81\x82\x83\x84\x8f\x90\x91\x92\x96"
    }
    # An object's state is of no use.
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()

    def _items(self, pairs: list) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:
                raise ValueError  # tuples of tuples take for ever to hash
            self.stack[-1][key] = value  # type: ignore[attr-defined]

    def _item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore
        self._items([key, value])

    dispatch[pickle.SETITEM[0]] = _item
    dispatch[pickle.SETITEMS[0]] = lambda self: self._items(self.pop_mark())

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        package = module.partition(".")[0]
        if package == "numpy":
            raise NotATensor("it holds a NumPy array", _FROM_NUMPY)
        if package == "torch":
            raise NotATensor(name, _SAVE, _NONE)
        asked = f"{module}.{name}"[:60]
        raise NotATensor(f"it asks for {asked!a}, which isn't a tensor", _SAVE)

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, dtype, key, _, values, *view = pid
        if (
            kind != "storage"
            or view not in ([], [None])
            or not (type(key) is str and type(values) is int)
        ):
            raise ValueError
        return _Storage(dtype, key, values)


def _described(pickled: io.BytesIO) -> _Tensor:
    """The tensor that a pickle describes."""
    found = _Unpickler(pickled).load()
    if isinstance(found, _Tensor) and found.dtype.is_floating_point:
        return found
    raise NotATensor("", _SAVE, _NONE)


def _read_zip(content: bytes | bytearray) -> torch.Tensor:
    members = _members(content)
    if "data.pkl" not in members:
        raise NotATensor("it is a zip, but not of torch.save", _SAVE)
    pickled = members["data.pkl"]
    if len(pickled) > MAX_PICKLE:
        raise NotATensor("", _SAVE, _NONE)
    found = _described(io.BytesIO(pickled))
    order = bytes(members.get("byteorder", sys.byteorder.encode())).decode()
    return found.of(
        members[f"data/{found.storage.key}"], order != sys.byteorder
    )


def _members(content: bytes | bytearray) -> dict[str, memoryview]:
    """A zip's members by their names without the topmost folder; each is
    stored as it is, in bytes of its own, and has the right checksum."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        infos = sorted(file.infolist(), key=lambda info: info.header_offset)
        end = file.start_dir
    view, found = memoryview(content), {}
    unchecked = not any(info.CRC for info in infos)
    ends = [*(info.header_offset for info in infos[1:]), end]
    for info, end in zip(infos, ends, strict=True):
        if info.filename.endswith(".npy"):
            raise NotATensor("it is a NumPy archive", _FROM_NUMPY)
        if info.compress_type or info.flag_bits & 1:
            raise NotATensor(
                f"its member {info.filename[:60]!a} is compressed",
                "save it with torch.save, which doesn't compress",
            )
        sizes = struct.unpack_from("<HH", content, info.header_offset + 26)
        begin = info.header_offset + 30 + sum(sizes)
        data = view[begin : begin + info.file_size]
        name = info.filename.partition("/")[2] or info.filename
        if (
            not info.compress_size == info.file_size == len(data) <= end - begin
            or name in found
        ):
            raise NotATensor("its members overlap or are cut off")
        if not unchecked and zlib.crc32(data) != info.CRC:
            raise NotATensor(f"the checksum of {info.filename[:60]!a} is wrong")
        found[name] = data
    return found


def _read_legacy(content: bytes | bytearray) -> torch.Tensor:
    """The format before zip: pickles, then a storage and its size."""
    if _LEGACY not in content[:32]:
        raise _not_of_torch(content)
    front = io.BytesIO(content[:MAX_PICKLE])
    _, _, system = (_Unpickler(front).load() for _ in range(3))
    found = _described(front)
    if _Unpickler(front).load() != [found.storage.key]:
        raise NotATensor("", _SAVE, _NONE)
    begin = front.tell() + 8
    order = "little" if system["little_endian"] else "big"
    values = int.from_bytes(content[begin - 8 : begin], order)  # type: ignore
    if values != found.storage.values:
        raise NotATensor("its sizes contradict each other")
    return found.of(memoryview(content)[begin:], order != sys.byteorder)


_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch's number
_FROM_NUMPY = "save it with torch.save(torch.from_numpy(x), path)"
_FEATURES = "compute its log-mel features and save them with torch.save"
_KINDS = {  # by how they begin
    rb"\x93NUMPY": ("a NumPy array", _FROM_NUMPY),
    rb"RIFF....WAVE|fLaC|OggS|ID3|\xff[\xfb\xf3\xf2]|FORM....AIF": (
        "a recording",
        _FEATURES,
    ),
    rb"\s*<(!|\?|html)": ("a web page", "download the file itself"),
    rb"version https://git-lfs": ("a Git LFS pointer", "run git lfs pull"),
    rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc\xaf|\x28\xb5\x2f\xfd": (
        "compressed",
        "unpack it",
    ),
    rb"\x89HDF": ("an HDF5 file", _SAVE),
    rb"\s*[\[{]": ("a JSON file", _SAVE),
    rb"\x80[\x02-\x05]": ("a pickle, not of torch.save", _SAVE),
    rb"\Z": ("empty", _AGAIN),
}


def _not_of_torch(content: bytes | bytearray) -> NotATensor:
    """Says what a file is."""
    for pattern, (kind, cure) in _KINDS.items():
        if re.match(pattern, content[:512], re.DOTALL | re.IGNORECASE):
            return NotATensor(f"it is {kind}", cure)
    return NotATensor("it is damaged, or not a file of torch.save")
