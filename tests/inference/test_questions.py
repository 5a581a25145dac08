"""What a trained system answers, and what its commands print."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from spkid import cli
from spkid.audio import SAMPLE_RATE
from spkid.backend import Backend, Calibration, Tail
from spkid.errors import UserError
from spkid.inference import opening
from spkid.inference.questions import PIECE, Questions, pieces

SIZE = 8


class Pitch(Questions):
    """A model whose embedding is the direction of a tone's frequency."""

    silence = "hw4"

    def __init__(self, backend):
        self.backend = backend

    def embed_waveforms(self, waveforms):
        found = []
        for waveform in waveforms:
            power = np.abs(np.fft.rfft(waveform[:16000], 16000)) ** 2
            bands = power[: 400 * SIZE].reshape(SIZE, 400).sum(1)
            found.append(np.sqrt(bands).astype(np.float32))
        return np.stack(found)


def tone(folder, name, hertz, seconds=1.0):
    path = folder / f"{name}.wav"
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * time), SAMPLE_RATE)
    return path


@pytest.fixture
def model():
    means = np.eye(SIZE, dtype=np.float32)[:6]
    law = Calibration(
        *(20.0, 6, Tail(0.2, 0.05, 0.3), Tail(-0.8, 0.1, 0.3)),
        *(Tail(0.3, 0.05, 0.05), 100),
    )
    names = ["ann", "bob", "cem", "dee", "eva", "flo"]
    backend = Backend.of_means(means, names)
    return Pitch(replace(backend, calibration=law))


