"""The Brain of this recipe: features to embeddings to speakers."""

from __future__ import annotations

from typing import ClassVar

import speechbrain as sb
import torch

from spkid.evaluation.embedder import UtteranceEmbedder
from spkid.evaluation.scores import (
    gather_scores,
    score_batch,
    summarize,
    summarize_parts,
)
from spkid.models.masks import absolute_lengths
from spkid.training.brain import RobustBrain


class SpeakerBrain(RobustBrain):
    """Trains ``embedding_model`` and ``classifier``; scores utterances."""

    parts: ClassVar = {}  # of the validation: is an utterance's session known

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
            self.embeddings = self.embedder(features, lengths)
            return self.hparams.classifier(self.embeddings)
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
            batch.id,
            predictions.squeeze(1),
            targets.squeeze(1),
            self.embeddings.squeeze(1),
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
        if stage == sb.Stage.TEST:
            return
        self.result = summarize_parts(self.scores, self.parts)
        # Before the checkpoint: an epoch that is repeated is logged again,
        # which replaces its line.
        for train_logger in self.hparams.loggers:
            train_logger.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
                {"loss": self.train_loss},
                given(self.result),
            )
        self.save_epoch(
            {"epoch": epoch, **given(self.result)},
            max_key="accuracy" if self.parts else "epoch",
            num_to_keep=self.hparams.average_checkpoints,
        )

    def _fit_valid(self, valid_set, epoch, enable):
        """As SpeechBrain's; an epoch without validation is saved, too."""
        super()._fit_valid(valid_set, epoch, enable)
        if valid_set is None:
            self.on_stage_start(sb.Stage.VALID, epoch)
            self.on_stage_end(sb.Stage.VALID, None, epoch)

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Scores with the weights at hand, not those of a checkpoint."""


def given(figures):
    """The figures that there are."""
    return {key: value for key, value in figures.items() if value is not None}
