#!/usr/bin/env python3
"""Writes a submission again, from a finished run.

Usage: python predict.py OUTPUT_FOLDER [--data_folder DIR] [--submission FILE]
                         [--device cpu]

The data folder is the run's own unless another one, with the same speakers,
is named; the submission goes to OUTPUT_FOLDER/submission.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import prepare
from results import WEIGHTS, write_submission
from speaker_brain import SpeakerBrain
from spkid.dataio import label_encoder, make_datasets, make_loaders
from spkid.errors import UserError, run_command
from spkid.hparams import load_hparams
from spkid.scoring import summarize
from validate import manifest, read_corpus

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
    hparams = load_run(args.output_folder)
    corpus = read_corpus(
        args.data_folder or hparams["data_folder"],
        hparams["on_bad_file"],
        hparams["max_bad_share"],
    )
    if corpus.n_mels != hparams["n_mels"]:
        raise UserError(
            f"{corpus.folder / 'metadata.json'}: n_mels is {corpus.n_mels}, "
            f"but the run was trained with {hparams['n_mels']}."
        )
    speakers = args.output_folder / "speakers.txt"
    if corpus.speakers != speakers.read_text(encoding="utf-8").splitlines():
        raise UserError(
            f"{corpus.folder / 'mapping.json'}: its speakers are not those of "
            f"{speakers}; give the mapping.json that the run was trained with."
        )
    pack = prepare.pack_corpus(
        corpus, hparams["pack_folder"], hparams["pack"], hparams["pack_dtype"]
    )
    manifests = {"test": manifest(corpus.test)}
    encoder = label_encoder(corpus.speakers)
    brain = SpeakerBrain(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts={"device": args.device} if args.device else None,
    )
    if hparams["pack_on_device"]:
        pack.to(brain.device)
    datasets = make_datasets(hparams, manifests, pack, encoder)
    brain.evaluate(make_loaders(hparams, datasets)["test"])
    target = args.submission or args.output_folder / "submission.csv"
    write_submission(corpus, brain.scores, target)
    accuracy = summarize(brain.scores)["accuracy"]
    known = "unknown" if accuracy is None else f"{accuracy:.4f}"
    print(f"Test accuracy {known}\n{target}: {len(corpus.test_paths)} rows")


if __name__ == "__main__":
    run_command(main)