@pytest.fixture
def command(model, monkeypatch, capsys, tmp_path):
    """Runs spkid's command in this process; gives status, output, errors."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)

    def load(path, *_):
        gallery = folder / "model" / opening.GALLERY
        if gallery.exists():
            model.set_backend(Backend.load(gallery))
        return model

    monkeypatch.setattr("spkid.inference.load", load)

    def run(name, *arguments):
        line = ["spkid", name, str(folder), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        status = 0
        try:
            cli.run()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.5, [0.5]),
        (80, [80]),
        (81, [40, 20.5, 20.5]),
        (119, [40, 39.5, 39.5]),
        (125, [40, 40, 22.5, 22.5]),
        (3600, [40] * 88 + [40, 40]),
    ],
)
def test_long_speech_is_cut_and_nothing_is_lost(seconds, expected):
    speech = np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32)
    blocks = [speech[i : i + 77_777] for i in range(0, len(speech), 77_777)]
    found = list(pieces(blocks))
    assert [len(piece) / SAMPLE_RATE for piece in found] == expected
    np.testing.assert_array_equal(np.concatenate(found), speech)
    assert PIECE == 40 * SAMPLE_RATE


def test_known_unknown_and_unsure(model, tmp_path):
    bob = model.identify(tone(tmp_path, "b", 600))
    assert (bob.answer, bob.speaker) == ("known", "bob")
    assert bob.probability == bob.likeliest[0][1] > 0.99
    assert bob.likeliest[0][0] == "bob" and len(bob.likeliest) == 5
    assert bob.score >= bob.threshold
    assert bob.seconds == pytest.approx(1.0, abs=0.05)
    stranger = model.identify(tone(tmp_path, "s", 2600))
    assert (stranger.answer, stranger.speaker) == ("unknown", None)
    named = model.identify(tone(tmp_path, "s", 2600), closed_set=True)
    assert named.speaker == named.likeliest[0][0]
    law = replace(model.backend.calibration, missed=Tail(2.0, 0.1, 0.3))
    model.backend = replace(model.backend, calibration=law)
    unsure = model.identify(tone(tmp_path, "s", 2600))
    assert (unsure.answer, unsure.speaker) == ("unsure", None)


def test_a_higher_rate_lets_more_pass(model, tmp_path):
    path = tone(tmp_path, "b", 600)
    thresholds = [model.identify(path, rate).threshold for rate in (0.001, 0.1)]
    assert thresholds[0] > thresholds[1]


def test_verify(model, tmp_path):
    a, b = tone(tmp_path, "a", 500), tone(tmp_path, "b", 700)
    other = tone(tmp_path, "c", 1500)
    assert model.verify(a, b).same
    assert not model.verify(a, other).same


def test_enrol_and_forget(model, tmp_path):
    paths = [tone(tmp_path, f"g{i}", 2500 + 50 * i) for i in range(3)]
    model.enroll("Gül", paths[:2])
    assert model.identify(paths[2]).speaker == "Gül"
    model.forget("Gül", "ann")
    assert model.identify(paths[2]).speaker is None
    assert model.backend.speakers == ("bob", "cem", "dee", "eva", "flo")
    with pytest.raises(UserError, match="ann: nobody of that name"):
        model.forget("ann")
    model.forget(*model.backend.speakers)
    assert model.identify(paths[0]).answer == "unknown"


def test_a_long_recording_is_the_mean_of_its_pieces(model, tmp_path):
    path = tone(tmp_path, "long", 600, 100)
    embedding, seconds = model.embed_file(path)
    assert seconds == pytest.approx(100, abs=0.1)
    assert embedding.argmax() == 1
    assert model.identify(path).speaker == "bob"


def test_who_speaks_when(command, tmp_path, monkeypatch):
    """The detector hears no tones, so that its places are given."""
    hertz = [600, 600, 2600, 100, 100]
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tones = [0.5 * np.sin(2 * np.pi * pitch * time) for pitch in hertz]
    path = tmp_path / "meeting.wav"
    soundfile.write(path, np.concatenate(tones), SAMPLE_RATE)
    places = [(i * 32_000, (i + 1) * 32_000) for i in range(5)]
    module = sys.modules["spkid.audio.speech"]  # a function has its name
    monkeypatch.setattr(module, "_places", lambda *_: places)
    said = command("identify", path, "--windows", "--json")[1]
    segments = json.loads(said)[0]["segments"]
    assert [
        (part["start"], part["end"], part["speaker"]) for part in segments
    ] == [(0, 4, "bob"), (4, 6, None), (6, 10, "ann")]
    said = command("identify", path, "--windows")[1]
    assert said.splitlines()[1:] == [
        "  0.0 s to 4.0 s: bob",
        "  4.0 s to 6.0 s: unknown or not sure",
        "  6.0 s to 10.0 s: ann",
    ]


def test_identify_in_words_and_as_json(command, tmp_path):
    bob, stranger = tone(tmp_path, "b", 600), tone(tmp_path, "s", 2600)
    status, said, _ = command("identify", bob, stranger)
    assert status == 0
    assert said.splitlines()[0] == f"{bob}: bob (100%)"
    assert said.splitlines()[1].startswith(f"{stranger}: unknown; nearest: ")
    status, said, _ = command("identify", bob, stranger, "--json")
    answers = json.loads(said)
    assert status == 0
    assert [a["file"] for a in answers] == [str(bob), str(stranger)]
    assert [a["speaker"] for a in answers] == ["bob", None]
    assert all(0 <= a["probability"] <= 1 for a in answers)
    assert command("identify", stranger)[0] == 1
    assert command("identify", stranger, "--closed_set")[0] == 0


def test_one_bad_file_does_not_stop_the_others(command, tmp_path):
    bob, bad = tone(tmp_path, "b", 600), tmp_path / "bad.wav"
    bad.write_text("no sound")
    status, said, errors = command("identify", bad, bob, "--json")
    assert status == 2
    assert [a["speaker"] for a in json.loads(said)] == ["bob"]
    assert errors.startswith("Error: ") and "bad.wav" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("what", ["missing", "silent", "folder", "empty"])
def test_trouble_is_one_sentence_and_2(command, tmp_path, what):
    path = tmp_path / "x.wav"
    if what == "silent":
        soundfile.write(path, np.zeros(16000), 16000)
    elif what == "folder":
        path.mkdir()
    elif what == "empty":
        path.write_bytes(b"")
    good = tone(tmp_path, "b", 600)
    for line in (
        ("identify", path),
        ("verify", good, path),
        ("enroll", "x", path),
        ("embed", path, "--output", tmp_path / "e.npz"),
    ):
        status, said, errors = command(*line)
        assert (status, said) == (2, ""), line
        assert errors.startswith("Error: ") and "x.wav" in errors
        assert len(errors.splitlines()) == 1, errors


def test_verify_commands(command, tmp_path):
    a, b = tone(tmp_path, "a", 500), tone(tmp_path, "b", 700)
    other = tone(tmp_path, "c", 1500)
    assert command("verify", a, b)[0] == 0
    status, said, _ = command("verify", a, other, "--json")
    found = json.loads(said)
    assert status == 1
    assert found["same"] is False
    assert found["score"] < found["threshold"]


def test_enrolment_lasts(command, tmp_path):
    path = tone(tmp_path, "g", 2500)
    status, said, _ = command("enroll", "Gül", path)
    assert (status, said.split(": ")[1]) == (0, "7 speakers are enrolled\n")
    assert command("identify", path)[1].startswith(f"{path}: Gül")
    assert command("forget", "Gül", "bob")[0] == 0
    assert command("identify", path)[0] == 1
    status, said, _ = command("enroll", "Gül", path, "--alone")
    assert said.endswith(": 1 speakers are enrolled\n")
    status, _, errors = command("forget", "nobody")
    assert status == 2 and "nobody of that name" in errors


def test_embeddings_compare_by_dot_product(command, model, tmp_path):
    paths = [tone(tmp_path, "a", 500), tone(tmp_path, "b", 600)]
    out = tmp_path / "e.npz"
    assert command("embed", *paths, "--output", out)[0] == 0
    with np.load(out) as found:
        assert found["path"].tolist() == [str(path) for path in paths]
        np.testing.assert_allclose(
            np.linalg.norm(found["embedding"], axis=1), 1, rtol=1e-5
        )


def test_an_embedding_that_is_not_finite_is_never_enrolled(
    command, model, tmp_path
):
    path = tone(tmp_path, "a", 500)
    model.embed_waveforms = lambda waveforms: np.full((1, SIZE), np.nan)
    for name in ("identify", "verify", "enroll", "embed"):
        status, said, errors = command(name, path, path)
        assert (status, said) == (2, "")
        assert "no finite embedding" in errors


def test_what_was_not_measured_is_said(command, model, tmp_path):
    path = tone(tmp_path, "b", 600)
    assert command("identify", path)[2] == ""
    law = replace(model.backend.calibration, n=0)
    model.backend = replace(model.backend, calibration=law)
    status, _, errors = command("identify", path)
    assert status == 0 and "the --fpir isn't promised" in errors
    assert command("identify", path, "--closed_set")[2] == ""


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x1b[31m", "x" * 201])
def test_names_are_one_line(command, tmp_path, name):
    status, _, errors = command("enroll", name, tone(tmp_path, "a", 500))
    assert status == 2 and "must be one line" in errors


def test_a_gallery_of_other_weights_is_refused(model, tmp_path):
    other = replace(model.backend, projection=2 * np.eye(SIZE, dtype="f"))
    opening.save_gallery(tmp_path, other)
    with pytest.raises(UserError, match="is of other weights; enrol again"):
        opening.use_gallery(model, tmp_path)
    (tmp_path / opening.GALLERY).write_text("bad")
    with pytest.raises(UserError, match=r"can't be loaded.*removing it"):
        opening.use_gallery(model, tmp_path)


@pytest.mark.parametrize("rate", ["0", "1", "-1", "x", "nan", "0.31"])
def test_a_rate_lies_between_0_and_1(command, tmp_path, rate):
    path = tone(tmp_path, "a", 500)
    status, _, errors = command("identify", path, "--fpir", rate)
    assert status == 2 and "fpir" in errors


def test_an_onnx_file_is_not_changed(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    with (
        pytest.raises(UserError, match="can't be changed"),
        opening.changing(path),
    ):
        pass


def test_unknown_commands_and_help(monkeypatch, capsys):
    for line, status in ((["-h"], 0), ([], 2), (["idnetify"], 2)):
        monkeypatch.setattr(sys, "argv", ["spkid", *line])
        code = 0
        try:
            cli.run()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        assert code == status
        assert "identify" in printed.out + printed.err
