"""The page to talk to: its buttons, without a browser."""

import re
import socket
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from spkid.backend import Backend
from spkid.backend.scoring import Calibration, Tail
from spkid.errors import UserError
from spkid.inference import demo
from spkid.inference.opening import GALLERY
from spkid.inference.questions import Questions

RATE, VOICES = 16000, (200, 400, 800, 1600)  # Hz


def record(path, *hertz, seconds=1.5):
    """A voice is a tone, and a blend of several is near each; none is
    silence."""
    time_ = np.arange(int(RATE * seconds)) / RATE
    tones = [np.sin(2 * np.pi * f * time_ + 0.1) for f in hertz]
    soundfile.write(path, sum(tones, 0 * time_) / 4, RATE)
    return path


class Ear(Questions):
    """Hears how loud each tone is; notes how many ask at the same time."""

    silence = "hw4"

    def __init__(self):
        names = ["ann", "b<i>b"]
        # Strangers end at 0.66, and speakers begin at 0.4.
        worth = Calibration(9.0, 2, Tail(0.66), Tail(-0.4), n=50)
        self.backend = replace(
            Backend.of_means(np.eye(4)[:2], names), calibration=worth
        )
        self.asking, self.most = 0, 0

    def embed_waveforms(self, waveforms):
        self.asking += 1
        self.most = max(self.most, self.asking)
        time.sleep(0.01)  # another one could come in
        self.asking -= 1
        return np.stack([self.loudness(waveform) for waveform in waveforms])

    def loudness(self, waveform):
        time_ = np.arange(len(waveform)) / RATE
        waves = np.exp(2j * np.pi * np.outer(VOICES, time_))
        return np.abs(waves @ waveform)


@pytest.fixture
def desk(tmp_path):
    return demo.Desk(Ear(), tmp_path)


@pytest.fixture
def wav(tmp_path):
    return lambda *hertz: record(tmp_path / "a.wav", *hertz)


def text(answer):
    """Its lines."""
    return re.findall("<p>(.*?)</p>", answer)


def test_answers_name_who_is_known_and_what_it_is_worth(desk, wav):
    voice, answer, bars = desk.do(desk.ask, wav(200), None, "")
    assert text(answer) == [
        "ann, 100%",
        "The likeness to ann is 1.00. A name needs 0.66: 1 in 100 strangers "
        "reaches it.",
        "1.5 seconds of speech were heard.",
    ]
    assert max(bars, key=bars.get) == "ann"
    assert sum(bars.values()) == pytest.approx(1)
    assert voice[1] == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize(
    "hertz, large",
    [((1600,), "unknown"), ((200, 800, 1600), "not sure: record more")],
)
def test_strangers_and_unsure_answers_give_no_name(desk, wav, hertz, large):
    _, answer, bars = desk.do(desk.ask, wav(*hertz), None, "")
    assert text(answer)[0] == large
    assert "1 in 100 strangers" in text(answer)[1]
    assert set(bars) == {"ann", "b<i>b"}


def test_nothing_is_promised_that_was_not_measured(desk, wav):
    backend = desk.identifier.backend
    unmeasured = replace(backend, calibration=Calibration(9.0))
    desk.identifier.set_backend(unmeasured)
    assert "strangers" not in desk.do(desk.ask, wav(200), None, "")[1]


def test_names_are_text_on_the_page(desk, wav):
    answer = desk.do(desk.ask, wav(400), None, "")[1]
    assert text(answer)[0] == "b&lt;i&gt;b, 100%"


def test_recordings_are_deleted_once_heard(desk, tmp_path, wav):
    desk.do(desk.ask, wav(200), None, "")
    desk.do(desk.enroll, wav(200), None, "cleo")
    desk.do(desk.ask, wav(), None, "")  # silence
    assert not list(tmp_path.glob("*.wav"))


def test_errors_are_one_sentence_without_a_path(desk, tmp_path, wav):
    heard = desk.do(desk.ask, wav(200), None, "")[0]
    noise = tmp_path / "b.wav"
    noise.write_text("not sound")
    cases = [(wav(), "silent"), (noise, ""), (None, "Record or upload")]
    for path, word in cases:
        # The voice of before isn't taken for what couldn't be heard.
        before = heard if path else None
        voice, answer, bars = desk.do(desk.ask, path, before, "")
        assert voice is bars is None
        (sentence,) = text(answer)
        assert word in sentence and sentence.endswith(".")
        assert str(tmp_path) not in sentence


def test_enrolled_voices_are_known_at_once_and_can_be_forgotten(
    desk, tmp_path, wav
):
    voice, answer, _ = desk.do(desk.ask, wav(800), None, "")
    assert text(answer)[0] == "unknown"
    # The recording is gone, but not what was heard.
    voice, answer, bars = desk.do(desk.enroll, None, voice, "  zoë\n b ")
    assert text(answer) == ["zoë b is enrolled", "Recordings: 1."]
    assert bars is None
    answer = desk.do(desk.ask, None, voice, "")[1]
    assert text(answer)[0] == "zoë b, 100%"
    answer = desk.do(desk.enroll, wav(800), voice, "zoë b")[1]
    assert text(answer)[1] == "Recordings: 2."
    kept = Backend.load(tmp_path / GALLERY)
    assert kept.speakers == ("ann", "b<i>b", "zoë b")
    answer = desk.do(desk.forget, None, None, "zoë b")[1]
    assert text(answer) == ["zoë b is removed"]
    assert "zoë b" not in Backend.load(tmp_path / GALLERY).speakers


