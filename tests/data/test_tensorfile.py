"""The fast reader agrees with torch.load, or leaves the file to it."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spkid.data.tensorfile import parse_matrix


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


# Numbers that are pickled in one, two and four bytes, and their edges.
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 65535, 65536])
@pytest.mark.parametrize("columns", [1, 2, 40])
def test_reads_what_torch_reads(rows, columns):
    matrix = torch.randn(rows, columns)
    content = saved(matrix)
    assert np.array_equal(parse_matrix(content), matrix.numpy())


def test_reads_a_file_named_by_its_path(tmp_path):
    matrix = torch.randn(7, 40)
    torch.save(matrix, tmp_path / "uttr-Z.pt")
    content = (tmp_path / "uttr-Z.pt").read_bytes()
    assert np.array_equal(parse_matrix(content), matrix.numpy())


OTHERS = {
    "float64": torch.zeros(4, 40, dtype=torch.float64),
    "integers": torch.zeros(4, 40, dtype=torch.int32),
    "a vector": torch.zeros(40),
    "three dimensions": torch.zeros(1, 4, 40),
    "a transposed view": torch.zeros(40, 4).T,
    "rows of a larger tensor": torch.zeros(9, 40)[:4],
    "later rows": torch.zeros(9, 40)[5:],
    "a parameter": torch.nn.Parameter(torch.zeros(4, 40)),
    "gradients wanted": torch.zeros(4, 40, requires_grad=True),
    "a dictionary": {"mel": torch.zeros(4, 40)},
    "a list": [torch.zeros(4, 40)],
    "a function": print,
}


@pytest.mark.parametrize("what", OTHERS)
def test_leaves_all_else_to_torch(what):
    assert parse_matrix(saved(OTHERS[what])) is None


def test_leaves_the_format_before_zip_to_torch():
    old = {"_use_new_zipfile_serialization": False}
    assert parse_matrix(saved(torch.zeros(4, 40), **old)) is None


@given(st.data())
def test_damage_never_gives_another_shape_or_an_error(data):
    """Cut off, or with a byte changed anywhere: None, or all the values."""
    content = bytearray(saved(torch.ones(4, 3)))
    place = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    if cut:
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    found = parse_matrix(content)
    if cut:
        assert found is None
    elif found is not None:
        assert found.shape == (4, 3)
        assert (found == 1).sum() >= 11


def test_a_pickle_that_says_more_is_left_to_torch():
    """One byte more, or another global of the same length."""
    content = saved(torch.ones(4, 3))
    for before, after in (
        (b"OrderedDict", b"OrderedXict"),
        (b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
        (b"ctorch._utils", b"cposix._utils"),
        (b"FloatStorage", b"FloatXtorage"),
        (b"little", b"bigbig"),
    ):
        assert before in content
        assert parse_matrix(content.replace(before, after)) is None
