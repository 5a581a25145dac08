#!/usr/bin/env python3
"""Trains a speaker identification system on data in the form of ML2022 HW4.

Usage: python train.py hparams/conformer.yaml [--data_folder DIR] [--key value]

Any key of the YAML file and any run option of SpeechBrain can be given. The
same command, given again, resumes where it was stopped.
"""

from __future__ import annotations

import signal

if __name__ in ("__main__", "__mp_main__") and (
    signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):  # Ctrl-C in the imports is quiet
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.core import RunOptions
from speechbrain.utils.distributed import if_main_process

import mini_corpus
from ml2022hw4_prepare import DEFAULT_DATA, prepare
from predict import write_submission
from spkid.backend.fit import fit_backend
from spkid.data import FeatureDataset, eval_loader, label_encoder, train_loader
from spkid.distributed import join_group, on_first, rank, together, world_size
from spkid.errors import run_command, table
from spkid.evaluation import Evaluation
from spkid.files import read_json, save_atomically
from spkid.hparams import Settings
from spkid.inference import WEIGHTS, SpeakerIdentifier
from spkid.keys import NEEDED
from spkid.run_options import check_run_options, parse_arguments
from spkid.sessions import write_manifests
from spkid.training import RobustBrain, RunFolder, RunState, explained
from spkid.training.run import check_start, debug_settings, readable_log_errors

DEBUG_UTTERANCES = 4


class SpeakerBrain(RobustBrain):
    """Trains ``embedding_model`` and ``classifier``; scores utterances."""

    identifier: SpeakerIdentifier  # of the modules that are trained
    held_out: dict[str, dict]  # the validation's manifest
    run_state: RunState
    averaged = 0  # checkpoints whose mean the weights are

    def compute_forward(self, batch, stage):
        """Log-posteriors [batch, 1, speakers]; a margin in training only."""
        features, relative = batch.feats
        nothing_padded = bool((relative == 1).all())  # then no mask is needed
        features = features.to(self.device)
        relative = None if nothing_padded else relative.to(self.device)
        statistics = batch.statistics.data.to(self.device)
        if stage != sb.Stage.TRAIN:
            # Not through DistributedDataParallel, which would wait for ranks
            # that have fewer batches.
            self.embeddings = self.identifier.embed(
                features, relative, statistics
            )
            return self.identifier.classifier(self.embeddings)
        features = self.modules.preprocess(features, relative, statistics)
        embeddings = self.modules.embedding_model(features, relative)
        targets = batch.target.data.to(self.device)
        return self.modules.classifier(embeddings, targets)

    def compute_objectives(self, predictions, batch, stage):
        """Negative log-likelihood; in validation, scores are kept."""
        targets = batch.target.data.to(self.device)
        if stage == sb.Stage.TRAIN:
            return sb.nnet.losses.nll_loss(
                predictions,
                targets,
                label_smoothing=self.hparams.label_smoothing,
            )
        own = [self.held_out[key] for key in batch.id]
        self.scored.append(
            Evaluation.of_batch(
                batch.id,
                predictions.squeeze(1),
                targets.squeeze(1),
                self.embeddings.squeeze(1),
                [entry["length"] for entry in own],
                [entry["part"] for entry in own],
                self.identifier.speakers,
            )
        )
        return predictions.new_zeros(())  # the table has the losses

    def on_fit_batch_start(self, batch, should_step):
        """Learning rate and margin follow the share of planned steps."""
        per_epoch = -(-self.batches_per_epoch // self.grad_accumulation_factor)
        planned = self.hparams.number_of_epochs * per_epoch
        progress = (self.optimizer_step + 1) / planned
        for group in self.optimizer.param_groups:
            group["lr"] = self.hparams.lr_schedule(progress)
        if hasattr(self.hparams, "margin_schedule"):
            margin = self.hparams.margin_schedule(progress)
            self.hparams.classifier.set_margin(margin)

    def on_stage_start(self, stage, epoch=None):
        """Forgets the scores of the stage before."""
        self.scored = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After validation, logs the epoch and saves a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        speakers = self.identifier.speakers
        table = Evaluation.concatenate(self.scored, speakers).gather()
        figures = {k: v for k, v in table.summary().items() if v is not None}
        # Before the checkpoint: a repeated epoch's line replaces the first.
        for train_logger in self.hparams.loggers:
            train_logger.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
                {"loss": self.train_loss},
                figures,
            )
        self.save_epoch(
            figures,
            max_key="accuracy" if self.held_out else "epoch",
            num_to_keep=self.hparams.average_checkpoints,
        )

    def _fit_valid(self, valid_set, epoch, enable):
        """As SpeechBrain's, which saves no epoch without a validation."""
        super()._fit_valid(valid_set, epoch, enable)
        if valid_set is None:
            self.on_stage_start(sb.Stage.VALID, epoch)
            self.on_stage_end(sb.Stage.VALID, None, epoch)

    def score(self, features, manifest, progress) -> Evaluation:
        """What the weights at hand say of a manifest's utterances."""
        if self.debug:
            manifest = dict(islice(manifest.items(), DEBUG_UTTERANCES))
        if self.noprogressbar or not if_main_process():
            progress = ""
        with self.evaluation_ctx:
            return self.identifier.score(features, manifest, progress)

    def fit_backend(self, features, manifest, validated) -> Evaluation:
        """Fits the back-end on all labelled utterances; gives the validation
        of the whole system, which is honest."""
        trained = self.score(features, manifest, "Back-end")
        labelled = trained.concatenate([trained, validated], trained.speakers)
        entries = manifest | self.held_out
        fitted = fit_backend(
            labelled.embedding,
            labelled.target,
            [entries[name].get("session", name) for name in labelled.id],
            ["train"] * len(trained) + validated.part.tolist(),
            labelled.speakers,
        )
        self.identifier.set_backend(fitted.backend)
        return validated.with_posteriors(fitted.log_posteriors)

    def choose_weights(self, features) -> tuple[int, Evaluation]:
        """Loads the mean of the best checkpoints, or the best one, whichever
        is more accurate on what is held out; gives the count and scores."""
        load = self.checkpointer.load_average
        most = self.hparams.average_checkpoints
        if not self.held_out:
            self.averaged = load(most, "epoch", WEIGHTS)  # the latest ones
            return most, self.score(features, {}, "")
        found = {}
        for count in sorted({1, most}):
            load(count, "accuracy", WEIGHTS)
            found[count] = self.score(features, self.held_out, "Validation")
        best = max(found, key=lambda n: (found[n].summary()["accuracy"], n))
        self.averaged = load(best, "accuracy", WEIGHTS)
        return best, found[best]


