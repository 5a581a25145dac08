"""Tests of the pages: their code runs, and what they name exists."""

import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

from spkid.backend import Backend
from spkid.hparams import Settings
from spkid.inference import SpeakerIdentifier

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "ML2022hw4"
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    RECIPE / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
FOLDERS = ("hparams", "recipes", "modules", "benchmarks", "tests")
WRITTEN_BY_A_RUN = {"hyperparams.yaml"}


def blocks(language):
    """The code blocks of the README in a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S
    )
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def finished_run(folder):
    """A run's folder with an untrained system for two speakers."""
    settings = Settings(ROOT / "hparams" / "conformer.yaml", {"n_speakers": 2})
    parts = ("mean_var_norm", "embedding_model", "classifier")
    values = settings.values | settings.build_modules(parts)
    identifier = SpeakerIdentifier.from_settings(values, ["ann", "bob"])
    means = np.random.default_rng(0).normal(size=(2, 192))
    identifier.set_backend(Backend.of_means(means.astype("f"), ["ann", "bob"]))
    identifier.save(folder)
    (folder / "hyperparams.yaml").write_text(settings.text, encoding="utf-8")


def test_a_trained_system_works_in_python_as_the_readme_says(
    tmp_path, monkeypatch, capsys
):
    finished_run(tmp_path / "results" / "conformer" / "1986")
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)
    for name in ("recording", "other"):
        soundfile.write(tmp_path / f"{name}.wav", noise, 16000)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks("python")[0], names)
    answer, same = capsys.readouterr().out.splitlines()
    assert answer.split()[0] in {"known", "unsure", "unknown"}
    assert same in {"True", "False"}
    assert names["model"].backend.speakers == ("ann", "bob", "Zoe")
    assert names["embeddings"].shape == (2, 192)


def test_the_modules_work_in_a_recipe_as_the_readme_says():
    names = load_hyperpyyaml(blocks("yaml")[0])
    names["features"] = torch.randn(2, 50, 40)
    names["relative_lengths"] = torch.tensor([1.0, 0.5])
    names["targets"] = torch.tensor([[3], [5]])
    exec(blocks("python")[1], names)
    assert names["embeddings"].shape == (2, 1, 192)
    assert names["log_posteriors"].shape == (2, 1, 600)
    assert names["loss"].isfinite()


def test_the_readme_has_one_test_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall("^python -m pytest.*$", text, re.M) == [
        "python -m pytest"
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    anywhere = {p.name for f in FOLDERS for p in (ROOT / f).rglob("*.*")}
    for name in set(re.findall(r"[\w./-]*\w\.(?:py|yaml|md)\b", text)):
        found = any((place / name).exists() for place in (ROOT, page.parent))
        assert found or name in anywhere | WRITTEN_BY_A_RUN, name
    for name in set(re.findall(r"\bspkid(?:\.\w+)+", text)):
        assert pydoc.locate(name) is not None, name
