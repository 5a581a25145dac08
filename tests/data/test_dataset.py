"""Datasets and loaders: the same items whoever reads them."""

import errno
import multiprocessing
import os
import pickle
import signal
import sys
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from corpus import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.epoch_loop import EpochCounter

from ml2022hw4_prepare import prepare
from spkid.data import (
    FeatureDataset,
    eval_loader,
    label_encoder,
    manifest,
    open_features,
    train_loader,
)
from spkid.data import dataset as dataset_module
from spkid.errors import UserError, run_command

TRAIN = {"batch_size": 5, "seed": 1}
EVAL = {"max_frames": 100}


@pytest.fixture
def made(tmp_path):
    """A corpus, its features, and datasets of both kinds."""
    corpus, features = prepare(
        make_corpus(tmp_path / "data"), pack_folder=tmp_path / "packs"
    )
    counter = EpochCounter(9)

    def datasets(features, segment_frames=16, n_train=None):
        encoder = label_encoder(corpus.speakers)
        return {
            "train": FeatureDataset(
                manifest(corpus.labelled[:n_train]),
                features,
                encoder,
                segment_frames=segment_frames,
                seed=1,
                epoch_counter=counter,
            ),
            "test": FeatureDataset(manifest(corpus.test), features, encoder),
        }

    return SimpleNamespace(
        corpus=corpus, features=features, counter=counter, datasets=datasets
    )


def test_crops_are_of_the_file_and_change_with_the_epoch(made):
    dataset, epochs = made.datasets(made.features)["train"], []
    for _ in range(2):
        next(made.counter)
        epochs.append([item["feats"] for item in dataset])
        for item, utterance in zip(dataset, made.corpus.labelled, strict=True):
            mel = torch.load(made.corpus.folder / item["id"])
            windows = mel.unfold(0, 16, 1).transpose(1, 2)
            gaps = (windows - item["feats"]).abs().amax(dim=(1, 2))
            assert gaps.min() < 0.01  # the pack's half precision
            index = made.corpus.speakers.index(utterance.speaker)
            assert item["target"].item() == index
            assert torch.allclose(item["statistics"][0], mel.mean(0), atol=1e-4)
    moved = [not torch.equal(a, b) for a, b in zip(*epochs, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_crops_need_an_epoch_counter(made):
    encoder = label_encoder(made.corpus.speakers)
    entries = manifest(made.corpus.labelled)
    with pytest.raises(ValueError, match="epoch_counter"):
        FeatureDataset(entries, made.features, encoder, segment_frames=16)


def test_whole_utterances_come_whole_and_once(made):
    seen = {}
    for batch in eval_loader(made.datasets(made.features)["test"], **EVAL):
        features, lengths = batch.feats
        for row, name in enumerate(batch.id):
            count = round(lengths[row].item() * features.shape[1])
            seen[name] = features[row, :count]
            assert (features[row, count:] == 0).all()
    assert seen.keys() == {u.path for u in made.corpus.test}
    for name, features in seen.items():
        mel = torch.load(made.corpus.folder / name)
        assert features.shape == mel.shape
        assert (features - mel).abs().max() < 0.01


def test_batches_of_equal_length_are_not_padded(made):
    dataset = made.datasets(made.features)["test"]
    for batch in eval_loader(dataset, max_frames=10_000, equal_length=True):
        assert (batch.feats.lengths == 1).all()


def test_a_spawned_worker_can_be_sent_the_dataset(made):
    next(made.counter)
    for dataset in made.datasets(made.features).values():
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[3]["feats"], dataset[3]["feats"])


def test_an_unknown_speaker_is_minus_one(made):
    dataset = made.datasets(made.features)["test"]
    dataset.data[dataset.data_ids[0]]["spk_id"] = None
    assert dataset[0]["target"].item() == -1


def same(a, b):
    """Every bit of two batches."""
    assert a.id == b.id
    assert len(a) == len(b)
    for key in ("feats", "statistics", "target"):
        for x, y in zip(a[key], b[key], strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


STORES = {
    "float16": {},
    "float32": {"pack_dtype": "float32"},
    "files": {"pack": False},
}


@pytest.mark.parametrize("store", [*STORES, "device"])
def test_a_batch_has_the_bits_of_its_items(made, tmp_path, store):
    features, _ = open_features(
        made.corpus, tmp_path / store, **STORES.get(store, {})
    )
    if store == "device":  # a copy in memory, as on a GPU
        features.to("cpu")
        assert features.tensor.data_ptr() != features.data.ctypes.data

    @settings(max_examples=30, deadline=None)
    @given(
        name=st.sampled_from(["train", "test"]),
        numbers=st.lists(st.integers(0, 5), min_size=1, max_size=8),
        segment=st.integers(1, 70),  # utterances have 20 to 59 frames
        epoch=st.integers(0, 5),
    )
    def check(name, numbers, segment, epoch):
        made.counter.current = epoch
        dataset = made.datasets(features, segment)[name]
        batch = dataset.__getitems__(numbers)
        same(batch, PaddedBatch([dataset[i] for i in numbers]))
        assert batch.to("cpu") is batch

    check()


def test_loaders_give_the_same_bits_by_every_path(made, tmp_path):
    next(made.counter)

    def batches(features, num_workers=0):
        sets = made.datasets(features, 40)
        train = train_loader(sets["train"], **TRAIN, num_workers=num_workers)
        test = eval_loader(sets["test"], **EVAL, num_workers=num_workers)
        return list(train), list(test)

    expected = batches(made.features)
    files, _ = open_features(made.corpus, pack=False)
    full, _ = open_features(made.corpus, tmp_path, pack_dtype="float32")
    on_device, _ = open_features(made.corpus, tmp_path / "packs")
    on_device.to("cpu")
    for one, other in (
        (expected, batches(made.features, 2)),
        (batches(files), batches(files, 1)),
        (expected, batches(on_device, 2)),
    ):
        for x, y in zip(chain(*one), chain(*other), strict=True):
            same(x, y)
    # The files and a pack of their full precision give the same.
    for x, y in zip(batches(files)[0], batches(full)[0], strict=True):
        assert x.id == y.id
        assert torch.equal(x.feats.data, y.feats.data)
        gap = (x.statistics.data - y.statistics.data).abs().max()
        assert gap < 1e-5


def test_no_worker_reads_from_a_devices_memory(made):
    made.features.to("cpu")
    sets = made.datasets(made.features)
    loader = train_loader(sets["train"], **TRAIN, num_workers=2)
    assert loader.num_workers == 0
    assert eval_loader(sets["test"], **EVAL, num_workers=2).num_workers == 0


def test_balanced_training_sees_each_speaker_equally_often(made):
    # The last speaker has two utterances left.
    dataset = made.datasets(made.features, n_train=-6)["train"]
    for _ in range(3):
        next(made.counter)
        loader = train_loader(
            dataset, **TRAIN, sampler="balanced", bucket_batches=2
        )
        loader.batch_sampler.set_epoch(made.counter.current)
        targets = torch.cat([batch.target.data for batch in loader])
        counts = np.bincount(targets.flatten())
        assert counts.sum() == len(dataset)
        assert counts.max() - counts.min() <= 1


def test_an_unknown_sampler_is_refused(made):
    dataset = made.datasets(made.features)["train"]
    with pytest.raises(UserError, match="'fair' must be all or balanced"):
        train_loader(dataset, **TRAIN, sampler="fair")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_read_in_training_costs_one_sentence(made, workers):
    files, _ = open_features(made.corpus, pack=False)
    path = made.corpus.folder / "uttr-1-1.pt"
    path.write_bytes(b"PK\x03\x04rubbish")
    dataset = made.datasets(files)["train"]
    loader = train_loader(dataset, **TRAIN, num_workers=workers)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda arguments: list(loader))
    said = str(ended.value.code)
    assert said.startswith(f"Error: {path}: not a readable feature file (")
    assert "\n" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="forking is for Linux")
