"""Manifests and a pack become SpeechBrain datasets and loaders."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import torch
from speechbrain.dataio.dataloader import SaveableDataLoader, make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder

from spkid.batching import (
    LengthBatches,
    ShuffledBatches,
    crop_starts,
    utterance_key,
)
from spkid.packed import PackedFeatures


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


def make_datasets(
    hparams: dict,
    manifests: dict[str, dict],
    pack: PackedFeatures,
    encoder: CategoricalEncoder,
) -> dict[str, DynamicItemDataset]:
    """Datasets of crops ("train") and of whole utterances (the others).

    Each item has ``id``, ``feats`` [frames, n_mels] (raw log-mels),
    ``statistics`` [2, n_mels] (mean and deviation of the whole utterance) and
    ``target`` [1] (class index; -1 where the speaker is unknown).

    Arguments
    ---------
    hparams : dict
        Uses ``seed``, ``segment_frames`` and ``epoch_counter``.
    manifests : dict
        For each set: utterance id to ``length`` and ``spk_id``.
    pack : PackedFeatures
        The features.
    encoder : speechbrain.dataio.encoder.CategoricalEncoder
        The classes.

    Returns
    -------
    dict
        One for each manifest.
    """
    reader = _Reader(hparams, pack, encoder)
    target = {"func": reader.target, "takes": "spk_id", "provides": "target"}
    features = {"provides": ["feats", "statistics"]}
    whole = {"func": reader.whole, "takes": "id", **features}
    crop = {"func": reader.crop, "takes": ["id", "length"], **features}
    return {
        name: DynamicItemDataset(
            manifest,
            dynamic_items=[crop if name == "train" else whole, target],
            output_keys=["id", "feats", "statistics", "target"],
        )
        for name, manifest in manifests.items()
    }


class _Reader:
    """The dynamic items; a class, so that spawned workers can be sent it."""

    def __init__(self, hparams, pack, encoder):
        self.pack, self.encoder = pack, encoder
        self.counter, self.seed = hparams["epoch_counter"], hparams["seed"]
        self.segment = hparams["segment_frames"]

    def whole(self, name):
        row = self.pack.row[name]
        yield torch.from_numpy(self.pack.frames(row))
        yield self.pack.statistics(row)

    def crop(self, name, length):
        row = self.pack.row[name]
        (start,) = crop_starts(
            self.seed,
            self.counter.current,
            [utterance_key(name)],
            [length],
            self.segment,
        )
        frames = self.pack.frames(row, int(start), self.segment)
        yield torch.from_numpy(frames)
        yield self.pack.statistics(row)

    def target(self, speaker):
        known = speaker is not None
        return torch.tensor(
            [self.encoder.encode_label(speaker) if known else -1]
        )


def _ignore_signals(_worker):
    """Signals to the whole process group are for the main process, which
    saves a checkpoint first; workers end with it."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def make_loaders(
    hparams: dict, datasets: dict[str, DynamicItemDataset]
) -> dict[str, SaveableDataLoader]:
    """Loaders: shuffled crops, and whole utterances in batches by length.

    In distributed training each rank's loaders give its own share.

    Arguments
    ---------
    hparams : dict
        Uses ``batch_size`` (over all ranks), ``seed``, ``num_workers``,
        ``max_frames_per_batch`` and ``equal_length_batches``.
    datasets : dict
        From :func:`make_datasets`.

    Returns
    -------
    dict
        One for each dataset.
    """
    rank, n_ranks = 0, 1
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        n_ranks = torch.distributed.get_world_size()
    loaders = {}
    for name, dataset in datasets.items():
        if name == "train":
            batches = ShuffledBatches(
                len(dataset),
                hparams["batch_size"],
                hparams["seed"],
                rank,
                n_ranks,
            )
        else:
            batches = LengthBatches(
                [dataset.data[key]["length"] for key in dataset.data_ids],
                hparams["max_frames_per_batch"],
                hparams["equal_length_batches"],
                rank,
                n_ranks,
            )
        loaders[name] = make_dataloader(
            dataset,
            batch_sampler=batches,
            num_workers=hparams["num_workers"],
            worker_init_fn=_ignore_signals,
            # Else starting an epoch would draw from the dropout's generator.
            generator=torch.Generator(),
        )
    return loaders
