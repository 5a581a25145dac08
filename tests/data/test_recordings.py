"""Tests of recordings that become a corpus: what is read, skipped and why."""

import csv
import errno
import json
import os
import signal
import sys

import numpy as np
import pytest
import soundfile
import soxr
import torch
from tqdm import tqdm

import mini_corpus
from spkid.data import prepare_audio, recordings
from spkid.data.prepared import (
    Recording,
    hold_out_sessions,
    leave_out_copies,
    summary,
)
from spkid.errors import UserError
from spkid.features import load_features
from spkid.files import lock_folder

forked = pytest.mark.skipif(
    sys.platform != "linux", reason="a process that isn't forked has no patches"
)


def sound(seed=0, seconds=1.5, rate=16000):
    """Noise of all frequencies, which the rule of the HW4 data keeps."""
    noise = np.random.default_rng(seed).normal(size=int(seconds * rate))
    return 0.5 * noise / np.abs(noise).max()


def write(path, samples, rate=16000, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **how)


def fill(root, *names):
    for name in names:
        write(root / name, sound([*os.fsencode(name)]))


def prepare(root, folder, *choices, silence="hw4", **more):
    found = prepare_audio(
        root, folder, silence, *choices, progress=False, **more
    )
    return {one.path: one for one in found}


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def places(tmp_path):
    root = tmp_path / "voices"
    root.mkdir()
    return root, tmp_path / "data"


@pytest.fixture
def jobs(monkeypatch):
    """The files that each run reads."""
    seen, in_workers = [], recordings._in_workers

    def watch(work, paths, processes):
        seen.append(sorted(paths))
        return in_workers(work, paths, processes)

    monkeypatch.setattr(recordings, "_in_workers", watch)
    return seen


FORMATS = {
    "8.wav": (8000, {}),
    "16.WAV": (16000, {"subtype": "FLOAT"}),
    "44.1.flac": (44100, {}),
    "48.Flac": (48000, {"subtype": "PCM_24"}),
    "22.ogg": (22050, {}),
    "voice.opus": (48000, {"format": "OGG", "subtype": "OPUS"}),
    "Zoë 日本.MP3": (44100, {}),
    "old.aiff": (16000, {}),
}


def test_formats_and_sample_rates_become_what_the_front_end_makes(places):
    root, folder = places
    for name, (rate, how) in FORMATS.items():
        write(
            root / "Žofie" / name, sound([*name.encode()], 2, rate), rate, **how
        )
    antiphase = np.outer(sound(1), [1, -1])
    write(root / "bob" / "antiphase.wav", antiphase)
    found = prepare(root, folder)
    assert {one.verdict for one in found.values()} <= {"ok", "warning"}
    assert set(found) == {f"Žofie/{n}" for n in FORMATS} | {"bob/antiphase.wav"}
    for path, one in found.items():
        features = torch.load(folder / one.feature_path, weights_only=True)
        expected = load_features(root / path)
        assert features.shape == (one.mel_len, 40)
        torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)
        assert one.channels == 1 + (one.speaker == "bob")
        rate = FORMATS.get(path.partition("/")[2], (16000,))[0]
        assert one.sample_rate == rate
        assert one.seconds == pytest.approx(1.5 + 0.5 * (rate != 16000), abs=1)
    assert read(folder, "metadata.json")["silence"] == "hw4"


