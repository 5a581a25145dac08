"""Reading a file of ``torch.save`` at the speed of its bytes.

``torch.load`` takes ten times as long as reading the file. What
``torch.save`` writes for one float32 matrix always begins alike: a zip's
member ``data.pkl``, which holds the shape in 90 fixed bytes, and then, stored
uncompressed, ``data/0``. These bytes are matched, never unpickled; a file
that differs in any of them is left to ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import re
import struct

import numpy as np

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
    + rb"(.{0,999}?)"  # other members, of newer versions
    + _HEADER
    + rb"(....)[^/]{1,255}/data/0FB",
    re.DOTALL,
)


def parse_matrix(content: bytes | bytearray) -> np.ndarray | None:
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
    found = _MATRIX.match(content)
    if not found or content[-22:-18] != b"PK\x05\x06":  # else it is cut off
        return None
    *integers, between, sizes = found.groups()
    values, rows, columns, stride, one = (
        int.from_bytes(integer[1:], "little") for integer in integers
    )
    begin = found.end(7) + sum(struct.unpack("<HH", sizes))
    end = begin + 4 * values
    if (
        (stride, one) != (columns, 1)
        or values != rows * columns
        or content[end : end + 2] != b"PK"  # of whatever follows
        or (b"byteorder" in between and b"little" not in between)
    ):
        return None
    matrix = np.frombuffer(content, "<f4", values, begin)
    return matrix.reshape(rows, columns)
