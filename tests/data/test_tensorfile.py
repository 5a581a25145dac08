"""Both readers agree with torch.load, or refuse what isn't a tensor."""

import contextlib
import io
import pathlib
import random
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spkid.data.tensorfile import NotATensor, parse_matrix, read_tensor


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
def test_leaves_all_else_to_the_other_reader(what):
    assert parse_matrix(saved(OTHERS[what])) is None


LEGACY = {"_use_new_zipfile_serialization": False}


def test_leaves_the_format_before_zip_to_the_other_reader():
    assert parse_matrix(saved(torch.zeros(4, 40), **LEGACY)) is None


def lazily_negated():
    """A tensor whose values lie there with the other sign."""
    tensor = torch.randn(4, 40, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    return tensor


def with_an_attribute():
    tensor = torch.randn(4, 40)
    tensor.speaker = "ann"
    return tensor


TENSORS = {
    "float32": torch.randn(4, 40),
    "float64": torch.randn(4, 40, dtype=torch.float64),
    "float16": torch.randn(4, 40).half(),
    "bfloat16": torch.randn(4, 40).bfloat16(),
    "float8": torch.randn(4, 40).to(torch.float8_e4m3fn),
    "a vector": torch.randn(40),
    "a number": torch.tensor(3.5),
    "nothing": torch.zeros(0, 40),
    "a transposed view": torch.randn(40, 4).T,
    "later rows": torch.randn(9, 40)[5:],
    "some columns": torch.randn(4, 80)[:, ::2],
    "a row, repeated": torch.randn(1, 40).expand(4, 40),
    "a parameter": torch.nn.Parameter(torch.randn(4, 40)),
    "gradients wanted": torch.randn(4, 40, requires_grad=True),
    "lazily negated": lazily_negated(),
    "with an attribute": with_an_attribute(),
}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        LEGACY,
        *({"pickle_protocol": p} for p in (1, 3, 4, 5)),
        {"pickle_protocol": 5, **LEGACY},
    ],
    ids=str,
)
def test_reads_any_float_tensor(what, options):
    tensor = TENSORS[what].detach().resolve_neg()
    found = read_tensor(saved(TENSORS[what], **options)).resolve_neg()
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert torch.equal(found.double(), tensor.double())


@pytest.mark.parametrize("options", [{}, LEGACY], ids=str)
def test_reads_the_bytes_of_the_other_order(options):
    matrix = torch.randn(4, 40)
    content, plain = saved(matrix, **options), matrix.numpy()
    swapped = plain.byteswap().tobytes()
    if options:
        flag, size = b"little_endianq\x02\x88", (160).to_bytes(8, "little")
        for before, after in (
            (flag, flag[:-1] + b"\x89"),
            (size, size[::-1]),
            (plain.tobytes(), swapped),
        ):
            assert content.count(before) == 1
            content = content.replace(before, after)
    else:
        members = {"data/0": swapped, "byteorder": b"big"}
        content = rewritten(content, **members)
    assert parse_matrix(content) is None
    assert torch.equal(read_tensor(content), matrix)


def test_reads_a_file_without_checksums():
    """As torch.save can be told to write it, but not if only one is missing."""
    matrix = torch.randn(4, 40)
    torch.serialization.set_crc32_options(False)
    try:
        content = saved(matrix)
        other = saved(matrix.T)
    finally:
        torch.serialization.set_crc32_options(True)
    assert np.array_equal(parse_matrix(content), matrix.numpy())
    assert torch.equal(read_tensor(content), matrix)
    assert torch.equal(read_tensor(other), matrix.T)
    content = saved(matrix)
    crc = zlib.crc32(matrix.numpy().data).to_bytes(4, "little")
    assert content.count(crc) == 2
    content = content.replace(crc, bytes(4))
    assert parse_matrix(content) is None
    with pytest.raises(NotATensor, match="checksum"):
        read_tensor(content)


