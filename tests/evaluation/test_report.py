"""Tests of the report: its figures, its safety, its look in a browser."""

import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from report_run import make_run

from spkid.errors import UserError
from spkid.evaluation import Evaluation, equal_error_rate
from spkid.evaluation.report import scored, write_report
from spkid.evaluation.report.verification import cosines, verification

SECTIONS = (
    *("Accuracy", "Training", "Accuracy by length", "Accuracy by speaker"),
    *("Most confused", "Embedding map", "Calibration"),
    *("Verification and strangers", "Sessions", "Settings"),
)
INPUTS = {
    "results.json": "Accuracy",
    "history.json": "Training",
    "evaluation.npz": "Calibration",
    "manifests/split_report.json": "Sessions",
    "hyperparams.yaml": "Settings",
}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
POLICY = re.compile(r"<meta http-equiv.*?>", flags=re.DOTALL)
LOOK = """<script>
// Chromium's window has at least 500 pixels; a phone has fewer.
document.documentElement.style.maxWidth = "WIDTHpx";
const texts = [...document.querySelectorAll("svg")].map(svg =>
    [...svg.querySelectorAll("text")].filter(text => text.textContent.trim()));
const cut = [], overlaps = [];
for (const figure of texts) for (const [i, text] of figure.entries()) {
    const a = text.getBoundingClientRect();
    const box = text.ownerSVGElement.getBoundingClientRect();
    if (a.left < box.left - 1 || a.right > box.right + 1) cut.push(text);
    for (const other of figure.slice(i + 1)) {
        const b = other.getBoundingClientRect();
        if (a.left < b.right && b.left < a.right && a.top < b.bottom - 1
            && b.top < a.bottom - 1) overlaps.push(text, other);
    }
}
document.title = JSON.stringify({
    wide: Math.max(...[...document.querySelectorAll(
        "body *:not(.scroll *, pre *, svg *, script)")].map(
            element => element.getBoundingClientRect().right)),
    cut: cut.map(t => t.textContent),
    overlaps: overlaps.map(t => t.textContent)});
</script>"""


