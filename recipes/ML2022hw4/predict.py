#!/usr/bin/env python3
"""Says who speaks in test utterances, with a finished run.

Usage: python predict.py OUTPUT_FOLDER [--data_folder DIR] [--submission FILE]
                         [--device cpu] [--trust] [--pack_folder DIR ...]

Without --data_folder, OUTPUT_FOLDER/submission.csv is written again. With it,
the utterances of DIR's testdata.json are scored and their speakers written to
OUTPUT_FOLDER/submission-DIR.csv; DIR needs the mapping.json that the run was
trained with. --trust lets the run name classes of others, as a pooling of your
own; importing them runs their code. The options of ml2022hw4_prepare.py
replace what the run was trained with.
"""

from __future__ import annotations

import signal

if __name__ in ("__main__", "__mp_main__") and (
    signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):  # Ctrl-C in the imports is quiet
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import io
import logging
import os
from collections import Counter
from hashlib import blake2b
from pathlib import Path

from speechbrain.core import RunOptions

from ml2022hw4_prepare import data_options, prepare
from spkid.data import Corpus, manifest, only_speakers
from spkid.data.pack import INDEX
from spkid.errors import UserError, run_command
from spkid.evaluation import Evaluation, expect, load_validation
from spkid.files import save_atomically
from spkid.hparams import OUTDATED, Settings
from spkid.inference import SpeakerIdentifier
from spkid.run_options import check_run_options
from spkid.training.run import expectation_line

logger = logging.getLogger(__name__)


def write_submission(
    corpus: Corpus, tested: Evaluation, path: str | Path
) -> None:
    """Writes the competition's CSV, in the order of testdata.json.

    The competition wants a row for each utterance, so one that was skipped
    gets the speaker with most training utterances (the first one of
    mapping.json, where no training utterances are at hand).
    """
    counts = Counter(utterance.speaker for utterance in corpus.labelled)
    counts[corpus.speakers[0]] += 0  # so that there is one
    ((commonest, _),) = counts.most_common(1)
    names = [corpus.speakers[guess] for guess in tested.guess.tolist()]
    guesses = dict(zip(tested.id.tolist(), names, strict=True))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Id", "Category"])
    for name in corpus.test_paths:
        writer.writerow([name, guesses.get(name, commonest)])
    missing = len(corpus.test_paths) - len(corpus.test)
    if missing:
        logger.warning(
            "%s: %d test utterances could not be read; their rows say %s.",
            path,
            missing,
            commonest,
        )
    save_atomically(text.getvalue(), path)


def default_name(corpus: Corpus, other: bool) -> str:
    """The name of the CSV: other data's folder is in it, long ones cut."""
    name = corpus.folder.resolve().name
    if len(os.fsencode(name)) > 200:
        digest = blake2b(os.fsencode(name), digest_size=4).hexdigest()
        name = f"{name[:40]}-{digest}"
    return f"submission-{name}.csv" if other else "submission.csv"


def holds_packs(folder: str | None) -> bool:
    """Whether packs are kept in a folder already."""
    return any(Path(folder).glob(f"*/{INDEX}")) if folder else False


def main(arguments: list[str]) -> None:
    """Scores the test utterances and writes the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        parents=[data_options()],
    )
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--data_folder", type=Path)
    parser.add_argument("--submission", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust", action="store_true")
    args = parser.parse_args(arguments)
    if not args.device:
        raise UserError("--device has no value; give one, as cpu.")
    if args.submission and args.submission.is_dir():  # as "" is
        raise UserError(
            f"--submission {args.submission}: is a folder; name a file in it."
        )
    check_run_options(RunOptions(device=args.device))
    identifier = SpeakerIdentifier.from_run(
        args.output_folder, args.device, args.trust
    )
    settings = Settings.of_run(args.output_folder)
    keys = (
        *("pack_folder", "pack", "pack_dtype"),
        *("on_bad_file", "max_bad_share", "speakers"),
    )
    settings.need(("data_folder", *keys), OUTDATED)
    run, other = settings.values, args.data_folder is not None
    if not (other or run["data_folder"]):
        raise UserError(
            f"{settings.path}: names no data; give the --data_folder."
        )
    validated = load_validation(args.output_folder, settings.scoring())
    if validated and validated.speakers != identifier.speakers:
        validated = None  # of another run
    options = {key: vars(args).get(key, run[key]) for key in keys}
    if "pack_folder" not in args and not holds_packs(run["pack_folder"]):
        options["pack_folder"] = None  # a stranger may have named any place
    if other and "pack" not in args:
        options["pack"] = False  # what is read once needs no pack
    corpus, features = prepare(
        args.data_folder or run["data_folder"], test_only=other, **options
    )
    if options["speakers"] == "present":  # those that the run was trained on
        corpus = only_speakers(corpus, identifier.speakers)
    if not corpus.test:
        raise UserError(
            f"{corpus.folder / 'testdata.json'}: has no utterance; add some."
        )
    if corpus.n_mels != run["n_mels"]:
        raise UserError(
            f"{corpus.folder / 'testdata.json'}: n_mels is {corpus.n_mels}, "
            f"but the run was trained with {run['n_mels']}."
        )
    if tuple(corpus.speakers) != identifier.speakers:
        raise UserError(
            f"{corpus.folder / 'mapping.json'}: its speakers are not those of "
            f"{args.output_folder / 'speakers.txt'}; give the mapping.json "
            "that the run was trained with."
        )
    tested = identifier.score(features, manifest(corpus.test), "test")
    default = args.output_folder / default_name(corpus, other)
    target = args.submission or default
    write_submission(corpus, tested, target)
    accuracy = tested.accuracy()
    known = "unknown" if accuracy is None else f"{accuracy:.4f}"
    expected = expect(validated, tested) if validated else None
    print(
        f"Test accuracy: {known}\n{expectation_line(expected)}"
        f"{target}: {len(corpus.test_paths)} rows"
    )


if __name__ == "__main__":
    run_command(main)