def dataio_prep(hparams, features, manifests):
    """Loaders of training crops and of held-out utterances (None: none)."""
    encoder = hparams["label_encoder"]
    loader = train_loader(
        FeatureDataset(
            manifests["train"],
            features,
            encoder,
            segment_frames=hparams["segment_frames"],
            seed=hparams["seed"],
            epoch_counter=hparams["epoch_counter"],
        ),
        batch_size=hparams["batch_size"],
        seed=hparams["seed"],
        sampler=hparams["sampler"],
        bucket_batches=hparams["bucket_batches"],
        num_workers=hparams["num_workers"],
    )
    if not manifests["valid"]:
        return loader, None
    return loader, eval_loader(
        FeatureDataset(manifests["valid"], features, encoder),
        max_frames=hparams["max_frames_per_batch"],
        equal_length=hparams["equal_length_batches"],
        num_workers=hparams["num_workers"],
    )


def make_brain(hparams, run_opts, corpus, held_out) -> SpeakerBrain:
    """The Brain of a run, with all that its checkpoints hold."""
    label_encoder(corpus.speakers, hparams["label_encoder"])
    hparams["loggers"] = [hparams["train_logger"]]
    if hparams["use_tensorboard"]:
        hparams["loggers"].append(hparams["tensorboard_logger"]())
    brain = SpeakerBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.held_out, brain.run_state = held_out, RunState()
    brain.checkpointer.add_recoverable("run_state", brain.run_state)
    brain.identifier = SpeakerIdentifier.from_settings(hparams, corpus.speakers)
    return brain


def read_data(values):
    """The data that the settings name; builds the mini corpus if it is none."""
    folder = values["data_folder"]
    if folder is None:
        print("No --data_folder: the embedded mini corpus is used.", flush=True)
        folder = mini_corpus.build(DEFAULT_DATA / "mini")
    keys = (
        *("pack_folder", "pack", "pack_dtype"),
        *("on_bad_file", "max_bad_share", "speakers"),
    )
    return prepare(folder, **{key: values[key] for key in keys})