class Outline(HTMLParser):
    """The tags of a page with their attributes, and the text of its cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.rows, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    def handle_endtag(self, tag):
        self.inside = False


def write(folder):
    return write_report(folder).read_text(encoding="utf-8")


def change(folder, **arrays):
    with np.load(folder / "evaluation.npz") as before:
        np.savez(folder / "evaluation.npz", **dict(before) | arrays)


def browse(page, folder, *options):
    """What Chromium prints of a page, and what it complains of."""
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update"),
        *("--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"),
        *("--enable-logging=stderr", "--v=0", *options, page.as_uri()),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120
    )
    complaints = re.findall(r".*CONSOLE.*|.*ERR_.*", done.stderr)
    return done.stdout, complaints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run):
    return write(run)


def test_all_sections_are_there_and_the_same_run_gives_the_same_bytes(
    run, page
):
    assert tuple(re.findall("<h2>(.*?)</h2>", page)) == SECTIONS
    assert "is missing" not in page
    figures = [keys for tag, keys in Outline(page).tags if tag == "svg"]
    assert {keys["role"] for keys in figures} == {"img"}
    assert len({keys["aria-label"] for keys in figures}) == len(figures) == 8
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 10
    assert write(run) == page


def test_headline_shows_the_figures_of_results(run, page):
    results = json.loads((run / "results.json").read_text())
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    shown = re.findall(r"<div>([^<]*)<b>([^<]*)</b>", page)
    expected = {k: f"{100 * v:.1f} %" for k, v in results["expected"].items()}
    assert shown == [
        (
            "Accuracy, new sessions",
            f"{100 * results['valid']['accuracy']:.1f} %",
        ),
        (
            "Accuracy, known sessions",
            f"{100 * results['known']['accuracy']:.1f} %",
        ),
        ("Gap, in points", f"{100 * results['gap']:+.1f}"),
        ("Estimated test accuracy (from confidence)", expected["accuracy"]),
        (
            "Accuracy, test utterances",
            f"{100 * results['test']['accuracy']:.1f} %",
        ),
    ]
    assert f"is {expected['low']} to {expected['high']}." in page


def test_page_shows_sessions_and_epochs(run, page):
    rows = Outline(page).rows
    assert ["1", "2", "187", "0", "2"] in rows  # of speakers 0 and 7
    assert ["6", "1", "95", "9", "0"] in rows  # of speaker 5
    assert "<li>id00000: one session, nothing can be held out.</li>" in page
    best = json.loads((run / "history.json").read_text())[-1]["valid accuracy"]
    said = f"Best on new sessions: {100 * best:.1f} %, in epoch 20 of 20."
    assert said in page.replace("\N{NO-BREAK SPACE}", " ")


def test_random_split_is_called_too_optimistic(tmp_path):
    page = write(make_run(tmp_path / "run", sizes={"random": 40}))
    assert "Accuracy, random utterances" in page
    assert "too optimistic: expect less" in page
    assert "new sessions" not in page
    assert ">unknown</th>" in page  # how many sessions the speakers have
    assert "None" not in page


def test_tables_count_what_was_scored(tmp_path):
    """30 utterances of 1 s, half right; 30 of 9 s, all right but one."""
    folder = make_run(tmp_path / "run", n_speakers=3, sizes={"new": 60})
    target = np.repeat([0, 1], 30)
    guess = target.copy()
    guess[:15] = 2  # half of the short ones
    guess[30] = 0  # one of the long ones
    frames = np.repeat([100, 900], 30)
    change(folder, target=target, guess=guess, frames=frames)
    rows = Outline(write(folder)).rows
    assert ["1.0\N{EN DASH}9.0", "50.0 % of 30"] in rows
    assert ["9.0\N{EN DASH}9.0", "96.7 % of 30"] in rows
    worst = [
        ["id00000", "15 of 30", "50.0 %", "33\N{EN DASH}67 %"],
        ["id00001", "29 of 30", "96.7 %", "83\N{EN DASH}99 %"],
    ]
    start = rows.index(worst[0])
    assert rows[start : start + 2] == worst
    pairs = [
        ["id00000", "id00002", "15", "50.0 %"],
        ["id00001", "id00000", "1", "3.3 %"],
    ]
    start = rows.index(pairs[0])
    assert rows[start : start + 2] == pairs


def test_calibration_is_described_in_words(tmp_path):
    folder = make_run(tmp_path / "run", n_speakers=2, sizes={"new": 40})
    target = np.zeros(40, dtype=int)
    guess = (np.arange(40) >= 20).astype(int)  # half are right
    for confidence, verdict in (
        (0.9, "over-confident"),
        (0.2, "under-confident"),
        (0.5, "neither over- nor under-confident"),
    ):
        values = np.full(40, confidence)
        change(folder, target=target, guess=guess, confidence=values)
        text = write(folder).replace("\N{NO-BREAK SPACE}", " ")
        assert f"On new sessions the model is {verdict}" in text
        error = 100 * abs(confidence - 0.5)
        assert f"calibration error is {error:.1f} %" in text


def table_of(folder, n_speakers, sizes, **columns):
    """The scores of a run, some columns replaced."""
    make_run(folder, n_speakers, sizes)
    change(folder, **columns)
    return Evaluation.load(folder / "evaluation.npz")


def rows_of(section):
    return [
        [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row]
        for row in section["table"].rows
    ]


def cosine(a, b):
    a, b = a.astype(float), b.astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def cosine_with_model(table, i, speaker, enrolled):
    """Of an utterance, with the mean direction of the speaker's others."""
    others = [
        x / np.linalg.norm(x)
        for j, x in enumerate(table.embedding.astype(float))
        if enrolled[j] and table.target[j] == speaker and j != i
    ]
    if not others:
        return -np.inf
    return cosine(table.embedding[i], np.mean(others, axis=0))


@pytest.mark.parametrize("parts", [["known"], ["known", "new"]])
def test_an_utterance_is_left_out_of_its_own_model(tmp_path, parts):
    table = table_of(tmp_path / "run", 9, {"new": 9, "known": 7})
    enrolled = np.isin(table.part, parts)
    expected = [
        [cosine_with_model(table, i, k, enrolled) for k in range(9)]
        for i in range(16)
    ]
    assert -np.inf in np.ravel(expected)
    assert cosines(table, enrolled) == pytest.approx(np.array(expected), 1e-4)