def test_a_process_ends_though_its_workers_wait_for_work(made):
    left = []

    def main():
        dataset = made.datasets(made.features)["train"]
        batches = iter(train_loader(dataset, **TRAIN, num_workers=2))
        left.append((batches, next(batches)))  # an error's traceback does so

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 0


def test_only_a_pack_can_lie_on_a_device(made):
    files, _ = open_features(made.corpus, pack=False)
    with pytest.raises(UserError, match="give --pack True"):
        files.to("cpu")


def test_a_batch_comes_through_a_pipe_with_all_its_bits(made):
    next(made.counter)
    batch = made.datasets(made.features)["train"].__getitems__([3, 1])
    sent = ForkingPickler.dumps(batch)
    assert batch.feats.data.numpy().tobytes() in bytes(sent)  # not a handle
    again = pickle.loads(sent)
    same(again, batch)
    assert next(iter(again)) == batch.id  # all that a PaddedBatch does
    assert again.to(torch.float64).feats.data.dtype == torch.float64


needs_fork = pytest.mark.skipif(
    sys.platform != "linux", reason="forking is for Linux"
)


@needs_fork
def test_a_batch_that_cannot_be_sent_ends_the_loader(made, monkeypatch):
    def fail(batch):
        raise MemoryError

    next(made.counter)
    monkeypatch.setattr(dataset_module._Batch, "__reduce__", fail)
    loader = train_loader(
        made.datasets(made.features)["train"], **TRAIN, num_workers=1
    )
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        next(iter(loader))


@needs_fork
@pytest.mark.parametrize("place", ["no files", "no memory"])
def test_workers_that_cannot_start_are_one_sentence(made, monkeypatch, place):
    import resource

    sets = made.datasets(made.features)
    loader = eval_loader(sets["test"], **EVAL, num_workers=2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if place == "no files":
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    else:
        error = OSError(errno.ENOMEM, "Cannot allocate memory")
        monkeypatch.setattr(os, "fork", mock.Mock(side_effect=error))
    try:
        with pytest.raises(UserError, match="give --num_workers 0"):
            iter(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    loader = eval_loader(sets["test"], **EVAL, num_workers=0)
    assert len(list(loader)) == len(loader)


@needs_fork
def test_workers_leave_signals_to_the_main_process(made):
    next(made.counter)
    loader = train_loader(
        made.datasets(made.features)["train"], **TRAIN, num_workers=1
    )
    batches = iter(loader)
    read = [next(batches)]
    (worker,) = multiprocessing.active_children()
    for name in ("SIGHUP", "SIGINT", "SIGUSR1"):
        os.kill(worker.pid, getattr(signal, name))
    read += list(batches)
    assert len(read) == len(loader)