def train(settings: Settings, run_opts: RunOptions) -> None:
    """Prepares, trains, tests, and says where the results are; then, where it
    is wanted, once more on all utterances."""
    for first in (True, False):  # the others find what the first one builds
        with together():
            if first == (rank() == 0):
                corpus, features = read_data(settings.values)
    source = settings.values["init_from"]
    settings = settings.replace(
        n_speakers=len(corpus.speakers),
        n_mels=corpus.n_mels,
        silence=corpus.silence,
        data_folder=os.path.abspath(corpus.folder),
        init_from=source and os.path.abspath(source),
    )
    run = RunFolder(settings, run_opts, corpus, features)
    hparams = settings.build()
    on_first(run.save_settings)
    with together(), readable_log_errors(run.path):
        sb.create_experiment_directory(experiment_directory=str(run.path))
    folder = Path(hparams["manifest_folder"])
    on_first(write_manifests, corpus, features, folder, settings.values)
    # SpeechBrain's load_data_json would format names that have braces.
    manifests = {
        name: read_json(folder / f"{name}.json")
        for name in ("train", "valid", "test")
    }
    brain = make_brain(hparams, run_opts, corpus, manifests["valid"])
    if hparams["pack_on_device"]:
        features.to(brain.device)
    train_set, valid_set = dataio_prep(hparams, features, manifests)
    brain.train_sampler = train_set.batch_sampler  # is told the epoch
    brain.checkpointer.add_recoverable("dataloader-TRAIN", train_set)
    if not brain.test_only:  # last: settings that fail don't bind the run
        run.begin(brain.identifier, brain.checkpointer)
        on_first(run.save_identity)
    on_first(announce, run, corpus, manifests)
    if brain.distributed_launch:
        # Otherwise all ranks would drop the same units.
        torch.manual_seed(hparams["seed"] + rank())
    brain.fit(hparams["epoch_counter"], train_set, valid_set)
    if brain.test_only:
        brain.checkpointer.recover_if_possible()  # its epochs and seconds
    averaged, validated = brain.choose_weights(features)
    validated = brain.fit_backend(features, manifests["train"], validated)
    tested = brain.score(features, manifests["test"], "Test")
    if brain.debug:
        on_first(print, "The debug run has passed; it leaves no results.")
        return
    on_first(finish, run, brain, corpus, validated, tested)
    if not (hparams["final_fit"] and manifests["valid"]):
        return
    on_first(print, "Training again, on all utterances (final_fit):")
    best = brain.checkpointer.find_checkpoint(max_key="accuracy").meta["epoch"]
    n_train, n_valid = len(manifests["train"]), len(manifests["valid"])
    derived = ("save_folder", "manifest_folder", "train_log")
    again = settings.without(*derived).replace(
        final_fit=False,
        split="none",
        output_folder=str(run.path / "final"),
        number_of_epochs=max(1, round(best * n_train / (n_train + n_valid))),
        average_checkpoints=averaged,
    )
    train(again, run_opts)  # here, so that this folder stays reserved


def announce(run, corpus, manifests) -> None:
    """Says what is trained on, and where the results go."""
    sizes = [f"{len(part):,} {name}" for name, part in manifests.items()]
    print(
        f"{len(corpus.speakers)} speakers, {', '.join(sizes)} utterances "
        f"from {corpus.folder}"
    )
    if corpus.skipped:
        path = run.path / "skipped.txt"
        save_atomically(table(corpus.skipped, None), path)
        print(f"{path}: {len(corpus.skipped)} unreadable files")
    print(f"Results go to {run.path}", flush=True)


def finish(run, brain, corpus, validated, tested) -> None:
    """Writes weights, submission, figures and report; says where."""
    brain.identifier.save(run.path)
    write_submission(corpus, tested, run.path / "submission.csv")
    results = {
        "averaged_checkpoints": brain.averaged,
        "speakers": len(corpus.speakers),
        "parameters": sum(p.numel() for p in brain.identifier.parameters()),
        "epochs": brain.hparams.epoch_counter.current,
        "skipped_steps": brain.skipped_steps,
        "seconds": round(brain.run_state.seconds, 1),
    }
    run.write_results(results, validated, tested)
    print(
        f"{run.path / 'submission.csv'}: a row for each test utterance\n"
        f"{run.path / 'model'}: the weights\n"
        f"{brain.hparams.train_log}: each epoch",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    """Checks the command line and the settings, and trains."""
    hparams_file, run_opts, overrides = parse_arguments(arguments)
    if "distributed_backend" not in run_opts.overridden_args and (
        not torch.cuda.is_available()
    ):
        run_opts = replace(run_opts, distributed_backend="gloo")
    settings = Settings(hparams_file, overrides)
    check_run_options(run_opts, settings.values)
    join_group(run_opts)
    settings.check(world_size(), NEEDED)
    check_start(settings, run_opts)
    own = debug_settings if run_opts.debug else nullcontext
    with explained(), own(settings) as settings:
        train(settings, run_opts)
    if torch.distributed.is_initialized():
        # A process that ends first may abort, and end the one that is still
        # writing the results.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