def test_pairs_are_of_two_sessions_and_each_utterance_is_a_stranger(tmp_path):
    """The table's figures, in loops."""
    sizes = {"new": 40, "known": 30, "test": 30}
    table = table_of(tmp_path / "run", 6, sizes)
    target, section = table.target.tolist(), verification(table)
    pairs = [[], []]
    for i in range(70):  # the test utterances are last
        for j in range(i):
            if target[i] != target[j] or (i < 40) != (j < 40):
                score = cosine(*table.embedding[[i, j]])
                pairs[target[i] != target[j]].append(score)
    rate = equal_error_rate(*map(np.array, pairs))[0]
    details = f"pairs: {len(pairs[0])} of one speaker, {len(pairs[1]):,} of two"
    rows = rows_of(section)
    assert rows[0] == [
        *("Equal error rate (EER)", f"{100 * rate:.2f} %", details)
    ]
    scores = [
        [
            cosine_with_model(table, i, k, table.part == "known")
            for k in range(6)
        ]
        for i in range(40)
    ]
    strangers = sorted(
        max(score for k, score in enumerate(row) if k != target[i])
        for i, row in enumerate(scores)
    )
    for row, percent, accepted in zip(rows[2:], (1, 5), (0, 2), strict=True):
        threshold = strangers[-1 - accepted]
        right = sum(
            max(one) == one[target[i]] > threshold
            for i, one in enumerate(scores)
        )
        assert 0 < right < 40
        assert row == [
            *(f"DIR at FPIR {percent} %", f"{2.5 * right:.1f} % of 40"),
            f"{accepted} of 40 strangers accepted",
        ]
    assert "one is of a new session" in section["texts"][0]
    assert "held-out utterances of known sessions" in section["texts"][1]


@pytest.mark.parametrize("part", ["new", "random"])
def test_pairs_that_may_be_of_one_session_are_called_easy(tmp_path, part):
    texts = verification(table_of(tmp_path / "run", 6, {part: 40}))["texts"]
    assert "may be of one session, which helps" in texts[0]
    assert "other held-out utterances" in texts[1]


def test_scores_of_another_system_can_be_shown(tmp_path):
    """Speakers are found at a score of 1, strangers have 0; one speaker isn't
    enrolled, and one utterance isn't found."""
    table = table_of(tmp_path / "run", 6, {"test": 9, "known": 30, "new": 30})
    scores = np.eye(6)[table.target]
    absent = next(one for one in table.target[40:] if one != table.target[39])
    scores[39], scores[:, absent] = 0, -np.inf
    n = np.count_nonzero(table.target[39:] != absent)
    section = verification(table, scores, "By magic.")
    assert section["texts"][1] == "By magic."
    assert rows_of(section)[2] == [
        *("DIR at FPIR 1 %", f"{100 * (n - 1) / n:.1f} % of {n}"),
        "0 of 30 strangers accepted",
    ]


@pytest.mark.parametrize(
    ("parts", "target"),
    [
        ("nnnnnn", [0, 0, 0, 0, 0, 0]),  # one speaker
        ("nnnnnn", [0, 1, 2, 3, 4, 5]),  # one utterance each
        ("nk", [0, 0]),
        ("n", [3]),
        ("kkkttt", [0, 0, 1, 0, 0, 1]),  # nothing new
        ("tttttt", [0, 0, 0, 1, 1, 1]),
        ("", []),
    ],
)
def test_nothing_can_be_compared(tmp_path, parts, target):
    names = {"n": "new", "k": "known", "t": "test"}
    part = np.array([names[letter] for letter in parts], str)
    table = table_of(tmp_path / "run", 6, {"new": 6})
    table = table.select(np.arange(len(parts)))
    assert verification(replace(table, part=part, target=target)) is None


@pytest.mark.parametrize(
    ("parts", "target", "details"),
    [
        ("nnn", [0, 0, 1], "pairs: 1 of one speaker, 2 of two"),
        ("nnnk", [0, 0, 1, 0], "pairs: 1 of one speaker, 2 of two"),
        ("nnkk", [0, 1, 0, 1], "pairs: 2 of one speaker, 4 of two"),
    ],
)
def test_the_least_that_can_be_compared(tmp_path, parts, target, details):
    part = np.where(np.array(list(parts)) == "n", "new", "known")
    table = table_of(tmp_path / "run", 3, {"new": 6})
    table = table.select(np.arange(len(parts)))
    section = verification(replace(table, part=part, target=target))
    assert rows_of(section)[0][2] == details


def test_a_section_without_content_is_left_out(tmp_path):
    page = write(make_run(tmp_path / "run", 1, {"new": 3}))
    sections = [name for name in SECTIONS if not name.startswith("Verif")]
    assert re.findall("<h2>(.*?)</h2>", page) == sections