def test_speech_is_found_behind_a_click_in_antiphase_and_at_8_khz(places):
    """By level alone, the first two were silent."""
    pytest.importorskip("espeakng_loader")
    root, folder = places
    espeak = mini_corpus.Espeak()
    text = "The ferry was delayed because of fog on the lake."
    spoken = espeak.speak(text, "en-us+m3")
    rate = espeak.sample_rate
    spoken /= 2 * np.abs(spoken).max()
    clicked = np.concatenate([spoken / 50, np.zeros(rate)])
    clicked[-rate // 2 :][:55] = 0.9  # 2.5 ms
    ways = {
        "plain.wav": (spoken, rate),
        "click.wav": (clicked, rate),
        "antiphase.flac": (np.outer(spoken, [1, -1]), rate),
        "phone.ogg": (soxr.resample(spoken, rate, 8000), 8000),
    }
    for name, (samples, its_rate) in ways.items():
        write(root / "ann" / name, samples, its_rate)
    found = prepare(root, folder, silence="vad")
    seconds = {path[4:]: one.speech_seconds for path, one in found.items()}
    assert 2 < seconds["plain.wav"] < 4
    assert seconds == pytest.approx(
        dict.fromkeys(ways, seconds["plain.wav"]), abs=0.3
    )
    assert read(folder, "metadata.json")["silence"] == "vad"


def test_what_cannot_be_used_is_skipped_and_says_why(places):
    root, folder = places
    fill(root, "ann/good.wav", "ann/__MACOSX/x.wav", "ann/.hidden.wav")
    fill(root, "lost.wav", ".git/x.wav")
    (root / "ann/text.wav").write_text("this is no sound")
    (root / "ann/empty.mp3").touch()
    (root / "ann/notes.TXT").touch()
    write(root / "ann/short.wav", sound(1, 0.2))
    write(root / "ann/silent.wav", np.zeros(32000))
    write(root / "ann/nan.wav", np.full(32000, np.nan), subtype="FLOAT")
    if os.name != "nt":
        fill(root, "a\nb/x.wav")
        os.mkfifo(root / "ann/pipe.wav")
        (root / "ann/gone.wav").symlink_to("nowhere")
        (root / "ann/loop.wav").symlink_to("loop.wav")
    found = prepare(root, folder)
    reasons = {
        path.partition("/")[2] or path: one.reason.partition(":")[0]
        for path, one in found.items()
        if one.verdict != "ok"
    }
    expected = {
        "lost.wav": "no speaker",
        "text.wav": "unreadable",
        "empty.mp3": "unreadable",
        "notes.TXT": "not audio",
        "short.wav": "too short",
        "silent.wav": "no speech",
        "nan.wav": "unreadable",
    }
    if os.name != "nt":
        expected["x.wav"] = "a folder's name isn't plain text"
        names = "pipe.wav", "gone.wav", "loop.wav"
        expected |= dict.fromkeys(names, "unreadable")
    assert reasons == expected
    assert "0.19 s of speech" in found["ann/short.wav"].reason
    assert read(folder, "mapping.json")["speaker2id"] == {"ann": 0}
    with open(folder / "recordings.csv", encoding="utf-8", newline="") as file:
        table = {row["path"]: row for row in csv.DictReader(file)}
    assert list(table) == list(found)
    assert table["ann/good.wav"] == {
        "verdict": "ok",
        "path": "ann/good.wav",
        "speaker": "ann",
        "session": "good",
        "part": "train",
        "seconds": "1.5",
        "speech_seconds": "1.49",  # the first sound is cut off
        "sample_rate": "16000",
        "channels": "1",
        "reason": "",
        "feature_path": found["ann/good.wav"].feature_path,
        "mel_len": "150",
    }
    lines = summary(list(found.values()))
    assert "1 skipped, too short: 'ann/short.wav'" in lines
    assert "1 of 1 speakers, as 'ann'," in lines


def test_what_is_read_with_a_warning(places):
    root, folder = places
    write(root / "ann/loud.wav", (9 * sound(1)).clip(-1, 1))
    write(root / "ann/quiet.flac", sound(2) / 100, subtype="PCM_24")
    write(root / "ann/phone.wav", sound(3, rate=8000), 8000)
    as_if = soxr.resample(sound(4, rate=8000), 8000, 16000)
    write(root / "ann/from_phone.wav", as_if)
    found = prepare(root, folder)
    words = {path[4:]: one.reason for path, one in found.items()}
    assert words["loud.wav"].startswith("clipped: ")
    assert words["quiet.flac"] == "nearly silent: its peak is -46 dB"
    assert words["phone.wav"].startswith("narrow band: nothing above 4.0")
    assert words["from_phone.wav"].startswith("narrow band: nothing ")
    assert {one.verdict for one in found.values()} == {"warning"}


def test_equal_audio_counts_once_and_not_at_all_under_two_speakers(places):
    root, folder = places
    fill(root, "ann/mon/1.wav", "ann/tue/2.wav", "bob/mon/1.wav")
    same, rate = soundfile.read(root / "ann/mon/1.wav", dtype="int16")
    write(root / "ann/tue/1 (copy).flac", same, rate)
    for name in "ann/mon/x.wav", "bob/mon/x.wav", "bob/tue/x.flac":
        write(root / name, same[::-1])
    found = prepare(root, folder)
    used = [path for path, one in found.items() if one.verdict == "ok"]
    assert used == ["ann/mon/1.wav", "ann/tue/2.wav", "bob/mon/1.wav"]
    copy = found["ann/tue/1 (copy).flac"].reason
    assert copy == "the same audio as an earlier file: 'ann/mon/1.wav'"
    assert all(
        "MISTAKE" in found[f"{n}/mon/x.wav"].reason for n in ("ann", "bob")
    )
    assert "MISTAKE" in found["bob/tue/x.flac"].reason
    listed = read(folder, "metadata.json")["speakers"]
    assert [len(entries) for entries in listed.values()] == [2, 1]


def test_sessions_are_written_only_if_there_are_folders_of_them(places):
    root, folder = places
    fill(root, "ann/1.wav", "ann/2.wav", "bob/1.wav")
    found = prepare(root, folder)
    assert not (folder / "sessions.json").exists()
    assert "infer sessions" in summary(list(found.values()))
    fill(root, "bob/day 10/1.wav", "bob/day 2/mic/left/1.wav")
    found = prepare(root, folder)
    assert [one.session for one in found.values()] == [
        *("1", "2", "1", "day 2", "day 10")  # in natural order
    ]
    lines = summary(list(found.values()))
    assert "the second one the session (5 in all), and deeper" in lines
    assert lines.endswith("; a file without one is a session (3).")
    names = read(folder, "sessions.json")
    assert names == {
        one.feature_path: f"{one.speaker}/{one.session}"
        for one in found.values()
    }


def test_natural_order_decides_that_of_speakers_and_recordings(places):
    root, folder = places
    fill(root, "id10/1.wav", "ID9/10.wav", "ID9/9.wav", "id1/x.wav")
    fill(root, "id/x.wav")  # all of the others' names but the number
    assert list(prepare(root, folder)) == [
        *("id/x.wav", "id1/x.wav", "ID9/9.wav", "ID9/10.wav", "id10/1.wav")
    ]
    assert list(read(folder, "mapping.json")["speaker2id"]) == [
        *("id", "id1", "ID9", "id10")
    ]


@forked
def test_names_that_are_no_text_are_read_and_listed(places, jobs):
    root, folder = places
    zoe = os.fsdecode(b"Zo\xeb")
    fill(root, "ann/1.wav", "ann/2.wav", "ann/3.wav", "ann/mon/4.wav")
    (root / "ann/2.wav").rename(root / f"ann/{zoe}.wav")
    (root / "ann/3.wav").rename(root / "ann/a\nb.wav")
    (root / "ann/mon/4.wav").rename(root / f"ann/mon/{zoe}.wav")
    found = prepare(root, folder)
    assert {one.verdict for one in found.values()} == {"ok"}
    assert prepare(root, folder) == found and jobs[1] == []
    table = (folder / "recordings.csv").read_text(encoding="utf-8")
    assert "ok,ann/Zo\\udceb.wav,ann,Zo\\udceb,train" in table
    sessions = read(folder, "sessions.json").values()
    assert set(sessions) == {
        *("ann/1", "ann/Zo\\udceb", "ann/a\\nb", "ann/mon")
    }


def test_test_sessions_are_whole_and_leave_a_session_to_each(places):
    root, folder = places
    fill(root, *(f"ann/{day}/{n}.wav" for day in range(3) for n in range(2)))
    fill(root, "bob/0/1.wav", "bob/0/2.wav")
    found = prepare(root, folder, 0.2)
    tested = [path for path, one in found.items() if one.part == "test"]
    assert tested == ["ann/2/0.wav", "ann/2/1.wav"]
    listed = read(folder, "testdata.json")["utterances"]
    labels = read(folder, "testlabels.json")
    assert [entry["feature_path"] for entry in listed] == list(labels)
    assert list(labels) == [found[path].feature_path for path in tested]
    assert set(labels.values()) == {"ann"}
    assert set(labels) < set(read(folder, "sessions.json"))
    found = prepare(root, folder)
    assert {one.part for one in found.values()} == {"train"}
    assert read(folder, "testdata.json")["utterances"] == []
    assert not (folder / "testlabels.json").exists()


def recorded(*sessions):
    """One recording for each "speaker/session"."""
    return [
        Recording(f"{s}/{i}.wav", *s.split("/"), feature_path=f"{i}.pt")
        for i, s in enumerate(sessions)
    ]


@pytest.mark.parametrize(
    ("choice", "tested"),
    [
        (0.0, []),
        (0.01, ["a/4", "b/2"]),
        (0.4, ["a/3", "a/4", "b/2"]),
        (0.99, ["a/2", "a/3", "a/4", "b/2"]),
        (["2"], ["a/2", "b/2"]),
        (["a/1", "b/1", "c/1"], ["a/1", "b/1"]),
        (["b/1", "b/2"], ["b/2"]),
    ],
)
def test_which_sessions_are_held_out(choice, tested):
    found = recorded("a/1", "a/2", "a/3", "a/4", "b/1", "b/2", "c/1")
    hold_out_sessions(found, choice)
    held = [f"{o.speaker}/{o.session}" for o in found if o.part == "test"]
    assert held == tested


def test_a_skipped_recording_is_no_session():
    found = recorded("a/1", "a/2", "b/1")
    found[0].feature_path = ""
    hold_out_sessions(found, 0.5)
    assert [one.part for one in found] == ["", "train", "train"]


@pytest.mark.parametrize(
    "choice", [-0.1, 1.0, float("nan"), ["monday"], [""], ["/"]]
)
def test_a_test_that_cannot_be_held_out_is_refused(places, jobs, choice):
    root, folder = places
    fill(root, "ann/1/a.wav", "lost.wav")  # one has no speaker
    with pytest.raises(UserError, match=r"^test_sessions.*(lie in|no session)"):
        prepare(root, folder, choice)
    assert jobs == []


def test_a_second_run_reads_what_is_new_or_changed_only(places, jobs):
    root, folder = places
    fill(root, "ann/1.wav", "ann/2.wav", "bob/1.wav", "bob/2.wav")
    (root / "ann/bad.wav").write_text("no sound")
    write(root / "ann/short.wav", sound(1, 0.2))
    first = prepare(root, folder)
    again = prepare(root, folder)
    assert again == first
    # What can't be read may be readable tomorrow, with another library.
    assert jobs[1] == ["ann/bad.wav"]
    fill(root, "carl/1.wav")
    write(root / "ann/1.wav", sound(5, 2))
    (root / "bob/2.wav").unlink()
    third = prepare(root, folder)
    assert jobs[2] == ["ann/1.wav", "ann/bad.wav", "carl/1.wav"]
    assert third["ann/1.wav"].mel_len == 200
    listed = read(folder, "metadata.json")["speakers"]
    assert {name: len(own) for name, own in listed.items()} == {
        **{"ann": 2, "bob": 1, "carl": 1}
    }
    (folder / third["ann/2.wav"].feature_path).unlink()
    prepare(root, folder)
    assert jobs[3] == ["ann/2.wav", "ann/bad.wav"]


@pytest.mark.parametrize(
    "change",
    [
        {"speaker": "evil"},
        {"feature_path": 5},
        {"feature_path": "../data/recordings.csv"},
        {"speech_seconds": "x"},
        {"mel_len": "x"},
        {"mel_len": True},
        {"reason": None},
        {"feature_path": ""},  # skipped, and no reason
        None,
    ],
)
def test_a_damaged_line_of_the_journal_is_ignored(places, jobs, change):
    root, folder = places
    fill(root, "ann/1.wav")
    first = prepare(root, folder)
    journal = folder / recordings.JOURNAL
    stamp, measured = json.loads(journal.read_text(encoding="utf-8"))
    damaged = json.dumps([stamp, {**measured, **(change or {})}])
    text = damaged if change else "[" * 100_000
    journal.write_text(text, encoding="utf-8")
    assert prepare(root, folder) == first
    assert jobs[1] == ["ann/1.wav"]
    assert prepare(root, folder) == first and jobs[2] == []


def test_another_rule_of_silence_reads_all_again(places, jobs):
    root, folder = places
    fill(root, "ann/1.wav")
    prepare(root, folder)
    with pytest.raises(UserError, match="no speech") as error:
        prepare(root, folder, silence="vad")  # finds none in noise
    assert str(error.value).startswith(f"{root}: has no recording that can be")
    assert jobs == [["ann/1.wav"]] * 2


class Stopped(tqdm):
    """A progress bar; Ctrl-C is pressed after two files."""

    left = 2

    def update(self, n=1):
        super().update(n)
        Stopped.left -= 1
        if Stopped.left == 0:
            raise KeyboardInterrupt


def test_a_run_that_is_stopped_goes_on(places, jobs, monkeypatch):
    root, folder = places
    names = [f"{who}/{i}.wav" for who in ("ann", "bob") for i in range(3)]
    fill(root, *names)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recordings, "tqdm", Stopped)
        prepare(root, folder)
    assert not (folder / "metadata.json").exists()
    with open(folder / recordings.JOURNAL, "a", encoding="utf-8") as file:
        file.write('\n[[1, "hw4", "ann/0')  # it was killed while writing
    (folder / "uttr-1.pt.99.part").touch()
    found = prepare(root, folder)
    assert len(jobs[1]) == 4
    assert [one.verdict for one in found.values()] == ["ok"] * 6
    assert not list(folder.glob("*.part"))
    # As of a run that was not stopped.
    straight = prepare(root, folder.with_name("straight"))
    assert straight == found


