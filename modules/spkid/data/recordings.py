"""From folders of sound files to a corpus in the form of the HW4 data.

RECORDINGS holds SPEAKER/FILE or SPEAKER/SESSION/FILE: the first folder is the
speaker; the second one, if any, is the session, an occasion with its room and
microphone; deeper folders belong to their session. FOLDER gets the corpus, and
recordings.csv, which says what became of each file. The same command, given
again, goes on where it was stopped, and reads only what is new or changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    ProcessPoolExecutor,
    as_completed,
)
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from tqdm import tqdm

from spkid.audio import SILENCES, audio_facts
from spkid.data.missing import check_folder
from spkid.data.prepared import (
    TABLE,
    Recording,
    Recordings,
    hold_out_sessions,
    leave_out_copies,
    save_corpus,
    save_table,
    summary,
)
from spkid.data.processes import start_worker
from spkid.errors import UserError, one_line, one_of
from spkid.features import load_features
from spkid.files import flush, lock_folder

# Of sound files; others, as texts and pictures, are not opened.
SOUND = re.compile(
    r".*\.(wave?|flac|mp3|og[ga]|opus|m4[ab]|mp4|aac|aif[fc]?|au|snd|caf|w64|"
    "rf64|wma|webm|mka|amr|3gp)",
    re.IGNORECASE | re.DOTALL,
)
SHORTEST = 1.0  # seconds of speech; with less, a recording is left out
CLIPPED = 0.001  # share of the samples; with more, there is a warning
QUIET = 0.01  # peak, -40 dB of full scale; below, there is one
NARROW = 4500  # Hz; what was recorded at 8 kHz has nothing above 4000
JOURNAL = "recordings.jsonl"  # what has been read, a line for each file
VERSION = 1  # of what is measured; after another one, all is read again
# What is measured of a file; of one that is skipped, only some of it.
MEASURED = {"seconds": float, "speech_seconds": float, "sample_rate": int}
MEASURED |= {"channels": int, "reason": str, "feature_path": str}
MEASURED |= {"mel_len": int}
FEATURES = re.compile(r"uttr-[0-9a-f]{32}\.pt")
# Line breaks, NUL and half characters would break the text files of a run.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def prepare_audio(
    recordings: str | Path,
    folder: str | Path,
    silence: str = "vad",
    test_sessions: float | Sequence[str] = 0.0,
    processes: int | None = None,
    progress: bool = True,
) -> list[Recording]:
    """Makes a corpus of sound files, or brings it up to date.

    A file that can't be used is left out. The same audio under two names is
    read once; under two speakers it is left out, because one of them is wrong.

    sessions.json is written if any recording lies in a session's folder; one
    that doesn't is then a session of its own. Without such folders it is not
    written: several files of one occasion would pass for sessions, and the
    validation would be too optimistic. Training then infers the sessions.

    Arguments
    ---------
    recordings : str or pathlib.Path
        Holds speaker/file or speaker/session/file.
    folder : str or pathlib.Path
        For the corpus: a new or empty one, or the one of an earlier run.
    silence : str
        "vad": a voice activity detector finds the speech; "hw4": its level
        does, as in the HW4 data.
    test_sessions : float or sequence of str
        What becomes the test: the last sessions of each speaker with two or
        more, a share of them (0: none, otherwise at least one); or sessions
        by name, "session" or "speaker/session". Without folders of sessions,
        each file is one, named like it without its ending. A speaker keeps
        one for training.
    processes : int, optional
        How many files are read at a time; None: one for each core.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    list of Recording
        All files in natural order, but hidden ones.

    Raises
    ------
    UserError
        If a choice can't be carried out, or no recording can be used.

    Example
    -------
    >>> import numpy, soundfile
    >>> place = getfixture("tmp_path")
    >>> for name in "ann", "bob":
    ...     (place / "voices" / name).mkdir(parents=True)
    ...     tone = numpy.cos(numpy.arange(32000) * 0.01 * ord(name[0]))
    ...     soundfile.write(place / "voices" / name / "1.flac", tone, 16000)
    >>> made = prepare_audio(place / "voices", place / "corpus", silence="hw4",
    ...                      progress=False)
    >>> [(one.speaker, one.part, one.mel_len) for one in made]
    [('ann', 'train', 201), ('bob', 'train', 201)]
    """
    one_of(silence, SILENCES, "silence")
    folder, root = Path(folder), os.path.realpath(recordings)
    if processes is None:
        affinity = getattr(os, "sched_getaffinity", lambda _: ())(0)
        processes = len(affinity) or os.cpu_count() or 1
    if processes < 1:
        raise UserError(f"processes={processes} must be at least 1.")
    check_folder(Path(recordings), "name a folder with one for each speaker")
    if f"{os.path.realpath(folder)}{os.sep}".startswith(f"{root}{os.sep}"):
        raise UserError(
            f"{folder}: lies in the folder of the recordings; name another."
        )
    with contextlib.suppress(FileNotFoundError):
        names = [n for n in os.listdir(folder) if n[0] != "." and n != "lock"]
        if names and JOURNAL not in names:
            raise UserError(
                f"{folder}: has files, as {min(names)!r}, but no corpus that "
                "was made of recordings; name another folder."
            )
    lock = lock_folder(folder)
    try:
        found = [_look_at(root, path) for path in _walk(root)]
        hold_out_sessions(found, test_sessions)  # refuses a wrong name at once
        _read_all(root, folder, silence, found, processes, progress)
        leave_out_copies(found)
        hold_out_sessions(found, test_sessions)
        save_table(found, folder)
        if not any(one.feature_path for one in found):
            raise UserError(
                f"{recordings}: has no recording that can be used; add some in "
                f"a folder for each speaker.\n{summary(found)}"
            )
        save_corpus(found, folder, silence)
    finally:
        if lock:
            lock.release()
    return found


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Files in natural order, also behind links; folders that can't be opened
    among them."""
    if (real := os.path.realpath(folder)) in above:  # a circle of links
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: _natural(entry.name))
    except OSError:
        yield folder
        return
    for entry in found:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if os.path.isdir(entry.path):  # no error for a circle of links
            yield from _walk(entry.path, (*above, real))
        else:
            yield entry.path