@pytest.mark.parametrize("name", INPUTS)
def test_missing_file_removes_only_its_sections(tmp_path, name):
    folder = make_run(tmp_path / "run", sizes={"new": 20})
    (folder / name).unlink()
    page = write(folder)
    assert tuple(re.findall("<h2>(.*?)</h2>", page)) == SECTIONS
    assert f"<h2>{INPUTS[name]}</h2><p>{name} is missing or empty.</p>" in page
    others = set(INPUTS) - {name}
    assert not any(f"{other} is missing" in page for other in others)


def test_unlabelled_utterances_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", sizes={"new": 20, "test": 9})
    target = np.load(folder / "evaluation.npz")["target"]
    target[20:] = -1
    change(folder, target=target)
    assert "test utterances" not in write(folder).split("Training</h2>")[1]
    change(folder, target=np.full(29, -1))
    assert write(folder).count("has no utterance of a known speaker.") == 6


@pytest.mark.parametrize("n", [1, 2, 3])
def test_smallest_evaluation_has_a_report(tmp_path, n):
    """One speaker, no error, one epoch without validation."""
    folder = make_run(tmp_path / "run", n_speakers=1, sizes={"new": n})
    row = {"epoch": 1, "lr": 0.1, "train loss": 1.0, "valid accuracy": None}
    (folder / "history.json").write_text(json.dumps([row]))
    page = write(folder)
    assert "No error on new sessions" in page
    assert page.count("<svg") == 6


@pytest.mark.parametrize("diverged", [150, 100])
def test_diverged_run_has_a_report(tmp_path, diverged):
    folder = make_run(tmp_path / "run", sizes={"new": 150})
    embedding = np.load(folder / "evaluation.npz")["embedding"]
    embedding[:diverged] = np.nan
    change(folder, embedding=embedding, confidence=embedding[:, 0] * 0 + 0.5)
    page = write(folder)
    assert "expected calibration error" in page
    assert "nan" not in page.lower().replace("finance", "")


def test_strings_are_harmless(tmp_path):
    folder = make_run(tmp_path / "run", n_speakers=2)
    attack = "<script>alert(1)</script>\"'&$x_1$"
    change(folder, speakers=np.array([attack, "id1"]))
    (folder / "hyperparams.yaml").write_text(attack)
    results = json.loads((folder / "results.json").read_text())
    results |= {"system": attack, "data_folder": attack}
    (folder / "results.json").write_text(json.dumps(results))
    split = {"sessions": attack, "warnings": [attack], "speakers": {}}
    path = folder / "manifests" / "split_report.json"
    path.write_text(json.dumps(split))
    tags = Outline(write(folder)).tags
    assert "script" not in {tag for tag, _ in tags}
    assert not any(key.startswith("on") for _, keys in tags for key in keys)


def test_page_refers_to_nothing_outside(page):
    for tag, attributes in Outline(page).tags:
        for key in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(key, "#")
            assert value.startswith(("#", "data:")), (tag, value)
    urls = set(re.findall(r"https?://[^\"' <]+", page))
    assert urls <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in page
    assert all(url.startswith("#") for url in re.findall(r"url\((.*?)\)", page))