def test_the_output_does_not_depend_on_the_number_of_processes(places):
    root, folder = places
    fill(root, *(f"ann/{i}.wav" for i in range(5)))
    first = prepare(root, folder, processes=1)
    second = prepare(root, folder.with_name("other"), processes=3)
    assert first == second
    for one in first.values():
        content = (folder / one.feature_path).read_bytes()
        other = folder.with_name("other") / one.feature_path
        assert content == other.read_bytes()


def test_without_semaphores_this_process_reads(places, monkeypatch):
    """As where /dev/shm is missing."""
    root, folder = places
    fill(root, "ann/1.wav", "bob/1.wav")

    def fail(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(recordings, "ProcessPoolExecutor", fail)
    found = prepare(root, folder)
    assert [one.verdict for one in found.values()] == ["ok", "ok"]


def kill_if_it_is_bad(job):
    if job.startswith("bad"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"job": job}


@forked
@pytest.mark.parametrize("processes", [1, 3])
def test_a_file_that_kills_its_process_is_left_out(processes):
    names = ["a", "bad 1", "b", "c", "bad 2", *"defgh"]
    done = dict(recordings._in_workers(kill_if_it_is_bad, names, processes))
    assert sorted(done) == sorted(names)
    for name, result in done.items():
        if name.startswith("bad"):
            assert result["reason"].startswith("unreadable: the process")
        else:
            assert result == {"job": name}


@forked
def test_what_is_missing_for_all_files_stops_the_run(places, monkeypatch):
    root, folder = places
    fill(root, "ann/1.wav")

    def refuse(path, silence):
        raise UserError("run `pip install`")

    monkeypatch.setattr(recordings, "load_features", refuse)
    with pytest.raises(UserError, match=r"^run `pip install`$"):
        prepare(root, folder)


@forked
def test_a_full_disk_is_not_the_file_s_fault(places, monkeypatch):
    root, folder = places
    fill(root, "ann/1.wav")

    def fail(tensor, file):
        file.write(b"abc")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space"):
            prepare(root, folder)
    assert not (folder / "metadata.json").exists()
    assert prepare(root, folder)["ann/1.wav"].verdict == "ok"
    assert not list(folder.glob("*.part"))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed_once_and_reported_where_they_leave(places):
    root, folder = places
    fill(root, "ann/1.wav")
    fill(root.with_name("pool"), "x.wav", "more/y.wav")
    (root / "ann/x.wav").symlink_to("../../pool/x.wav")
    (root / "bob").symlink_to("../pool/more")
    (root / "ann/circle").symlink_to("..")
    found = prepare(root, folder)
    assert {path: one.reason for path, one in found.items()} == {
        "ann/1.wav": "",
        "ann/x.wav": "a link leads out of the folder",
        "bob/y.wav": "a link leads out of the folder",
    }


def test_folders_that_are_not_its_own_are_refused(places):
    root, folder = places
    fill(root, "ann/1.wav")
    for inside in root, root / "ann" / "data":
        with pytest.raises(UserError, match="lies in the folder of the record"):
            prepare(root, inside)
    with pytest.raises(UserError, match="no such folder; name a folder with"):
        prepare(root / "nowhere", folder)
    for name in "metadata.json", "hyperparams.yaml", "thesis.tex":
        theirs = folder.with_name(name.partition(".")[0])
        theirs.mkdir()
        (theirs / name).write_text("theirs")
        with pytest.raises(UserError, match=f"'{name}', but no corpus that "):
            prepare(root, theirs)
        assert os.listdir(theirs) == [name]
    folder.mkdir()
    for name in "lock", ".DS_Store":  # as empty
        (folder / name).touch()
    assert prepare(root, folder)["ann/1.wav"].verdict == "ok"
    lock = lock_folder(folder.with_name("other"))
    with pytest.raises(UserError, match="another process is using it"):
        prepare(root, folder.with_name("other"))
    lock.release()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"silence": "sox"}, "^silence='sox' must be vad or hw4.$"),
        ({"processes": 0}, "^processes=0 must be at least 1.$"),
    ],
)
def test_a_wrong_choice_is_one_sentence(places, choice, words):
    with pytest.raises(UserError, match=words):
        prepare(*places, **choice)


