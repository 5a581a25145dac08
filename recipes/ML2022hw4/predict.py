#!/usr/bin/env python3
"""Says who speaks in test utterances, by a finished run.

Usage: python predict.py OUTPUT_FOLDER [--data_folder DIR] [--submission FILE]
                         [--device cpu]

The data folder is the run's own, and OUTPUT_FOLDER/submission.csv is written
again; or another one, with the run's mapping.json, a testdata.json and its
files, whose speakers go to OUTPUT_FOLDER/submission-DIR.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import prepare
from ml2022hw4_prepare import read_corpus, read_json
from results import (
    WEIGHTS,
    evaluation_settings,
    expectation_line,
    write_submission,
)
from speaker_brain import SpeakerBrain
from spkid.data.corpus import manifest
from spkid.data.dataset import label_encoder, make_datasets, make_loaders
from spkid.errors import UserError, run_command
from spkid.evaluation.scores import Score, expect, load_evaluation, summarize
from spkid.hparams import check_device, load_hparams

# The run's loggers and checkpoints are not touched.
UNUSED = "checkpointer: null\ntrain_logger: null"


def load_run(folder: Path) -> dict:
    """The hyperparameters of a finished run, with its trained weights.

    Arguments
    ---------
    folder : pathlib.Path
        The run's output folder.

    Returns
    -------
    dict

    Raises
    ------
    UserError
        If there is no finished run.
    """
    for name in WEIGHTS:
        if not (folder / "model" / f"{name}.ckpt").exists():
            raise UserError(
                f"{folder}: no finished run is there (model/{name}.ckpt is "
                "missing); name the --output_folder of one."
            )
    hparams = load_hparams(folder / "hyperparams.yaml", UNUSED)
    for name in WEIGHTS:
        weights = torch.load(
            folder / "model" / f"{name}.ckpt",
            map_location="cpu",
            weights_only=True,
        )
        hparams[name].load_state_dict(weights)
    return hparams


def load_validation(
    folder: Path, hparams: dict
) -> tuple[dict[str, Score], dict[str, str]]:
    """What a run's model said of its validation.

    Arguments
    ---------
    folder : pathlib.Path
        The run's output folder.
    hparams : dict
        Its hyperparameters.

    Returns
    -------
    tuple of dict
        As :func:`spkid.evaluation.scores.load_evaluation`; empty where nothing was kept,
        or was scored in another way than ``hparams`` say, as after a
        ``--test_only`` that didn't reach its end.
    """
    paths = folder / "results.json", folder / "evaluation.npz"
    if not all(path.exists() for path in paths):
        return {}, {}
    if read_json(paths[0]).get("scored_by") != evaluation_settings(hparams):
        return {}, {}
    return load_evaluation(paths[1])


def main(arguments: list[str]) -> None:
    """Scores the test utterances and writes the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--data_folder", type=Path)
    parser.add_argument("--submission", type=Path)
    parser.add_argument("--device", default=None)
    args = parser.parse_args(arguments)
    if args.device:
        check_device(args.device)
    hparams = load_run(args.output_folder)
    other = args.data_folder is not None
    corpus = read_corpus(
        args.data_folder or hparams["data_folder"],
        hparams["on_bad_file"],
        hparams["max_bad_share"],
        test_only=other,
    )
    if not corpus.test:
        raise UserError(
            f"{corpus.folder / 'testdata.json'}: has no utterance; add some."
        )
    if corpus.n_mels != hparams["n_mels"]:
        raise UserError(
            f"{corpus.folder / 'testdata.json'}: n_mels is {corpus.n_mels}, "
            f"but the run was trained with {hparams['n_mels']}."
        )
    speakers = args.output_folder / "speakers.txt"
    if corpus.speakers != speakers.read_text(encoding="utf-8").splitlines():
        raise UserError(
            f"{corpus.folder / 'mapping.json'}: its speakers are not those of "
            f"{speakers}; give the mapping.json that the run was trained with."
        )
    validated = load_validation(args.output_folder, hparams)
    packed = hparams["pack"] and not other  # what is read once needs no pack
    pack = prepare.pack_corpus(
        corpus, hparams["pack_folder"], packed, hparams["pack_dtype"]
    )
    manifests = {"test": manifest(corpus.test)}
    encoder = label_encoder(corpus.speakers)
    brain = SpeakerBrain(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts={"device": args.device} if args.device else None,
    )
    if hparams["pack_on_device"] and packed:
        pack.to(brain.device)
    datasets = make_datasets(hparams, manifests, pack, encoder)
    brain.evaluate(make_loaders(hparams, datasets)["test"])
    name = (
        f"submission-{corpus.folder.resolve().name}" if other else "submission"
    )
    target = args.submission or args.output_folder / f"{name}.csv"
    write_submission(corpus, brain.scores, target)
    accuracy = summarize(brain.scores)["accuracy"]
    known = "unknown" if accuracy is None else f"{accuracy:.4f}"
    expected = expect(*validated, brain.scores)
    print(
        f"Test accuracy {known}\n{expectation_line(expected)}"
        f"{target}: {len(corpus.test_paths)} rows"
    )


if __name__ == "__main__":
    run_command(main)