def _natural(name: str) -> list:
    """Sorts "take 2" before "take 10"."""
    parts: list = re.split("([0-9]+)", name.casefold())
    parts[1::2] = map(int, parts[1::2])
    return [parts, name]


def _look_at(root: str, path: str) -> Recording:
    """A file's speaker and session, and why it isn't read, if it isn't."""
    place = Path(path).relative_to(root)
    one = Recording(place.as_posix())
    speaker, *session = place.parts[:-1] or ("",)
    if not os.path.isfile(path):  # a pipe would be waited for
        one.reason = "unreadable: no file or folder that can be opened"
    elif not SOUND.fullmatch(place.name):
        one.reason = "not audio"
    elif not speaker:
        one.reason = "no speaker: put it into the speaker's folder"
    else:
        escaped = UNPRINTABLE.sub(lambda bad: ascii(bad[0])[1:-1], place.stem)
        one.speaker, one.session = speaker, (*session, escaped)[0]
        if UNPRINTABLE.search(one.speaker + one.session):
            one.reason = "a folder's name isn't plain text: rename it"
    return one


def _read_all(
    root: str,
    folder: Path,
    silence: str,
    found: Recordings,
    processes: int,
    progress: bool,
) -> None:
    """Fills in what each file holds, from the journal or from the file."""
    known, jobs = _read_journal(folder), {}
    for one in found:
        if one.reason:
            continue
        info = os.stat(os.path.join(root, one.path))
        stamp = VERSION, silence, one.path, info.st_mtime_ns, info.st_size
        name = known.get(stamp, {}).get("feature_path")
        if stamp in known and (not name or os.path.isfile(folder / name)):
            vars(one).update(known[stamp])
        else:
            jobs[one.path] = one, stamp
    for left in folder.glob("uttr-*.pt.*.part"):  # of a run that was killed
        left.unlink()
    # The longest first, lest one process reads it alone at the end.
    paths = sorted(jobs, key=lambda path: -jobs[path][1][-1])
    work = partial(_read, root, folder, silence)
    with (
        tqdm(
            desc="Reading recordings",
            total=sum(stamp[-1] for _, stamp in jobs.values()),
            unit="B",
            unit_scale=True,
            disable=not (progress and jobs),
        ) as bar,
        contextlib.closing(_in_workers(work, paths, processes)) as results,
        open(folder / JOURNAL, "a", encoding="utf-8") as journal,
    ):
        for path, measured in results:
            one, stamp = jobs[path]
            vars(one).update(measured)
            if "seconds" in measured:  # the others are tried again each time
                journal.write(f"\n{json.dumps([stamp, measured])}")
                journal.flush()
            bar.update(stamp[-1])


def _read_journal(folder: Path) -> dict[tuple, dict]:
    """What earlier runs measured, by file and settings."""
    known = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / JOURNAL).read_bytes().splitlines():
            # A run was killed while it wrote, or it isn't ours.
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                stamp, measured = json.loads(line)
                if _is_ours(measured := dict(measured)):
                    known[tuple(stamp)] = measured
    return known


def _is_ours(measured: dict) -> bool:
    """Whether a line of the journal is one that _read() may give."""
    if any(type(measured[key]) is not MEASURED.get(key) for key in measured):
        return False
    if name := measured.get("feature_path"):
        return len(measured) == len(MEASURED) and bool(FEATURES.fullmatch(name))
    return bool(measured.get("reason"))