def test_nobody_is_enrolled(desk, wav):
    backend = desk.identifier.backend
    desk.identifier.set_backend(backend.forget(*backend.speakers))
    _, answer, bars = desk.do(desk.ask, wav(200), None, "")
    assert text(answer)[:2] == ["unknown", "Nobody is enrolled."]
    assert bars is None


@pytest.mark.parametrize("button, word", [("enroll", "name"), ("forget", "Ch")])
def test_no_name_is_a_sentence(desk, tmp_path, wav, button, word):
    work = getattr(desk, button)
    voice, answer, _ = desk.do(work, wav(200), None, " ")
    assert voice and word in answer  # the recording needn't be made again
    assert not (tmp_path / GALLERY).exists()


def test_speakers_that_another_process_added_stay(desk, tmp_path, wav):
    other = demo.Desk(Ear(), tmp_path)
    desk.do(desk.enroll, wav(800), None, "cleo")
    other.do(other.enroll, wav(1600), None, "dan")
    assert {"cleo", "dan"} < set(Backend.load(tmp_path / GALLERY).speakers)
    assert text(desk.do(desk.ask, wav(1600), None, "")[1])[0] == "dan, 100%"


def test_onnx_file_keeps_its_speakers(tmp_path, wav):
    model = tmp_path / "model.onnx"
    model.touch()
    desk = demo.Desk(Ear(), model)
    answer = desk.do(desk.enroll, wav(800), None, "cleo")[1]
    assert "ONNX file can&#x27;t be changed" in text(answer)[0]
    assert text(desk.do(desk.ask, wav(800), None, "")[1])[0] == "unknown"


def test_missing_gradio_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'spkid\[demo\]'"):
        demo.build(Ear(), tmp_path)


def shown(page):
    """Whether a visitor sees each part that has a label or a text."""
    parts = {}

    def walk(nodes, visible):
        for node in nodes:
            props = by_id[node["id"]]["props"]
            seen = visible and props.get("visible", True)
            parts[props.get("label") or props.get("value")] = seen
            walk(node.get("children") or [], seen)

    config = page.get_config_file()
    by_id = {part["id"]: part for part in config["components"]}
    walk(config["layout"]["children"], True)
    return parts


@pytest.mark.slow
def test_page_of_an_onnx_file_cant_enrol(tmp_path):
    pytest.importorskip("gradio")
    model = tmp_path / "model.onnx"
    model.touch()
    for where, fixed in ((tmp_path, False), (model, True)):
        parts = shown(demo.build(Ear(), where))
        assert parts["Recording"] and parts["Who is this?"]
        assert parts["Name"] == parts["Speaker"] == (not fixed)
        assert any("ONNX" in str(p) and parts[p] for p in parts) == fixed


@pytest.fixture
def served(monkeypatch, tmp_path):
    """The page's address, what answers, its folders, and where it calls."""
    pytest.importorskip("gradio")
    uploads, called = tmp_path / "uploads", []
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda self, address: (
            called.append(address[0]) or connect(self, address)
        ),
    )
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *more, **and_more: (
            called.append(host) or look_up(host, *more, **and_more)
        ),
    )
    ear, model = Ear(), tmp_path / "run"
    model.mkdir()
    page = demo.build(ear, model)
    _, address, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True
    )
    yield address, ear, model, uploads, called
    page.close(verbose=False)


@pytest.mark.slow
def test_two_visitors_at_once_lose_nothing(served, tmp_path, capfd):
    gradio_client = pytest.importorskip("gradio_client")
    address, ear, model, uploads, called = served
    launched = called.copy()
    clients = [
        gradio_client.Client(address, verbose=False, analytics_enabled=False)
        for _ in "ab"
    ]
    called.clear()  # the client calls its makers; the page must not
    files = [
        gradio_client.handle_file(str(record(tmp_path / f"{f}.wav", f)))
        for f in VOICES
    ]
    jobs = [
        clients[i % 2].submit(file, f"new {i}", api_name="/enroll")
        for i, file in enumerate(files)
    ]
    answers = [job.result() for job in jobs]
    assert [text(answer[1])[0] for answer in answers] == [
        f"new {i} is enrolled" for i in range(4)
    ]
    assert ear.most == 1
    kept = Backend.load(model / GALLERY).speakers
    assert set(kept) == {"ann", "b<i>b", *(f"new {i}" for i in range(4))}
    answer = clients[0].predict(files[3], "", api_name="/ask")
    assert text(answer[1])[0] == "new 3, 100%"
    assert answer[2]["confidences"][0]["label"] == "new 3"
    answer = clients[1].predict("new 3", api_name="/forget")
    assert text(answer[0])[0] == "new 3 is removed"
    # Whatever was uploaded is gone; nobody was called but this machine.
    assert not [path for path in uploads.rglob("*") if path.is_file()]
    assert set(launched + called) == {"127.0.0.1"}
    assert capfd.readouterr().err == ""


def test_port_that_is_taken_is_one_sentence(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setattr(demo, "opened", lambda args: Ear())
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port}: can't be used"):
            demo.main([str(tmp_path), "--port", port])
