"""The command: python -m spkid NAME ..., or spkid NAME ... once installed.

Commands:
  prepare   folders of recordings -> data to train on
  identify  who speaks in recordings
  verify    whether two recordings are of one speaker
  enroll    add a speaker, without training
  forget    remove speakers
  embed     embeddings of recordings, as a NumPy file
  export    a run -> SpeechBrain's folder and an ONNX file
  report    draw a finished run's report again
  demo      a web page to talk to

MODEL is a run's output folder, an exported folder or an .onnx file. NAME -h
shows a command's options. Exit status of identify and verify: 0 if a speaker
is known or the voices are the same, 1 if not, 2 in trouble.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module

from spkid.errors import UserError, one_of, run_command

__all__ = ["main", "run"]
UNMEASURED = (
    "training held out too little to know how strangers score, so the --fpir "
    "isn't promised; give --closed_set if there are no strangers."
)
# Commands with a module of their own.
ELSEWHERE = {
    "prepare": "spkid.data.recordings",
    "export": "spkid.inference.export",
    "report": "spkid.evaluation.report.__main__",
    "demo": "spkid.inference.demo",
}


def parser_of(name: str, about: str) -> argparse.ArgumentParser:
    """The options that all questions share."""
    parser = argparse.ArgumentParser(prog=f"spkid {name}", description=about)
    parser.add_argument("model", help="a run, an exported folder or .onnx file")
    parser.add_argument(
        "--runtime",
        choices=("torch", "onnx"),
        help="torch, or onnx, which needs no PyTorch",
    )
    parser.add_argument("--device", default="cpu", help="where PyTorch runs")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let the run name classes of others, whose code then runs",
    )
    return parser


def opened(args: argparse.Namespace):
    """The model that the command line names."""
    from spkid.inference import load

    return load(args.model, args.runtime, args.device, args.trust)


def identify(arguments: list[str]) -> int:
    """Who speaks in recordings."""
    from spkid.backend import MOST, check_rate
    from spkid.inference.questions import FPIR

    parser = parser_of("identify", "Says who speaks in recordings.")
    parser.add_argument("files", nargs="+", help="recordings")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--fpir",
        type=float,
        default=FPIR,
        help="share of strangers who may be taken for somebody (%(default)s)",
    )
    parser.add_argument(
        "--closed_set",
        action="store_true",
        help="there are no strangers: always name the likeliest speaker",
    )
    parser.add_argument(
        "--windows", action="store_true", help="say who speaks when, coarsely"
    )
    args = parser.parse_args(arguments)
    check_rate(args.fpir, MOST, "--fpir")
    model, answers, failed = opened(args), [], False
    if not (args.closed_set or model.backend.calibration.is_measured):
        print(f"Warning: {args.model}: {UNMEASURED}", file=sys.stderr)
    for file in args.files:
        try:
            rule = args.fpir, args.closed_set
            found = model.identify(file, *rule)
            if args.windows:
                segments = model.who_speaks_when(file, *rule)
                found = replace(found, segments=segments)
        except UserError as error:  # the others are answered
            print(f"Error: {error}", file=sys.stderr)
            failed = True
            continue
        answers.append(found)
        if not args.json:
            print(in_words(found), flush=True)
            for part in found.segments:
                who = part.speaker or "unknown or not sure"
                print(f"  {part.start:.1f} s to {part.end:.1f} s: {who}")
    if args.json:
        print(
            json.dumps(
                [asdict(found) for found in answers], indent=1, allow_nan=False
            )
        )
    if failed:
        return 2
    return int(all(found.speaker is None for found in answers))


def in_words(found) -> str:
    """A line that says an answer."""
    best = ""
    if found.likeliest:
        name, probability = found.likeliest[0]
        best = f"{name} ({probability:.0%} if enrolled)"
    if found.answer == "known":
        return f"{found.file}: {found.speaker} ({found.probability:.0%})"
    if found.answer == "unsure":
        return f"{found.file}: not sure, record more; perhaps {best}"
    return f"{found.file}: unknown" + (f"; nearest: {best}" if best else "")


def verify(arguments: list[str]) -> int:
    """Whether two recordings are of one speaker."""
    from spkid.backend import MOST_PAIRS, check_rate
    from spkid.inference.questions import FALSE_ALARM

    parser = parser_of(
        "verify", "Says whether two recordings are of one voice."
    )
    parser.add_argument("a", help="a recording")
    parser.add_argument("b", help="another one")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--false_alarm",
        type=float,
        default=FALSE_ALARM,
        help="share of different voices that may pass (%(default)s)",
    )
    args = parser.parse_args(arguments)
    check_rate(args.false_alarm, MOST_PAIRS, "--false_alarm")
    found = opened(args).verify(args.a, args.b, args.false_alarm)
    if args.json:
        print(json.dumps(asdict(found), allow_nan=False))
    else:
        print(
            f"{'the same speaker' if found.same else 'different speakers'} "
            f"(score {found.score:.2f}, threshold {found.threshold:.2f})"
        )
    return int(not found.same)


def enroll(arguments: list[str]) -> int:
    """Adds a speaker, without training."""
    parser = parser_of("enroll", "Adds a speaker, or more recordings of one.")
    parser.add_argument("name", help="the speaker's")
    parser.add_argument("files", nargs="+", help="recordings of the speaker")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="first remove everybody else; their voices stay as a background",
    )
    args = parser.parse_args(arguments)

    def change(model) -> None:
        if args.alone:
            model.forget(*model.backend.speakers)
        model.enroll(args.name, args.files)

    return changed(args, change)


def forget(arguments: list[str]) -> int:
    """Removes speakers."""
    parser = parser_of("forget", "Removes speakers and their voices.")
    parser.add_argument("names", nargs="+", help="the speakers'")
    args = parser.parse_args(arguments)
    status = changed(args, lambda model: model.forget(*args.names))
    print("What was trained, a run's weights and backend.npz, stays as it is.")
    return status


def changed(args: argparse.Namespace, change: Callable) -> int:
    """Changes a model's speakers, and says where they are kept."""
    from spkid.inference.opening import changing, save_gallery

    with changing(args.model):
        model = opened(args)
        change(model)
        path = save_gallery(args.model, model.backend)
    print(f"{path}: {len(model.backend.speakers)} speakers are enrolled")
    return 0


