"""Manifests and a pack become SpeechBrain datasets and loaders."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader, make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder

from spkid.data.batches import LengthBatches, ShuffledBatches, crop_starts, utterance_key
from spkid.errors import UserError
from spkid.models.masks import relative_lengths
from spkid.data.feature_file import FeatureFiles
from spkid.data.pack import PackedFeatures

SAMPLERS = ("all", "balanced")


def label_encoder(speakers: Sequence[str]) -> CategoricalEncoder:
    """SpeechBrain's encoder with the classes in this very order.

    Arguments
    ---------
    speakers : sequence of str
        Names by class index.

    Returns
    -------
    speechbrain.dataio.encoder.CategoricalEncoder

    Example
    -------
    >>> label_encoder(["zoe", "adam"]).encode_label("zoe")
    0
    """
    encoder = CategoricalEncoder()
    for index, speaker in enumerate(speakers):
        encoder.enforce_label(speaker, index)
    encoder.expect_len(len(speakers))
    return encoder


class FeatureDataset(DynamicItemDataset):
    """SpeechBrain's dataset, which also gives whole batches at once.

    Each item has ``id``, ``feats`` [frames, n_mels] (raw log-mels),
    ``statistics`` [2, n_mels] (mean and deviation of the whole utterance) and
    ``target`` [1] (class index; -1 where the speaker is unknown). A DataLoader
    reads batches by ``__getitems__``, the same bits as padding the items.

    Arguments
    ---------
    hparams : dict
        Uses ``seed``, ``segment_frames`` and ``epoch_counter``.
    manifest : dict
        Utterance id to ``length`` and ``spk_id``.
    features : PackedFeatures or FeatureFiles
        The features.
    encoder : speechbrain.dataio.encoder.CategoricalEncoder
        The classes.
    crop : bool
        Items are random crops of the epoch, not whole utterances.
    """

    def __init__(
        self,
        hparams: dict,
        manifest: dict[str, dict],
        features: PackedFeatures | FeatureFiles,
        encoder: CategoricalEncoder,
        crop: bool,
    ) -> None:
        super().__init__(
            manifest,
            dynamic_items=[
                {
                    "func": self._read,
                    "takes": ["id", "length"],
                    "provides": ["feats", "statistics"],
                },
                {
                    "func": self._target,
                    "takes": "spk_id",
                    "provides": "target",
                },
            ],
            output_keys=["id", "feats", "statistics", "target"],
        )
        self.features, self.encoder, self.crop = features, encoder, crop
        self.counter, self.seed = hparams["epoch_counter"], hparams["seed"]
        self.segment = hparams["segment_frames"]
        names, entries = self.data_ids, manifest.values()
        self.rows = np.array([features.row[name] for name in names])
        self.lengths = np.array([entry["length"] for entry in entries])
        self.keys = np.array([utterance_key(name) for name in names])
        self.targets = torch.stack(
            [self._target(entry["spk_id"]) for entry in entries]
        )

    def _target(self, speaker):
        known = speaker is not None
        return torch.tensor(
            [self.encoder.encode_label(speaker) if known else -1]
        )

    def _parts(self, keys, lengths):
        """First frames and numbers of frames that this epoch draws [n]."""
        if not self.crop:
            return np.zeros_like(lengths), lengths
        epoch, segment = self.counter.current, self.segment
        starts = crop_starts(self.seed, epoch, keys, lengths, segment)
        return starts, np.minimum(lengths, segment)

    def _read(self, name, length):
        row = self.features.row[name]
        (start,), (count,) = self._parts(
            np.array([utterance_key(name)]), np.array([length])
        )
        frames = self.features.frames(row, int(start), int(count))
        yield torch.from_numpy(frames)
        yield self.features.statistics(row)

    def __getitems__(self, indices: list[int]) -> PaddedBatch:
        """A batch, read at once; what ``PaddedBatch`` makes of the items."""
        starts, counts = self._parts(self.keys[indices], self.lengths[indices])
        features, statistics = self.features.batch(
            self.rows[indices], starts, counts
        )
        whole = torch.ones(len(indices))
        lengths = relative_lengths(torch.from_numpy(counts), counts.max())
        padded = {
            "feats": (features, lengths),
            "statistics": (statistics, whole),
            "target": (self.targets[indices], whole.clone()),
        }
        # Padded already: each example carries the batch, and is the batch.
        return PaddedBatch(
            [{"id": self.data_ids[index], **padded} for index in indices],
            padded_keys=list(padded),
            device_prep_keys=list(padded),
            padding_func=lambda examples: examples[0],
            apply_default_convert=False,
        )


def make_datasets(
    hparams: dict,
    manifests: dict[str, dict],
    features: PackedFeatures | FeatureFiles,
    encoder: CategoricalEncoder,
) -> dict[str, FeatureDataset]:
    """Datasets of crops ("train") and of whole utterances (the others).

    Arguments
    ---------
    hparams : dict
        Uses ``seed``, ``segment_frames`` and ``epoch_counter``.
    manifests : dict
        For each set: utterance id to ``length`` and ``spk_id``.
    features : PackedFeatures or FeatureFiles
        The features.
    encoder : speechbrain.dataio.encoder.CategoricalEncoder
        The classes.

    Returns
    -------
    dict
        A :class:`FeatureDataset` for each manifest.
    """
    return {
        name: FeatureDataset(
            hparams, manifest, features, encoder, crop=name == "train"
        )
        for name, manifest in manifests.items()
    }


def _start_worker(_worker):
    """Signals to the whole process group are for the main process, which
    saves a checkpoint first; SIGTERM from that process ends a worker."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_word, daemon=True).start()


