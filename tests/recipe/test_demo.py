"""The page to talk to, served by the command, for a run that was trained."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import soundfile
from harness import ENVIRONMENT, TIMEOUT

from mini_corpus import Espeak
from spkid.inference import load

pytest.importorskip("espeakng_loader")
gradio_client = pytest.importorskip("gradio_client")
BROWSERS = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
TEXT = "The old kettle began to sing. We took the early train and walked home."
# As `python -m spkid`; where a shell ignores Ctrl-C, it is heard again.
COMMAND = """import signal; from spkid.cli import run
signal.signal(signal.SIGINT, signal.default_int_handler); run()"""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two voices, and silence."""
    folder, espeak = tmp_path_factory.mktemp("voices"), Espeak()
    ann, bob = (espeak.speak(TEXT, f"en-us+{v}") for v in ("f1", "m3"))
    for name, samples in {"ann": ann, "bob": bob, "none": 0 * ann}.items():
        soundfile.write(folder / f"{name}.wav", samples, espeak.sample_rate)
    return folder


@pytest.fixture(scope="module")
def served(finished, tmp_path_factory):
    """The page's address, its model, and where it keeps what is uploaded."""
    folder = tmp_path_factory.mktemp("demo")
    model, uploads = folder / "run", folder / "uploads"
    shutil.copytree(finished[0], model)
    uploads.mkdir()
    with open(folder / "errors", "w+") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "demo", str(model)],
            env={**ENVIRONMENT, "TMPDIR": str(uploads)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        said = server.stdout.readline()
        address = re.match(r"Open (http://127\.0\.0\.1:\d+/) on this", said)
        assert address, (folder / "errors").read_text()
        yield address[1], model, uploads
        if os.name == "nt":  # where only a console sends Ctrl-C
            server.kill()
        else:
            server.send_signal(signal.SIGINT)
            assert server.wait(TIMEOUT) == 0
            assert not [*uploads.iterdir()]
        server.communicate()
    assert (folder / "errors").read_text() == ""


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_page_answers_as_the_command_does(served, recordings):
    address, model, uploads = served
    client = gradio_client.Client(
        address, verbose=False, analytics_enabled=False
    )
    file = gradio_client.handle_file(str(recordings / "ann.wav"))
    answer, bars = client.predict(file, "", api_name="/ask")[1:3]
    found = load(model).identify(recordings / "ann.wav")
    name, probability = found.likeliest[0]
    assert f"The likeness to {name} is {found.score:.2f}." in answer
    assert bars["confidences"][0] == {
        "label": name,
        "confidence": pytest.approx(probability),
    }
    assert not files(uploads)


@pytest.fixture(scope="module")
def browser(recordings):
    """A browser without a window, that hears Ann instead of a microphone."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright isn't installed"
    )
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        ears = recordings / "ann.wav"
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={ears}",
            ],
        )
        yield browser
        browser.close()


class Visitor:
    """Uses the page as people do."""

    def __init__(self, browser, address):
        from playwright.sync_api import expect

        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(1000 * TIMEOUT)
        expect.set_options(timeout=1000 * TIMEOUT)
        self.address, self.expect = address, expect
        self.elsewhere, self.failed = [], []  # addresses
        self.page.on("request", self.watch)
        self.page.on("response", self.check)
        self.page.goto(address)
        self.answer = self.page.locator(".answer")

    def watch(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def check(self, response):
        if response.status >= 400:
            self.failed.append(response.url)

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def record(self, seconds):
        self.button("Record").click()
        self.expect(self.page.get_by_text(f"0:0{seconds}")).to_be_visible()
        with self.arrival():
            self.button("Stop").click()
        self.button("Play").wait_for()

    def upload(self, path):
        self.button("Upload file").click()
        with self.arrival():
            self.page.locator("input[type=file]").set_input_files(path)
        self.button("Play").wait_for()

    def arrival(self):
        """Waits until the server has got the recording."""
        return self.page.expect_response(lambda one: "/upload" in one.url)

    def press(self, name, *words):
        """By the keyboard; the answer has these words, and the recording is
        gone."""
        self.button(name).press("Enter")
        for word in words:
            self.expect(self.answer).to_contain_text(word)
        self.button("Play").wait_for(state="hidden")
        return self.answer.inner_text()


@pytest.mark.slow
def test_visit_by_microphone_and_upload(served, recordings, browser, tmp_path):
    address, _, uploads = served
    visitor = Visitor(browser, address)
    page, expect = visitor.page, visitor.expect

    visitor.record(seconds=3)
    assert files(uploads)
    answer = visitor.press("Who is this?", "seconds of speech were heard.")
    assert 1 < float(re.search(r"([\d.]+) seconds of speech", answer)[1]) < 30
    assert re.search(r"The likeness to id\d{5} is -?\d", answer)
    assert not files(uploads)
    page.screenshot(path=tmp_path / "demo.png")

    visitor.upload(recordings / "bob.wav")
    page.get_by_label("Name").fill("Bob <i>")
    visitor.press("Add this voice", "Bob <i> is enrolled", "Recordings: 1.")
    visitor.upload(recordings / "bob.wav")
    visitor.press("Who is this?", "The likeness to Bob <i> is")
    bar = page.get_by_role("meter").first
    expect(bar).to_have_accessible_name("Bob <i>")
    assert not files(uploads)

    page.get_by_role("combobox", name="Speaker").click()
    page.get_by_role("option", name="Bob <i>").click()
    visitor.press("Remove", "Bob <i> is removed")
    # The voice heard last is still at hand.
    assert "likeness to id" in visitor.press("Who is this?", "likeness to")
    page.get_by_role("combobox", name="Speaker").click()
    expect(page.get_by_role("option")).to_have_count(4)

    visitor.upload(recordings / "none.wav")
    said = visitor.press("Who is this?", "silent")
    assert str(uploads) not in said and "\n" not in said.strip()

    page.set_viewport_size({"width": 390, "height": 844})  # a phone's
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert visitor.elsewhere == visitor.failed == []
