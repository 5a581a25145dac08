"""A web page that hears a voice and says whose it is."""

from __future__ import annotations

import os
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from spkid.backend import Backend
from spkid.cli import opened, parser_of
from spkid.errors import UserError
from spkid.inference.opening import changing, save_gallery, use_gallery
from spkid.inference.questions import FPIR, Questions

ABOUT = """# Whose voice is this?
Record or upload a few seconds of **one** person speaking. Nothing leaves the
computer that this page comes from. A recording is deleted once it is heard."""
BARS = "If it is an enrolled speaker"
ADD = """### Add a voice
The one heard last, or that of a new recording above. Several recordings of a
speaker make the answers better."""
FIXED = """An ONNX file can't be changed: to add or remove speakers, open this
page with the run's folder instead."""
CSS = """.gradio-container {max-width: 1000px !important; margin: auto}
.answer {min-height: 8rem; overflow-wrap: anywhere}
.answer p:first-child {font-size: 2rem; line-height: 1.2; padding: 0.4rem 0}"""


class Desk:
    """What the page's buttons do. A voice is an embedding and its seconds.

    Example
    -------
    >>> desk = Desk(Questions(), "run")
    >>> desk.do(desk.ask, path=None, voice=None, name="")[1]
    '<div class="answer" role="status"><p>Record or upload a voice first...
    """

    def __init__(self, identifier: Questions, model: str | Path) -> None:
        self.identifier, self.model = identifier, Path(model)

    def speakers(self) -> list[str]:
        """Who is enrolled by now: another process may have changed that."""
        use_gallery(self.identifier, self.model)
        return sorted(self.identifier.backend.speakers)

    def do(self, work, path, voice, name):
        """Hears a recording, if there is one, and then does a button's work.

        Returns the voice heard last, HTML and bars; an error is a sentence.
        """
        try:
            if path:
                voice = None  # if it can't be heard, the last one is forgotten
                voice = self._hear(path)
            if not voice and work != self.forget:
                raise UserError("Record or upload a voice first.")
            return voice, *work(voice, name)
        except UserError as error:  # visitors know no paths
            return voice, _said(str(error).removeprefix(f"{path}: ")), None

    def _hear(self, path):
        try:
            return self.identifier.embed_file(path)
        finally:
            Path(path).unlink(missing_ok=True)

    def ask(self, voice, _):
        """Whose voice it is."""
        heard = f"{voice[1]:.1f} seconds of speech were heard."
        if not self.speakers():
            return _said("unknown", "Nobody is enrolled.", heard), None
        found = self.identifier.answer("", *voice)
        nearest, probability = found.likeliest[0]
        large = {
            "known": f"{nearest}, {probability:.0%}",
            "unknown": "unknown",
            "unsure": "not sure: record more",
        }[found.answer]
        score = (
            f"The likeness to {nearest} is {found.score:.2f}. A name needs "
            f"{found.threshold:.2f}"
        )
        if self.identifier.backend.calibration.n:
            score += f": 1 in {1 / FPIR:.0f} strangers reaches it"
        return _said(large, f"{score}.", heard), dict(found.likeliest)

    def enroll(self, voice, name):
        """Adds a speaker, or a recording of one."""
        if not (name := " ".join(name.split())):
            raise UserError("Type a name, too.")
        backend = self._change(Backend.enroll, name, voice[0][None])
        count = backend.counts[backend.speakers.index(name)]
        return _said(f"{name} is enrolled", f"Recordings: {count}."), None

    def forget(self, _, name):
        """Removes a speaker."""
        if name not in self.speakers():
            raise UserError("Choose a speaker first.")
        self._change(Backend.forget, name)
        return _said(f"{name} is removed"), None

    def _change(self, how, *what):
        with changing(self.model):
            self.speakers()
            backend = how(self.identifier.backend, *what)
            save_gallery(self.model, backend)
            self.identifier.set_backend(backend)
        return backend


def _said(*lines: str) -> str:
    """Lines in HTML, the first in large letters."""
    inside = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="answer" role="status">{inside}</div>'


def build(identifier: Questions, model: str | Path) -> Any:
    """The page, a gradio.Blocks, for a model that was opened."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        cure = "The page needs Gradio; run `pip install 'spkid[demo]'`."
        raise UserError(cure) from None
    desk, fixed = Desk(identifier, model), Path(model).is_file()
    queue: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    # Recordings that nobody asks about are deleted after ten minutes.
    page = gr.Blocks(delete_cache=(60, 600), analytics_enabled=False)
    page.title = "Whose voice is this?"

    def choices():
        return gr.Dropdown(choices=desk.speakers(), value=None)

    def on(button, work, source, named):
        button.click(
            lambda *given: (None, *desk.do(work, *given), choices()),
            [source, voice, named],
            [source, voice, answer, bars, leaver],
            api_name=work.__name__,
            **queue,
        )

    with page:
        gr.Markdown(ABOUT)
        voice, nothing = gr.State(), gr.State()
        with gr.Row():
            with gr.Column():
                recording = gr.Audio(
                    sources=["microphone", "upload"],
                    type="filepath",
                    label="Recording",
                    editable=False,
                    buttons=[],
                )
                ask = gr.Button("Who is this?", variant="primary")
            with gr.Column():
                answer = gr.HTML(_said("The answer will be here."))
                bars = gr.Label(label=BARS, show_heading=False)
        gr.Markdown(FIXED, visible=fixed)
        with gr.Row(visible=not fixed):
            with gr.Column():
                gr.Markdown(ADD)
                comer = gr.Textbox(label="Name", max_length=60)
                add = gr.Button("Add this voice")
            with gr.Column():
                gr.Markdown("### Remove a speaker")
                leaver = gr.Dropdown(label="Speaker")
                remove = gr.Button("Remove")
        on(ask, desk.ask, recording, comer)
        on(add, desk.enroll, recording, comer)
        on(remove, desk.forget, nothing, leaver)
        page.load(choices, None, leaver, api_name="speakers", **queue)
    return page


def main(arguments: list[str]) -> None:
    """Serves the page to this computer until Ctrl-C."""
    parser = parser_of("demo", "Serves a web page to talk to, on 127.0.0.1.")
    parser.add_argument("--port", type=int, help="a free one if not given")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="spkid-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # that no other user reads
        page = build(opened(args), args.model)
        from gradio.themes import Default  # build() has said if it is missing

        look = Default(primary_hue="blue", font="system-ui")
        dark = "*primary_600"  # on which white letters can be read
        try:
            _, address, _ = page.launch(
                server_name="127.0.0.1",
                server_port=args.port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                run_history=False,  # the browser would keep recordings
                theme=look.set(button_primary_background_fill=dark),
                css=CSS,
            )
        except (OSError, OverflowError):
            cure = f"--port {args.port}: can't be used; give another one."
            raise UserError(cure) from None
        print(f"Open {address} on this computer; Ctrl-C ends it.", flush=True)
        page.block_thread()
