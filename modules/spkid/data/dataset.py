"""Manifests and features become SpeechBrain datasets and loaders."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.queues import Queue

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils.data import Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from spkid.data.batches import (
    LengthBatches,
    ShuffledBatches,
    crop_starts,
    utterance_key,
)
from spkid.data.feature_file import FeatureFiles
from spkid.data.pack import PackedFeatures
from spkid.distributed import rank, world_size
from spkid.errors import UserError, one_of
from spkid.models.masks import relative_lengths

SAMPLERS = ("all", "balanced")


def label_encoder(
    speakers: Sequence[str], encoder: CategoricalEncoder | None = None
) -> CategoricalEncoder:
    """SpeechBrain's encoder with the classes in the order of ``speakers``.

    ``encoder`` is an empty one to fill, such as a YAML file's.

    Example
    -------
    >>> label_encoder(["zoe", "adam"]).encode_label("zoe")
    0
    """
    encoder = CategoricalEncoder() if encoder is None else encoder
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
    manifest : dict
        Utterance id to ``length`` and ``spk_id``.
    features : PackedFeatures or FeatureFiles
        The features.
    encoder : speechbrain.dataio.encoder.CategoricalEncoder
        The classes.
    segment_frames : int, optional
        Items are random crops of at most this many frames, drawn from the
        seed, the epoch and the utterance's id. None: whole utterances.
    seed : int
        Of the crops.
    epoch_counter : speechbrain.utils.epoch_loop.EpochCounter, optional
        Says the epoch; crops need it.

    Example
    -------
    >>> from spkid.data import Utterance, manifest
    >>> folder, utterances = getfixture("tmp_path"), [Utterance("a.pt", 3)]
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> files = FeatureFiles(folder, utterances, n_mels=40)
    >>> dataset = FeatureDataset(manifest(utterances), files, label_encoder([]))
    >>> dataset[0]["feats"].shape, dataset[0]["target"]
    (torch.Size([3, 40]), tensor([-1]))
    """

    def __init__(
        self,
        manifest: dict[str, dict],
        features: PackedFeatures | FeatureFiles,
        encoder: CategoricalEncoder,
        *,
        segment_frames: int | None = None,
        seed: int = 0,
        epoch_counter: EpochCounter | None = None,
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
        if segment_frames is not None and epoch_counter is None:
            raise ValueError("Crops need an epoch_counter.")
        self.features, self.encoder = features, encoder
        self.segment, self.seed = segment_frames, seed
        self.counter = epoch_counter
        names, entries = self.data_ids, manifest.values()
        self.rows = np.array([features.row[name] for name in names])
        self.lengths = np.array([entry["length"] for entry in entries])
        self.keys = np.array([utterance_key(name) for name in names])
        self.targets = torch.stack(
            [self._target(entry["spk_id"]) for entry in entries]
        )

    def _target(self, speaker: str | None) -> torch.Tensor:
        known = speaker is not None
        return torch.tensor(
            [self.encoder.encode_label(speaker) if known else -1]
        )

    def _parts(
        self, keys: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """First frames and numbers of frames that this epoch draws [n]."""
        if self.counter is None or self.segment is None:
            return np.zeros_like(lengths), lengths
        epoch = self.counter.current
        starts = crop_starts(self.seed, epoch, keys, lengths, self.segment)
        return starts, np.minimum(lengths, self.segment)

    def _read(self, name: str, length: int) -> Iterator[torch.Tensor]:
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
        return _Batch([self.data_ids[index] for index in indices], padded)


class _Batch(PaddedBatch):
    """A batch that a worker sends through a pipe.

    torch would share its tensors through /dev/shm, which is small in
    containers; where it is full, the main process would wait for ever.
    """

    def __init__(
        self, ids: list[str], padded: Mapping[str, tuple[torch.Tensor, ...]]
    ) -> None:
        # Already padded: every example holds the whole batch.
        super().__init__(
            [{"id": name, **padded} for name in ids],
            padded_keys=list(padded),
            device_prep_keys=list(padded),
            padding_func=lambda examples: examples[0],
            apply_default_convert=False,
        )

    def __reduce__(self) -> tuple:
        keys = ("feats", "statistics", "target")
        arrays = {key: [part.numpy() for part in self[key]] for key in keys}
        return _unpack, (self.id, arrays)


def _unpack(ids: list[str], arrays: dict[str, list[np.ndarray]]) -> _Batch:
    """A batch from a pipe; copied, since torch aligns its memory."""
    tensors = {key: tuple(map(torch.tensor, arrays[key])) for key in arrays}
    return _Batch(ids, tensors)


def _start_worker(_worker: int) -> None:
    """Signals to the whole process group are for the main process, which
    saves a checkpoint first; SIGTERM from that process ends a worker."""
    # A batch that can't be sent would only be printed: the worker ends, and
    # the main process learns of it.
    end = staticmethod(lambda *_: os._exit(1))
    setattr(Queue, "_on_queue_feeder_error", end)  # noqa: B010
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_word, daemon=True).start()


def _end_at_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _Loader(SaveableDataLoader):
    """SpeechBrain's loader of a dataset's batches."""

    def __init__(
        self, dataset: FeatureDataset, batches: Sampler, num_workers: int
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            # A worker can't make batches in the device's memory.
            num_workers=0 if dataset.features.on_device else num_workers,
            worker_init_fn=_start_worker,
            # Else starting an epoch would draw from the dropout's generator.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[PaddedBatch]:
        """Starts an epoch's workers, if any."""
        try:
            return super().__iter__()
        except (OSError, RuntimeError) as error:  # /dev/shm, memory, files
            if not self.num_workers:
                raise
            # Or torch's iterator, half made, would complain of itself, too.
            _MultiProcessingDataLoaderIter._shutdown = True
            raise UserError(
                f"The {self.num_workers} processes that read the features "
                f"can't be started ({error}); give --num_workers 0."
            ) from None


def _as_it_is(batch: PaddedBatch) -> PaddedBatch:
    """The dataset has collated it."""
    return batch


def train_loader(
    dataset: FeatureDataset,
    *,
    batch_size: int,
    seed: int,
    sampler: str = "all",
    bucket_batches: int = 1,
    num_workers: int = 0,
) -> SaveableDataLoader:
    """Shuffled batches; in distributed training, this process's part of each.

    Arguments
    ---------
    dataset : FeatureDataset
        The training utterances.
    batch_size : int
        Utterances of a batch, over all processes.
    seed : int
        Of the order.
    sampler : str
        "all": each utterance once an epoch; "balanced": each speaker equally
        often.
    bucket_batches : int
        As for :class:`ShuffledBatches`.
    num_workers : int
        Processes that read; none if the features lie in a device's memory.

    Returns
    -------
    speechbrain.dataio.dataloader.SaveableDataLoader
        Its ``batch_sampler.set_epoch`` chooses the epoch.

    Example
    -------
    >>> from spkid.data import Utterance, manifest
    >>> folder, utterances = getfixture("tmp_path"), [Utterance("a.pt", 3)]
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> files = FeatureFiles(folder, utterances, n_mels=40)
    >>> dataset = FeatureDataset(manifest(utterances), files, label_encoder([]))
    >>> loader = train_loader(dataset, batch_size=2, seed=0)
    >>> next(iter(loader)).feats.data.shape  # a lone utterance comes twice
    torch.Size([2, 3, 40])
    """
    one_of(sampler, SAMPLERS, "sampler")
    labels = None
    if sampler == "balanced":
        targets = dataset.targets[:, 0].numpy()
        labels = np.unique(targets, return_inverse=True)[1]
    batches = ShuffledBatches(
        len(dataset),
        batch_size,
        seed,
        rank(),
        world_size(),
        labels,
        np.minimum(dataset.lengths, dataset.segment or dataset.lengths),
        bucket_batches,
    )
    return _Loader(dataset, batches, num_workers)


def eval_loader(
    dataset: FeatureDataset,
    *,
    max_frames: int,
    equal_length: bool = False,
    num_workers: int = 0,
) -> SaveableDataLoader:
    """Batches by length, dealt out to the processes of distributed training.

    Arguments
    ---------
    dataset : FeatureDataset
        The utterances to score.
    max_frames : int
        Padded frames of a batch; a longer utterance is a batch of its own.
    equal_length : bool
        Whether only utterances of the same length share a batch.
    num_workers : int
        As for :func:`train_loader`.

    Example
    -------
    >>> from spkid.data import Utterance, manifest
    >>> folder, utterances = getfixture("tmp_path"), [Utterance("a.pt", 3)]
    >>> torch.save(torch.ones(3, 40), folder / "a.pt")
    >>> files = FeatureFiles(folder, utterances, n_mels=40)
    >>> dataset = FeatureDataset(manifest(utterances), files, label_encoder([]))
    >>> next(iter(eval_loader(dataset, max_frames=100))).feats.data.shape
    torch.Size([1, 3, 40])
    """
    batches = LengthBatches(
        dataset.lengths, max_frames, equal_length, rank(), world_size()
    )
    return _Loader(dataset, batches, num_workers)
