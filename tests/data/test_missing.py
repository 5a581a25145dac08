"""Where something is missing, it is said what is there instead."""

import errno
import os
import unicodedata
from pathlib import Path

import pytest

from spkid.data import missing
from spkid.errors import Problem, UserError


def explain(folder, listed, there):
    """What is said of each listed path, where these files are there."""
    for name in there:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lost = [
        Problem(name, "", missing.MISSING, missing.AGAIN)
        for name in listed
        if name not in there
    ]
    problems, whole = missing.explain(lost, folder, listed)
    said = {p.file: f"{p.what}; {p.cure}" for p in problems}
    return said, [p.sentence(Path("data")) for p in whole]


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("a.pt", "A.pt"),
        ("a.pt", "a.PT"),
        ("Straße.pt", "STRASSE.pt"),
        (unicodedata.normalize("NFC", "é.pt"), "e\u0301.pt"),
        (unicodedata.normalize("NFD", "É.pt"), "\u00e9.pt"),
        ("uttr\\a.pt", "uttr/a.pt"),
        ("uttr\\b\\a.pt", "uttr/b/a.pt"),
        ("./ID1//a.pt", "id1/a.pt"),
        ("id1/a.pt", "a.pt"),
        ("a.pt", "id1/a.pt"),
        ("data/id1/a.pt", "id1/a.pt"),
        ("id1/a.pt", "x/y/z/id1/a.pt"),
        ("a.pt", "a.npy"),
        ("id1\\a.pt", "x/ID1/A.npy"),
    ],
)
def test_a_file_like_it_is_named(tmp_path, listed, there):
    said, whole = explain(tmp_path, [listed, "b.pt"], [there, "b.pt"])
    assert not whole
    start = f"{missing.MISSING}, but there is {there!a}; "
    assert said[listed].startswith(start)
    cure = "save it with torch.save" if there.endswith("y") else "correct the"
    assert said[listed][len(start) :].startswith(cure)


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        (["a.pt", "b.pt"], ["b.pt"]),
        (["id1/a.pt", "id2/a.pt"], ["id2/a.pt"]),  # the other's
        (["id1/a.pt", "b.pt"], ["b.pt", "x/a.pt", "y/a.pt"]),  # which?
        (["id1/a.pt", "id2/a.pt", "b.pt"], ["a.pt", "b.pt"]),  # whose?
        (["a.pt", "b.pt"], ["b.pt", "ab.pt", "a.pt.part"]),
    ],
)
def test_what_is_not_meant_for_sure_is_not_named(tmp_path, listed, there):
    said, whole = explain(tmp_path, listed, there)
    assert not whole
    assert all(f"; {missing.AGAIN}" in words for words in said.values()), said
    assert "there is" not in str(said)


def test_where_all_are_missing_one_sentence_says_so(tmp_path):
    listed = [f"id{n}\\{m}.pt" for n in range(9) for m in range(9)]
    said, whole = explain(tmp_path, listed, [])
    assert not said
    assert whole == [
        f"data: none of the 81 feature files is there, as {listed[0]!a}; "
        "unpack the feature files into this folder."
    ]
    there = [name.replace("\\", "/") for name in listed]
    said, whole = explain(tmp_path, listed, there)
    assert not said
    assert whole == [
        f"data: none of the 81 feature files is there, as {listed[0]!a}, but "
        f"there is {there[0]!a}; correct the JSON, or rename the file."
    ]


def test_a_hostile_list_costs_little(tmp_path):
    """A path of a thousand folders, and a folder of more files than most."""
    listed = [f"{'a/' * 1000}{n}.pt" for n in range(2000)]
    said, whole = explain(tmp_path, [*listed, "b.pt"], ["b.pt"])
    assert len(said) == 2000 and not whole
    assert sum(map(len, missing._keys(listed[0]))) < 100


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 250, "there is no such folder; needed"),
        ("x" * 5000, "can't be opened (File name too long); give a shorter"),
        ("a/" * 3000, "can't be opened (File name too long); give a shorter"),
        ("a\0b", "has a NUL character; needed"),
        ("file", "is not a folder; needed"),
        ("file/b", "there is no such folder; needed"),
        ("circle", "can't be opened (Too many levels of symbolic links); "),
        ("dangling", "there is no such folder; needed"),
    ],
)
def test_what_is_no_folder_is_refused_in_a_sentence(tmp_path, name, words):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError) as caught:
        missing.check_folder(tmp_path / name, "needed")
    assert f": {words}" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "change its perm"),
        (OSError(errno.EIO, "Input/output error"), "check the disk"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), "set the environment v"),
    ],
)
def test_a_folder_that_the_system_refuses(monkeypatch, error, words):
    def refuse(*_):
        raise error

    monkeypatch.setattr(missing.os, "stat", refuse)
    with pytest.raises(UserError, match=words):
        missing.check_folder(Path("data"), "needed")


def test_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "empty").touch()
    for name, words in {
        "a": "",
        "link": "",
        "a/b": "is missing",
        "none": "is missing",
        "empty": "has no bytes",
        "circle": "can't be read (Too many levels",
        "x" * 300: "can't be read (File name too long",
        ".": "is not a regular file",
    }.items():
        place, what, cure = missing.look_at(os.path.join(tmp_path, name))
        assert words in what and bool(what) == bool(cure) == bool(words)
        if not what:
            assert place == str(tmp_path / "a")