def _end_at_parents_word():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _as_it_is(batch):
    """The dataset has collated it."""
    return batch


def make_loaders(
    hparams: dict, datasets: dict[str, FeatureDataset]
) -> dict[str, SaveableDataLoader]:
    """Loaders: shuffled crops, and whole utterances in batches by length.

    In distributed training each rank's loaders give its own share.

    Arguments
    ---------
    hparams : dict
        Uses ``batch_size`` (over all ranks), ``seed``, ``num_workers``,
        ``pack_on_device``, ``sampler``, ``bucket_batches``,
        ``max_frames_per_batch`` and ``equal_length_batches``.
    datasets : dict
        From :func:`make_datasets`.

    Returns
    -------
    dict
        One for each dataset.

    Raises
    ------
    UserError
        If there is no such sampler.
    """
    if hparams["sampler"] not in SAMPLERS:
        raise UserError(
            f"sampler={hparams['sampler']!r} is none of {', '.join(SAMPLERS)}."
        )
    rank, n_ranks = 0, 1
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        n_ranks = torch.distributed.get_world_size()
    loaders = {}
    for name, dataset in datasets.items():
        if name == "train":
            labels = None
            if hparams["sampler"] == "balanced":
                targets = dataset.targets[:, 0].numpy()
                labels = np.unique(targets, return_inverse=True)[1]
            batches = ShuffledBatches(
                len(dataset),
                hparams["batch_size"],
                hparams["seed"],
                rank,
                n_ranks,
                labels,
                np.minimum(dataset.lengths, dataset.segment),
                hparams["bucket_batches"],
            )
        else:
            batches = LengthBatches(
                dataset.lengths,
                hparams["max_frames_per_batch"],
                hparams["equal_length_batches"],
                rank,
                n_ranks,
            )
        loaders[name] = make_dataloader(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            # A worker can't make batches in the device's memory.
            num_workers=(
                0 if hparams["pack_on_device"] else hparams["num_workers"]
            ),
            worker_init_fn=_start_worker,
            # Else starting an epoch would draw from the dropout's generator.
            generator=torch.Generator(),
        )
    return loaders