def embed(arguments: list[str]) -> int:
    """Embeddings of recordings, as a NumPy file."""
    import numpy as np

    from spkid.files import save_atomically

    parser = parser_of("embed", "Writes embeddings of recordings.")
    parser.add_argument("files", nargs="+", help="recordings")
    parser.add_argument(
        "--output",
        default="embeddings.npz",
        help="arrays path [n] and embedding [n, size], whose dot products are "
        "cosines (%(default)s)",
    )
    args = parser.parse_args(arguments)
    model = opened(args)
    found = model.backend.project(model.embed_files(args.files))
    content = io.BytesIO()
    np.savez(content, path=np.array(args.files), embedding=found)
    save_atomically(content.getvalue(), args.output)
    print(f"{args.output}: {len(found)} embeddings of {found.shape[1]} values")
    return 0


HERE = {
    "identify": identify,
    "verify": verify,
    "enroll": enroll,
    "forget": forget,
    "embed": embed,
}


def main(arguments: list[str]) -> int | None:
    """Runs the command that the first argument names; gives the exit status.

    Example
    -------
    >>> main(["forget", "nowhere", "ann"])
    Traceback (most recent call last):
    spkid.errors.UserError: nowhere: no such folder; name a run's output folder.
    """
    name = arguments[0] if arguments else "-h"
    if name in HERE:
        return HERE[name](arguments[1:])
    if name in ELSEWHERE:
        return import_module(ELSEWHERE[name]).main(arguments[1:])
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    one_of(name, (*ELSEWHERE, *HERE), "command")
    return None


def run() -> None:
    """The console script ``spkid``, which ends the process.

    Example
    -------
    >>> import sys
    >>> monkeypatch = getfixture("monkeypatch")
    >>> monkeypatch.setattr(sys, "argv", ["spkid", "--help"])
    >>> run()  # doctest: +ELLIPSIS
    The command: python -m spkid NAME ..., or spkid NAME ... once installed.
    ...
    """
    try:
        run_command(main, trouble=2)
    except Exception:
        traceback.print_exc()
        sys.exit(2)  # 1 is an answer


if __name__ == "__main__":
    run()