def _read(root: str, folder: Path, silence: str, path: str) -> dict:
    """What a file holds, as fields of Recording; writes its features."""
    file = os.path.join(root, path)
    measured: dict = {}
    try:
        facts = audio_facts(file)
        measured["seconds"] = round(facts.seconds, 2)
        measured["sample_rate"] = facts.sample_rate
        measured["channels"] = facts.channels
        features = load_features(file, silence)
    except Exception as error:  # one bad file stops nothing
        if type(error) is UserError:  # something isn't installed
            raise
        what = "no speech" if measured else "unreadable"
        words = one_line(error).removeprefix(f"{file}: ").replace("; ", ", ")
        return {**measured, "reason": f"{what}: {words}"}
    measured["speech_seconds"] = seconds = (len(features) - 1) / 100
    if seconds < SHORTEST:
        reason = f"too short: {seconds:.2f} s of speech, less than {SHORTEST}"
        return {**measured, "reason": reason}
    warnings = []
    if facts.clipped > CLIPPED:
        warnings.append(f"clipped: {facts.clipped:.1%} of the samples")
    if facts.peak < QUIET:
        level = 20 * math.log10(facts.peak)
        warnings.append(f"nearly silent: its peak is {level:.0f} dB")
    if facts.bandwidth < NARROW:
        edge = f"nothing above {facts.bandwidth / 1000:.1f} kHz"
        warnings.append(f"narrow band: {edge}")
    real = os.path.realpath(file)
    if not real.startswith(os.path.join(root, "")):
        warnings.append("a link leads out of the folder")
    content = memoryview(features.numpy())  # type: ignore[arg-type]
    digest = hashlib.blake2b(content, digest_size=16)
    name = f"uttr-{digest.hexdigest()}.pt"
    part = folder / f"{name}.{os.getpid()}.part"
    with open(part, "wb") as opened:
        torch.save(features, opened)
        opened.flush()
        flush(opened.fileno())
    os.replace(part, folder / name)
    measured |= {"feature_path": name, "mel_len": len(features)}
    return {**measured, "reason": "; ".join(warnings)}


def _in_workers(
    work: Callable, jobs: Sequence[str], processes: int
) -> Generator[tuple[str, dict], None, None]:
    """Yields (job, work(job)) as they are done.

    If a process is killed, as by a system without memory, the rest is done
    one by one, so that a job that kills its process is found and left out.
    """
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    waiting = dict.fromkeys(jobs)
    while waiting:
        others = set(active_children())
        try:
            count = min(processes, len(waiting), 61)  # Windows has no more
            pool = ProcessPoolExecutor(count, context, start_worker)
        except (OSError, NotImplementedError):  # /dev/shm is full or missing
            yield from ((job, work(job)) for job in waiting)
            return
        futures = {}
        try:
            with contextlib.suppress(BrokenExecutor):
                for job in waiting:
                    futures[pool.submit(work, job)] = job
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenExecutor):
                    del waiting[futures[future]]
                    yield futures[future], future.result()
        finally:
            for child in set(active_children()) - others:
                child.kill()
            pool.shutdown(cancel_futures=True)
        if waiting and processes == 1:
            job = next(iter(waiting))
            del waiting[job]
            what = "the process that read it was killed, for want of memory?"
            yield job, {"reason": f"unreadable: {what}"}
        processes = 1


def main(arguments: list[str]) -> None:
    """Runs ``python -m spkid prepare``.

    Example
    -------
    >>> main(["nowhere", "data"])
    Traceback (most recent call last):
    ...
    spkid.errors.UserError: nowhere: there is no such folder; name a folder ...
    """
    parser = argparse.ArgumentParser(
        "spkid prepare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("recordings", type=Path, metavar="RECORDINGS")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--silence",
        choices=SILENCES,
        default="vad",
        help="vad (default): a voice activity detector finds the speech;\n"
        "hw4: its loudness does, as in the HW4 data",
    )
    parser.add_argument(
        "--test_sessions",
        type=_share_or_names,
        default=0.0,
        metavar="SHARE|NAMES",
        help="sessions for the test: a share of each speaker's, the last ones\n"
        "(0.2), or names (monday,ann/tuesday)",
    )
    words = "files that are read at a time (default: one for each core)"
    parser.add_argument("--processes", type=int, metavar="N", help=words)
    args = parser.parse_args(arguments)
    found, folder = prepare_audio(**vars(args)), args.folder
    results = f"results/{folder.resolve().name}"
    print(
        f"{summary(found)}\n{folder / TABLE} has a row for each file. Next:\n"
        "  python train.py hparams/conformer.yaml --data_folder "
        f"{shlex.quote(str(folder))} --output_folder {shlex.quote(results)}"
    )


def _share_or_names(text: str) -> float | list[str]:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    return text.split(",")