def rewritten(content, compression=zipfile.ZIP_STORED, **members):
    """A zip's members, packed again; those that are named, replaced."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w", compression) as new,
    ):
        for name in old.namelist():
            short = name.partition("/")[2].replace(".", "_")
            new.writestr(name, members.get(short, old.read(name)))
    return file.getvalue()


def pickled(content):
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        (name,) = (n for n in file.namelist() if n.endswith("data.pkl"))
        return file.read(name)


def overlapping():
    """The tensor's member is said to lie where the pickle lies."""
    content = bytearray(saved(torch.ones(40, 4).T))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        place = file.start_dir
        offset = file.getinfo("archive/data/0").header_offset
    entry = content.index(b"archive/data/0", place) - 4
    assert content[entry : entry + 4] == offset.to_bytes(4, "little")
    content[entry : entry + 4] = bytes(4)
    return bytes(content)


def doubled():
    content, file = saved(torch.ones(4, 40).T), io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w") as new,
    ):
        for name in (*old.namelist(), "archive/data/0"):
            new.writestr(name, old.read(name))
    return file.getvalue()


def bomb(code):
    """A pickle instead of a tensor's."""
    return rewritten(saved(torch.ones(4, 40)), data_pkl=code)


HUGE = b"J\xff\xff\xff\x7f"  # pickled: 2 ** 31 - 1
PLAIN = pickled(saved(torch.ones(4, 40)))
REFUSED = {
    "compressed": (
        rewritten(saved(torch.zeros(2**20)), zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "overlapping members": (overlapping, "overlap"),
    "two of a name": (doubled, "overlap"),
    "an expanded view": (
        saved(torch.zeros(1, 1).expand(2**20, 2**10)),
        "expanded view",
    ),
    "an expanded view, old form": (
        saved(torch.zeros(1, 1).expand(2**20, 2**10), **LEGACY),
        "expanded view",
    ),
    "more values than it has": (
        bomb(PLAIN.replace(b"K\xa0tq", HUGE + b"tq")),
        "contradict",
    ),
    "rows that aren't there": (
        bomb(PLAIN.replace(b"K\x04K(\x86", HUGE + b"K(\x86")),
        "contradict",
    ),
    "strides that leave it": (
        bomb(PLAIN.replace(b"K(K\x01\x86", HUGE + b"K\x01\x86")),
        "contradict",
    ),
    "negative strides": (
        bomb(PLAIN.replace(b"K(K\x01\x86", b"J\xd8\xff\xff\xffK\x01\x86")),
        "contradict",
    ),
    "values, old form": (
        saved(torch.ones(4, 40), **LEGACY).replace(
            (160).to_bytes(8, "little"), (2**40).to_bytes(8, "little")
        ),
        "contradict",
    ),
    "an array of bytes": (
        bomb(b"\x80\x02cbuiltins\nbytearray\n" + HUGE + b"\x85R."),
        "asks for 'builtins.bytearray'",
    ),
    "an empty tensor of any size": (
        bomb(b"\x80\x02ctorch\nTensor\n" + HUGE + b"\x85R."),
        "TypeError",
    ),
    "a memo of any size": (
        bomb(b"\x80\x02Nr\xff\xff\xff\x7f."),
        "no float tensor",
    ),
    "bytes that aren't there": (
        bomb(b"\x80\x04\x8e" + bytes(6) + b"\x01\x00."),
        "damaged or cut off",
    ),
    "a function's defaults": (
        bomb(
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
            b"N}X\x0c\x00\x00\x00__defaults__N\x86b."
        ),
        "no float tensor",
    ),
    "a long pickle": (
        bomb(b"\x80\x02" + b"]" * 10**6 + b"."),
        "no float tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", REFUSED)
def test_nothing_takes_more_memory_than_its_file(what):
    content, words = REFUSED[what]
    content = content() if callable(content) else content
    assert parse_matrix(content) is None
    with little_memory(), pytest.raises(NotATensor) as caught:
        read_tensor(content)
    assert words in caught.value.what
    assert torch.equal(
        read_tensor(saved(TENSORS["float64"])), TENSORS["float64"]
    )


@contextlib.contextmanager
def little_memory(extra=2**26):
    """Where the system can do so, this process gets so many bytes more."""
    resource = pytest.importorskip("resource")
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    size = int(statm.read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutated(content, draw):
    """A file with a few bytes changed, cut, doubled or zeroed."""
    content = bytearray(content)
    place = draw.randrange(len(content))
    end = place + draw.choice([1, 2, 4, 40, 400])
    match draw.choice(
        ["flip", "cut", "front", "zero", "ones", "twice", "swap"]
    ):
        case "flip":
            content[place] ^= 1 << draw.randrange(8)
        case "cut":
            del content[place:]
        case "front":
            del content[: min(place, 99)]
        case "zero":
            content[place:end] = bytes(len(content[place:end]))
        case "ones":
            content[place:end] = b"\xff" * len(content[place:end])
        case "twice":
            content[place:place] = content[place:end]
        case "swap":
            other = draw.randrange(len(content))
            content[place], content[other] = content[other], content[place]
    return bytes(content)


@pytest.mark.parametrize(
    "what", ["float32", "float64", "a transposed view", "later rows"]
)
def test_a_damaged_file_is_refused_or_equal(what):
    """Hundreds of mutations; what has a checksum never gives other values."""
    draw, tensor = random.Random(0), TENSORS[what]
    content, refused = saved(tensor), 0
    with little_memory():
        for _ in range(300):
            changed = mutated(content, draw)
            found = parse_matrix(changed)
            try:
                found = read_tensor(changed) if found is None else found
            except NotATensor:
                refused += 1
                continue
            assert np.array_equal(np.asarray(found), tensor.numpy())
    assert 50 < refused < 300


def test_a_damaged_file_of_the_old_form_keeps_its_size():
    """It has no checksum."""
    draw, tensor, refused = random.Random(0), torch.randn(4, 40), 0
    content = saved(tensor, **LEGACY)
    with little_memory():
        for _ in range(300):
            try:
                found = read_tensor(mutated(content, draw))
            except NotATensor:
                refused += 1
                continue
            assert found.numel() * found.dtype.itemsize <= len(content) + 8192
    assert 50 < refused < 300


@given(st.data())
def test_damage_never_gives_another_value_or_an_error(data):
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
        assert np.array_equal(found, np.ones((4, 3)))


def test_a_pickle_that_says_more_is_left_to_the_other_reader():
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


# A tuple of two of itself, 60 times: 2 ** 60 numbers in 122 bytes.
NESTED = b"K\x00" + b"2\x86" * 60
KEY, VALUES = b"X\x01\x00\x00\x000", b"K\x04"


def tensor_of(key=KEY, values=VALUES, size=b"K\x02K\x02\x86", meta=b"}"):
    """The pickle of a matrix, parts of which are something else."""
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + (key + b"X\x03\x00\x00\x00cpu" + values + b"tQK\x00" + size)
        + (b"K\x02K\x01\x86\x89}" + meta + b"tR.")
    )


ENDLESS = {
    "a storage's key": tensor_of(key=NESTED),
    "a storage's values": tensor_of(values=NESTED),
    "a size": tensor_of(size=NESTED),
    "metadata": tensor_of(meta=b"}" + NESTED + b"K\x01s"),
    "pairs of metadata": tensor_of(meta=NESTED + b"K\x01\x86\x85"),
    "a dict's key": b"\x80\x02}" + NESTED + b"Ns.",
    "keys of a dict": b"\x80\x02}(" + NESTED + b"Nu.",
    "a dict at once": b"\x80\x02(" + NESTED + b"Nd.",
    "a set": b"\x80\x04\x8f(" + NESTED + b"\x90.",
    "a frozen set": b"\x80\x04(" + NESTED + b"\x91.",
    # Not a number, times one; 4 GB if it were.
    "a step": tensor_of(size=HUGE + b"K\x02\x86").replace(
        b"K\x02K\x01\x86\x89", b"K\x00\x85K\x01\x86\x89"
    ),
    "bytes": b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b".",
}
READER = """
import sys
from spkid.data.tensorfile import NotATensor, read_tensor
try:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))
except ImportError:
    pass
for path in sys.argv[1:]:
    try:
        print(read_tensor(open(path, "rb").read()).shape)
    except NotATensor as error:
        print(error)
"""


def in_zip(pickled):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(16))
    return file.getvalue()


def test_a_tensor_of_these_parts_is_read():
    assert read_tensor(in_zip(tensor_of())).shape == (2, 2)


def test_a_small_file_takes_neither_for_ever_nor_much_memory(tmp_path):
    """Another process reads them: who hangs in a hash can't be stopped."""
    paths = []
    for name, pickled in ENDLESS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(in_zip(pickled))
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = done.stdout.splitlines()
    assert not done.returncode and len(lines) == len(paths), done.stderr
    assert "MemoryError" not in done.stdout
