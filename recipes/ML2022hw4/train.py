#!/usr/bin/env python3
"""Trains a speaker identification system on data in the form of ML2022 HW4.

Usage: python train.py hparams/conformer.yaml [--data_folder DIR] [--key value]

Any key of the YAML file and any run option of SpeechBrain can be given. The
same command, given again, goes on where it was stopped.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataio import load_data_json
from speechbrain.utils.distributed import ddp_init_group, if_main_process

import prepare
from spkid.brain import RobustBrain
from spkid.checkpoints import RunState, check_identity, save_atomically
from spkid.dataio import label_encoder, make_datasets, make_loaders
from spkid.errors import run_command
from spkid.hparams import load_hparams
from spkid.inference import UtteranceEmbedder
from spkid.lengths import absolute_lengths
from spkid.scoring import gather_scores, score_batch, summarize

WEIGHTS = ("embedding_model", "classifier")


class SpeakerBrain(RobustBrain):
    """Trains ``embedding_model`` and ``classifier``; scores utterances."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Not through DistributedDataParallel, which would wait for ranks
        # that have fewer batches.
        self.embedder = UtteranceEmbedder(
            self.hparams.embedding_model,
            self.hparams.max_frames_per_batch,
            self.hparams.equal_length_batches,
            self.hparams.evaluation,
            self.hparams.window_frames,
            self.hparams.window_hop,
        )

    def compute_forward(self, batch, stage):
        """Log-posteriors [batch, 1, speakers]; a margin in training only."""
        features, relative = batch.feats
        statistics = batch.statistics.data.to(self.device)
        if bool((relative == 1).all()):
            relative = lengths = None  # nothing is padded, no mask is needed
        else:
            relative = relative.to(self.device)
            lengths = absolute_lengths(relative, features.shape[1])
        features = self.modules.preprocess(
            features.to(self.device), lengths, statistics
        )
        if stage != sb.Stage.TRAIN:
            embeddings = self.embedder(features, lengths)
            return self.hparams.classifier(embeddings)
        embeddings = self.modules.embedding_model(features, relative)
        targets = batch.target.data.to(self.device)
        return self.modules.classifier(embeddings, targets)

    def compute_objectives(self, predictions, batch, stage):
        """Negative log-likelihood; what was predicted is kept by id."""
        targets = batch.target.data.to(self.device)
        if stage == sb.Stage.TRAIN:
            return sb.nnet.losses.nll_loss(
                predictions,
                targets,
                label_smoothing=self.hparams.label_smoothing,
            )
        scores = score_batch(
            batch.id, predictions.squeeze(1), targets.squeeze(1)
        )
        self.scores |= scores
        # An unlabelled utterance's loss says nothing.
        loss = summarize(scores)["loss"]
        return torch.tensor(0.0 if loss is None else loss)

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
        self.scores = {}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs; after validation, saves a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        self.scores = gather_scores(self.scores)
        self.result = summarize(self.scores)
        if stage == sb.Stage.TEST:
            return
        loggers = [self.hparams.train_logger]
        if self.hparams.use_tensorboard and if_main_process():
            loggers.append(self.hparams.tensorboard_logger())
        for train_logger in loggers:
            train_logger.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
                {"loss": self.train_loss},
                self.result,
            )
        self.save_epoch(
            {"epoch": epoch, **self.result},
            max_key="accuracy",
            num_to_keep=self.hparams.average_checkpoints,
        )

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Scores with the weights at hand, not those of a checkpoint."""


def run_identity(hparams, corpus):
    """What a run may not change when it goes on."""
    alone = not torch.distributed.is_initialized()
    keys = ("seed", "split", "valid_fraction", "batch_size", "segment_frames")
    keys += ("sampler", "bucket_batches")
    return {
        "data": corpus.digest(),
        "processes": 1 if alone else torch.distributed.get_world_size(),
        "parameters": sum(
            parameter.numel()
            for module in hparams["modules"].values()
            for parameter in module.parameters()
        ),
        **{key: hparams[key] for key in keys},
    }


def make_brain(hparams, run_opts, corpus, pack, identity):
    """A Brain and its loaders, ready to fit or to evaluate."""
    modules = hparams["modules"]
    run_state = RunState(identity)
    hparams["checkpointer"].add_recoverable("run_state", run_state)
    brain = SpeakerBrain(
        modules=modules,
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.run_state = run_state
    encoder = label_encoder(corpus.speakers)
    if if_main_process():
        save_atomically(
            "\n".join(corpus.speakers),
            Path(hparams["output_folder"]) / "speakers.txt",
        )
    folder = Path(hparams["manifest_folder"])
    manifests = {
        name: load_data_json(folder / f"{name}.json")
        for name in ("train", "valid", "test")
        if name != "test" or corpus.test
    }
    if hparams["pack_on_device"]:
        pack.to(brain.device)
    datasets = make_datasets(hparams, manifests, pack, encoder)
    loaders = make_loaders(hparams, datasets)
    brain.train_sampler = loaders["train"].batch_sampler  # told the epoch
    brain.checkpointer.add_recoverable("dataloader-TRAIN", loaders["train"])
    return brain, loaders


def choose_weights(brain, valid_loader):
    """The averaged or the single best checkpoint: validation decides."""
    best = None
    for count in sorted({1, brain.hparams.average_checkpoints}):
        brain.checkpointer.load_average(count, "accuracy", WEIGHTS)
        brain.evaluate(valid_loader)
        accuracy = brain.result["accuracy"]
        if best is None or accuracy >= best[1]["valid"]["accuracy"]:
            best = count, {"valid": brain.result}
    brain.checkpointer.load_average(best[0], "accuracy", WEIGHTS)
    return best


def main(arguments: list[str]) -> None:
    """Prepares, trains, tests, and says where the results are."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    if "distributed_backend" not in run_opts.overridden_args and (
        not torch.cuda.is_available()
    ):
        run_opts = replace(run_opts, distributed_backend="gloo")
    ddp_init_group(run_opts)
    # Every process reads the data; the first one writes what is missing.
    if not if_main_process():
        torch.distributed.barrier()
    corpus, pack, overrides = prepare.resolve_data(hparams_file, overrides)
    if if_main_process() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    hparams = load_hparams(hparams_file, overrides)
    output = Path(hparams["output_folder"])
    identity = run_identity(hparams, corpus)
    if (output / "run.json").exists():
        # Before anything of the earlier run is overwritten.
        begun = prepare.read_json(output / "run.json")
        check_identity(output / "run.json", begun, identity)
    sb.create_experiment_directory(
        experiment_directory=str(output),
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    sys.excepthook = sys.__excepthook__
    if if_main_process():
        save_atomically(json.dumps(identity, indent=1), output / "run.json")
    sb.utils.distributed.run_on_main(
        prepare.write_manifests,
        [corpus, hparams["manifest_folder"]],
        {key: hparams[key] for key in ("split", "valid_fraction", "seed")},
    )
    brain, loaders = make_brain(hparams, run_opts, corpus, pack, identity)
    if if_main_process():
        print(
            f"{len(corpus.speakers)} speakers, "
            f"{len(loaders['train'].dataset)} training, "
            f"{len(loaders['valid'].dataset)} validation and "
            f"{len(corpus.test)} test utterances from "
            f"{corpus.folder}\nResults go to {output}",
            flush=True,
        )
    if brain.distributed_launch:
        # Else all ranks would drop the same units.
        torch.manual_seed(hparams["seed"] + torch.distributed.get_rank())
    brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])
    if brain.test_only:
        brain.checkpointer.recover_if_possible()  # its epochs and seconds
    averaged, results = choose_weights(brain, loaders["valid"])
    brain.scores, brain.result = {}, summarize({})
    if "test" in loaders:
        brain.evaluate(loaders["test"])
    results["test"] = brain.result
    if brain.debug:
        print("The debug run has passed; it leaves no results.")
    if brain.debug or not if_main_process():
        return
    (output / "model").mkdir(exist_ok=True)
    for name in WEIGHTS:
        weights = hparams[name].state_dict()
        torch.save(weights, output / "model" / f"{name}.ckpt")
    results |= {
        "system": Path(hparams_file).stem,
        "data_folder": str(corpus.folder),
        "split": hparams["split"],
        "seed": hparams["seed"],
        "speakers": len(corpus.speakers),
        "parameters": brain.run_state.identity["parameters"],
        "epochs": hparams["epoch_counter"].current,
        "averaged_checkpoints": averaged,
        "skipped_steps": brain.skipped_steps,
        "seconds": round(brain.run_state.seconds, 1),
    }
    prepare.write_submission(corpus, brain.scores, output / "submission.csv")
    save_atomically(json.dumps(results, indent=1), output / "results.json")
    test = results["test"]["accuracy"]
    print(
        f"Validation accuracy {results['valid']['accuracy']:.4f}, test "
        f"accuracy {'unknown' if test is None else f'{test:.4f}'}\n"
        f"{output / 'results.json'}: these figures\n"
        f"{output / 'submission.csv'}: a row for each test utterance\n"
        f"{output / 'model'}: the weights\n"
        f"{hparams['train_log']}: each epoch"
    )


if __name__ == "__main__":
    run_command(main)
