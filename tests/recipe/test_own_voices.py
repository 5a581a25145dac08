"""docs/own_voices.md: its commands run, and print what the page says.

After a change: ``python tests/recipe/test_own_voices.py --write`` runs them and
writes what they print into the page.
"""

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import ROOT, TIMEOUT, start

import mini_corpus

PAGE = ROOT / "docs" / "own_voices.md"
WRITE = "WRITE_OWN_VOICES"  # in the environment
# Commands, and what they print: to be executed, in this order.
BLOCK = re.compile(
    r"^(```(bash|python)\n(.*?)^```\n\n```text\n)(.*?)^```$", re.M | re.S
)
# Lines of loggers; the page has "..." in their place.
LOGGED = re.compile(r"(speechbrain|spkid)\.[\w.]+ - |\* ")
# Numbers that depend on the last bits of a machine's arithmetic.
MEASURED = re.compile(r"-?\d+\.\d+|\d+(?=%)")
LIMIT = 1200  # seconds for a command; a busy machine trains for minutes
DAYS = ("monday", "tuesday", "wednesday", "thursday")
SPEAKERS = ("anna", "ben", "carla", "david", "eva")
SPEAKERS += ("finn", "greta", "hugo", "ida", "jonas")


def make_recordings(folder: Path) -> None:
    """What the page begins with: in ``recordings`` ten speakers and two files
    of no use, in ``new`` later recordings, also of two strangers."""
    spoken = folder / "spoken"
    mini_corpus.build(
        folder / "mini",
        seed=1,
        n_speakers=12,
        n_sessions=len(DAYS),
        n_sentences=3,
        recordings=spoken,
        progress=False,
    )
    (folder / "new").mkdir()
    voices = sorted(spoken.iterdir())
    for name, voice in zip((*SPEAKERS, "kim", "leo"), voices, strict=True):
        *sessions, last = sorted(voice.iterdir())
        home = folder / ("recordings" if name in SPEAKERS else "new") / name
        for day, session in zip(DAYS, sessions, strict=True):
            (home / day).mkdir(parents=True)
            for number, file in enumerate(sorted(session.iterdir()), 1):
                shutil.move(file, home / day / f"{number}.wav")
        for number, file in enumerate(sorted(last.iterdir()), 1):
            shutil.move(file, folder / "new" / f"{name}-{number}.wav")
    (folder / "recordings" / "anna" / "notes.txt").write_text("Room 3.")
    monday = folder / "recordings" / "ben" / "monday"
    shutil.copy(monday / "1.wav", monday / "copy of 1.wav")


def printed_by(language: str, code: str, folder: Path) -> str | None:
    """What a block of the page prints; None if it can't run here."""
    if language == "python":
        here, said = Path.cwd(), io.StringIO()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(said):
                exec(code, {})
        finally:
            os.chdir(here)
        return said.getvalue()
    texts = []
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line)
        if words[0] == "mv":
            shutil.move(folder / words[1], folder / words[2])
            continue
        if words[:4] == ["python", "-m", "spkid", "demo"]:
            return served(words[3:], folder) if find_spec("gradio") else None
        if words[:3] == ["python", "-m", "spkid"]:
            running = start("spkid.cli", words[3:], folder)
        else:
            assert words[:2] == ["python", "train.py"], line
            packs = "--pack_folder=packs"  # not in this project's data
            running = start("train", [*words[2:], packs], folder, report=True)
        done = running.wait(LIMIT)
        assert done.returncode in (0, 1), done.stderr
        assert "Error" not in done.stderr, done.stderr
        texts.append(done.stdout)
    return "".join(texts)


def served(words: list[str], folder: Path) -> str:
    """The first line of a command that only Ctrl-C would end."""
    page = start("spkid.cli", words, folder)
    deadline = time.monotonic() + TIMEOUT
    while "\n" not in page.printed("stdout") and page.process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    page.send(signal.SIGINT)
    first, end, _ = page.wait(LIMIT).stdout.partition("\n")
    return first + end


def shown(text: str, folder: Path) -> str:
    """As on the page: without logs, with the usual port, in no folder."""
    lines: list[str] = []
    text = text.replace(os.path.join(os.path.realpath(folder), ""), "")
    for line in text.splitlines():
        said = "..." if LOGGED.match(line) else line
        if said != "..." or lines[-1:] != ["..."]:
            lines.append(re.sub(r"(127\.0\.0\.1):\d+", r"\1:7860", said))
    return "".join(f"{line}\n" for line in lines)


def assert_alike(told: str, printed: str) -> None:
    """All words, names and whole numbers are the same; what is measured may
    differ as it does between machines."""
    assert MEASURED.sub("#", told) == MEASURED.sub("#", printed)
    for ours, theirs in zip(
        MEASURED.findall(told), MEASURED.findall(printed), strict=True
    ):
        assert math.isclose(
            float(ours), float(theirs), rel_tol=0.3, abs_tol=0.3
        ), f"{printed}\nis not\n{told}"


@pytest.mark.slow
def test_the_pages_commands_print_what_it_says(tmp_path):
    pytest.importorskip("espeakng_loader")
    make_recordings(tmp_path)
    shutil.copytree(ROOT / "hparams", tmp_path / "hparams")
    page, writing = PAGE.read_text(encoding="utf-8"), os.environ.get(WRITE)
    assert len(BLOCK.findall(page)) == len(re.findall("^```(b|p)", page, re.M))

    def execute(match) -> str:
        head, language, code, told = match.groups()
        printed = printed_by(language, code, tmp_path)
        if printed is None:
            return match[0]
        printed = shown(printed, tmp_path)
        if not writing:
            assert_alike(told, printed)
        return f"{head}{printed}```"

    written = BLOCK.sub(execute, page)
    if writing:
        PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    os.environ[WRITE] = "yes"
    sys.exit(pytest.main([__file__, "-n0"]))
