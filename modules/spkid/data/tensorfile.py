"""Reading a file of ``torch.save`` at the speed of its bytes.

``torch.load`` takes ten times as long as reading the file. What
``torch.save`` writes for one float32 matrix is always the same: a zip of
stored members, of which ``data.pkl`` holds the shape in 90 fixed bytes. Those
are matched, never unpickled; whatever differs in a byte is left to
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import re
import struct

import numpy as np

# A pickled integer of one, two or four bytes.
_INTEGER = rb"(K.|M..|J....)"
_MATRIX = re.compile(
    rb"\x80\x02ctorch\._utils\n_rebuild_tensor_v2\nq\x00\(\("
    rb"X\x07\x00\x00\x00storageq\x01ctorch\nFloatStorage\nq\x02"
    rb"X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04"
    + _INTEGER  # values of the storage
    + rb"tq\x05QK\x00"  # the tensor begins at its first value
    + _INTEGER * 2  # shape
    + rb"\x86q\x06"
    + _INTEGER * 2  # strides
    + rb"\x86q\x07\x89ccollections\nOrderedDict\nq\x08\)Rq\ttq\nRq\x0b\.",
    re.DOTALL,
)
_LOCAL = struct.Struct("<4s22xHH")  # a member's own header
_ENTRY = struct.Struct("<4s6xH8xIIHHH8xI")  # its entry in the directory
_END = struct.Struct("<4s4xHHIIH")


def _members(content):
    """Name (less its folder) to bytes; ValueError if it is no plain zip."""
    end = len(content) - _END.size
    if end < 0:
        raise ValueError("too short for a zip")
    mark, entries, _, size, place, _ = _END.unpack_from(content, end)
    if mark != b"PK\5\6" or place + size > end:
        raise ValueError("no directory")
    members = {}
    for _ in range(entries):
        mark, method, packed, size, *lengths, header = _ENTRY.unpack_from(
            content, place
        )
        name = content[place + _ENTRY.size :][: lengths[0]].tobytes()
        place += _ENTRY.size + sum(lengths)
        local, *skip = _LOCAL.unpack_from(content, header)
        begin = header + _LOCAL.size + sum(skip)
        if (mark, local) != (b"PK\1\2", b"PK\3\4") or method:
            raise ValueError("not stored")
        if packed != size or begin + size > end:
            raise ValueError("cut off")
        name = name.partition(b"/")[2]
        if name in members:
            raise ValueError("a name stands there twice")
        members[name] = content[begin : begin + size]
    return members


def parse_matrix(content: bytes | bytearray | np.ndarray) -> np.ndarray | None:
    """The matrix in a file of ``torch.save``, if it has the usual layout.

    Arguments
    ---------
    content : bytes-like
        The whole file.

    Returns
    -------
    numpy.ndarray [rows, columns], optional
        float32, a view of ``content``; None if this isn't what
        ``torch.save`` writes for one contiguous float32 matrix on a CPU.

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
    content = memoryview(content)
    try:
        members = _members(content)
    except (ValueError, struct.error):
        return None
    found = _MATRIX.fullmatch(members.get(b"data.pkl", b""))
    if not found or members.get(b"byteorder", b"little") != b"little":
        return None
    values, rows, columns, stride, one = (
        int.from_bytes(number[1:], "little") for number in found.groups()
    )
    storage = members.get(b"data/0", b"")
    if (
        (stride, one) != (columns, 1)
        or values != rows * columns
        or len(storage) != 4 * values
    ):
        return None
    return np.frombuffer(storage, "<f4").reshape(rows, columns)