def test_matplotlib_settings_of_the_caller_stay(run, page):
    with matplotlib.rc_context({"font.size": 33, "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        assert write(run) == page
        assert dict(matplotlib.rcParams) == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(UserError, match="holds no finished run"):
        write_report(tmp_path)


ILL = {
    "results.json": [
        *("", "[]", "[", "null", "7", '{"valid": {"accuracy": ', "\\x00"),
        *('{"valid": []}x', '{"valid": [1]}', '{"valid": {"accuracy": "0.5"}}'),
        *(f'{{"valid": {{"accuracy": {x}}}}}' for x in ("NaN", -1, 2, "[1]")),
        '{"valid": {"accuracy": true}}',
        '{"gap": "wide"}',
        '{"expected": {"accuracy": 0.5}}',
        '{"expected": {"accuracy": 0.5, "low": "x", "high": 1}}',
    ],
    "history.json": [
        *("[", "{}", "7", "[7]", "[[]]", "[{}]", '[{"epoch": "1"}]'),
        *('[{"epoch": -1}]', '[{"epoch": NaN}]', '[{"epoch": 1e9}]'),
        *('[{"epoch": 1, "lr": "x"}]', '[{"epoch": 1, "lr": [1]}]'),
        '[{"epoch": 1, "valid accuracy": -3}]',
        '[{"epoch": 1, "valid accuracy": NaN}]',
        '[{"epoch": 1' + "0" * 400 + "}]",
        "[" * 3000,
    ],
    "manifests/split_report.json": [
        *("[", "[]", "7", '{"speakers": 7}', '{"speakers": {"a": 7}}'),
        '{"sessions": "x", "warnings": [], "speakers": {"a": {}}}',
        *(
            '{"sessions": "x", "warnings": [], "speakers": {"a": {"sessions": '
            f'{x}, "utterances": 1, "held_out": 0}}}}'
            for x in ("-1", '"1"', "[1]", "NaN", "1" + "0" * 400)
        ),
        '{"sessions": "x", "warnings": 7, "speakers": {}}',
    ],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name in ILL for text in ILL[name]]
)
def test_ill_shaped_file_costs_its_section_alone(tmp_path, name, text, caplog):
    folder = make_run(tmp_path / "run", 2, sizes={"new": 4})
    (folder / name).write_text(text)
    page = write(folder)
    assert tuple(re.findall("<h2>(.*?)</h2>", page)) == SECTIONS
    said = re.search(f"<h2>{INPUTS[name]}</h2><p>([^<]*)</p>", page)[1]
    said = html.unescape(said)
    assert re.match(rf"{name} (can't be shown|is missing or empty)", said)
    others = set(INPUTS) - {name}
    assert not any(f"{other} can&#39;t" in page for other in others)
    for line in caplog.messages:
        assert line.startswith(f"{folder / name}: can't be shown (")
        assert "\n" not in line
        assert len(line) < 600


COLUMNS = {
    "target that has no name": {"target": np.full(4, 10**9)},
    "negative target": {"target": np.full(4, -5)},
    "negative guess": {"guess": np.full(4, -1)},
    "no part": {"part": np.array(["new", "new", "new", "<script>"])},
    "too short": {"frames": np.ones(3, int)},
    "numbers as texts": {"target": np.array(["0", "1", "0", "1"])},
    "numbers of another kind": {"target": np.zeros(4)},
    "complex": {"loss": np.zeros(4, complex)},
    "confidence": {"confidence": np.full(4, 1.5)},
    "negative confidence": {"confidence": np.array([np.nan, -1, 0, 0])},
    "flat embedding": {"embedding": np.zeros(4, np.float16)},
    "deep target": {"target": np.zeros((4, 1), int)},
    "one name": {"speakers": np.array("ann")},
    "names in rows": {"speakers": np.array([["a", "b"]])},
    "pickled": {"speakers": np.array(["a", "b"], object)},
    "fields": {"target": np.zeros(4, [("a", int)])},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_ill_shaped_table_costs_its_sections_alone(tmp_path, name):
    folder = make_run(tmp_path / "run", 2, sizes={"new": 4})
    change(folder, **COLUMNS[name])
    page = write(folder)
    assert page.count("evaluation.npz can&#39;t be shown (") == 6
    assert "is missing" not in page
    assert "<script>" not in page


def test_a_table_of_no_utterance_or_no_dimension_has_a_report(tmp_path):
    folder = make_run(tmp_path / "run", 2, sizes={"new": 4})
    change(folder, embedding=np.zeros((4, 0), np.float16))
    assert "can&#39;t be shown" not in write(folder)
    arrays = dict(np.load(folder / "evaluation.npz"))
    none = {key: x[:0] for key, x in arrays.items() if key != "speakers"}
    change(folder, **none)
    assert write(folder).count("evaluation.npz is missing or empty") == 6


def test_a_compressed_table_is_refused(tmp_path):
    """A small file could hold gigabytes."""
    folder = make_run(tmp_path / "run", 2, sizes={"new": 4})
    arrays = dict(np.load(folder / "evaluation.npz"))
    np.savez_compressed(folder / "evaluation.npz", **arrays)
    assert "it is compressed" in write(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", INPUTS)
def test_a_pipe_is_not_waited_for(tmp_path, name):
    folder = make_run(tmp_path / "run", 2, sizes={"new": 4})
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} can&#39;t be shown (" in write(folder)


@pytest.mark.parametrize("name", INPUTS)
def test_a_giant_is_not_read(tmp_path, name):
    folder = make_run(tmp_path / "run", 2, sizes={"new": 4})
    with open(folder / name, "r+b") as file:
        file.truncate(2**36)
    assert f"{name} can&#39;t be shown (" in write(folder)


def test_settings_are_shown_and_not_obeyed(tmp_path):
    folder = make_run(tmp_path / "run", 2, sizes={"new": 4})
    text = f"a: !apply:os.mkdir [{tmp_path / 'ran'}]"
    (folder / "hyperparams.yaml").write_text(text)
    assert "!apply:os.mkdir" in write(folder)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_not_utf_8_are_written(tmp_path):
    folder = make_run(tmp_path / "caf\udce9", 2, sizes={"new": 4})
    change(folder, speakers=np.array(["zo\udceb", "李"]))
    (folder / "results.json").unlink()
    page = write(folder)
    assert "zo?" in page
    assert "Report of caf?" in page


def test_the_command_says_where_the_page_is(run, monkeypatch, capsys):
    page = run / "report.html"
    page.unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    runpy.run_module("spkid.evaluation.report", run_name="__main__")
    assert capsys.readouterr().out == f"{page}: the run on one page\n"
    assert page.exists()
    monkeypatch.setattr(sys, "argv", ["report", str(run / "nothing")])
    with pytest.raises(SystemExit, match=r"Error: .*holds no finished run"):
        runpy.run_module("spkid.evaluation.report", run_name="__main__")


def test_map_of_many_is_a_sample_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(scored, "MAX_POINTS", 150)
    folder = make_run(tmp_path / "run", 5, {"random": 200})
    page = write(folder)
    assert "t-SNE of the directions of 150 embeddings" in page
    assert write(folder) == page


def test_labels_are_moved_apart():
    places = np.array([[0.0, 0], [0, 0], [0.1, 0], [5, 5]])
    size = np.array([1.0, 0.5])
    moved = scored.apart(places, size)
    away = np.abs(moved[:, None] - moved)[~np.eye(4, dtype=bool)]
    assert (away >= size).any(axis=1).all()
    assert moved[3] == pytest.approx(places[3], abs=0.01)


@pytest.mark.slow
def test_full_scale_page_is_small(tmp_path):
    sizes = {"new": 4000, "known": 4000, "test": 5000}
    page = write(make_run(tmp_path / "run", 600, sizes))
    assert ": 20 speakers of 600, from the lowest" in page
    assert len(page) < 500_000


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="neither chromium nor google-chrome")
@pytest.mark.parametrize("width", [390, 1120])
@pytest.mark.parametrize("n_speakers", [3, 60])
def test_browser_shows_it_without_complaint(tmp_path, n_speakers, width):
    sizes = dict.fromkeys(("new", "known", "test"), n_speakers + 10)
    page = write_report(make_run(tmp_path / "run", n_speakers, sizes))
    shot = tmp_path / "shot.png"
    size = f"--window-size={width},1000"
    _, complaints = browse(page, tmp_path, size, f"--screenshot={shot}")
    assert complaints == []
    assert shot.stat().st_size > 10_000  # an empty page has some 5 kB
    # A copy that may run our script tells how it looks.
    text = POLICY.sub("", page.read_text(encoding="utf-8"))
    copy = tmp_path / "copy.html"
    look = LOOK.replace("WIDTH", str(width))
    copy.write_text(text.replace("</body>", f"{look}</body>"), encoding="utf-8")
    dom, complaints = browse(copy, tmp_path, size, "--dump-dom")
    assert complaints == []
    look = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    assert look["cut"] == look["overlaps"] == []
    assert look["wide"] <= width


@pytest.mark.skipif(not BROWSER, reason="neither chromium nor google-chrome")
@pytest.mark.parametrize("policy", [True, False])
def test_browser_would_complain(page, tmp_path, policy):
    """Of errors; and of all that is loaded, since the policy forbids it."""
    fault = "<script>console.error('mine')</script><img src='missing.png'>"
    text = page.replace("</body>", f"{fault}</body>")
    copy = tmp_path / "copy.html"
    copy.write_text(text if policy else POLICY.sub("", text), encoding="utf-8")
    complaints = " ".join(browse(copy, tmp_path, "--dump-dom")[1])
    assert ("missing.png" if policy else "mine") in complaints


@pytest.mark.parametrize("key", ["system", "other"])
def test_what_is_nested_deep_is_no_value(tmp_path, key):
    """Just so deep that it can be read, but not shown within a page."""
    folder = make_run(tmp_path)
    path = folder / "results.json"
    results = json.loads(path.read_text()) | {key: "@"}
    for depth in range(900, 1000, 20):
        nested = "[" * depth + "]" * depth
        path.write_text(json.dumps(results).replace('"@"', nested))
        assert write_report(folder).exists()