def test_without_a_usable_recording_no_corpus_is_written(places):
    root, folder = places
    (root / "ann").mkdir()
    (root / "ann/a.wav").write_text("no sound")
    with pytest.raises(UserError, match=r"(?s)no recording.*unreadable: 'ann/"):
        prepare(root, folder)
    assert (folder / "recordings.csv").exists()
    assert not (folder / "metadata.json").exists()


def test_the_command_prints_what_became_of_them_and_what_is_next(
    places, capsys
):
    root, folder = places
    folder = folder.with_name("my data")
    fill(root, "ann/1.wav", "ann/2.wav", "bob/1.wav")
    choices = ["--silence=hw4", "", "--processes=1"]
    for wrong in "2,x", "", "2,":
        choices[1] = f"--test_sessions={wrong}"
        name = wrong[2:]
        with pytest.raises(UserError, match=f"is no session '{name}'; give"):
            recordings.main([str(root), str(folder), *choices])
    choices[1] = "--test_sessions=2"  # too large for a share
    recordings.main([str(root), str(folder), *choices])
    printed = capsys.readouterr().out
    assert printed.startswith("3 of 3 files are read: 2 speakers, 0.00 hours")
    assert ", 1 for the test.\n" in printed
    assert "2 of 2 speakers, as 'ann', have no second recording" in printed
    assert (
        "  python train.py hparams/conformer.yaml --data_folder "
        f"'{folder}' --output_folder 'results/my data'\n"
    ) in printed


def test_a_mistake_is_found_among_three_speakers():
    found = recorded("a/1", "b/1", "c/1", "a/2")
    for one in found[:3]:
        one.feature_path = "same.pt"
    leave_out_copies(found)
    assert [one.verdict for one in found] == ["skipped"] * 3 + ["ok"]
