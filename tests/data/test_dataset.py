"""Datasets and loaders: the same items whoever reads them."""

import multiprocessing
import pickle
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from corpus import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.epoch_loop import EpochCounter

import prepare
from spkid.data.dataset import label_encoder, make_datasets, make_loaders
from spkid.errors import UserError, run_command
from spkid.data.corpus import manifest
from ml2022hw4_prepare import read_corpus


@pytest.fixture
def made(tmp_path):
    corpus = read_corpus(make_corpus(tmp_path / "data"))
    pack = prepare.pack_corpus(corpus, tmp_path / "packs")
    hparams = {
        "seed": 1,
        "segment_frames": 16,
        "epoch_counter": EpochCounter(9),
        "batch_size": 5,
        "max_frames_per_batch": 100,
        "equal_length_batches": False,
        "num_workers": 0,
        "pack_on_device": False,
        "sampler": "all",
        "bucket_batches": 1,
    }
    manifests = {
        "train": manifest(corpus.labelled),
        "test": manifest(corpus.test),
    }
    encoder = label_encoder(corpus.speakers)
    datasets = make_datasets(hparams, manifests, pack, encoder)
    return corpus, pack, hparams, datasets


def test_crops_are_of_the_file_and_change_with_the_epoch(made):
    corpus, _, hparams, datasets = made
    epochs = []
    for _ in range(2):
        next(hparams["epoch_counter"])
        epochs.append([item["feats"] for item in datasets["train"]])
        for item, utterance in zip(
            datasets["train"], corpus.labelled, strict=True
        ):
            mel = torch.load(corpus.folder / item["id"])
            windows = mel.unfold(0, 16, 1).transpose(1, 2)
            gaps = (windows - item["feats"]).abs().amax(dim=(1, 2))
            assert gaps.min() < 0.01  # the pack's half precision
            index = corpus.speakers.index(utterance.speaker)
            assert item["target"].item() == index
            assert torch.allclose(item["statistics"][0], mel.mean(0), atol=1e-4)
    moved = [not torch.equal(a, b) for a, b in zip(*epochs, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_whole_utterances_come_whole_and_once(made):
    corpus, _, hparams, datasets = made
    seen = {}
    for batch in make_loaders(hparams, datasets)["test"]:
        features, lengths = batch.feats
        for row, name in enumerate(batch.id):
            count = round(lengths[row].item() * features.shape[1])
            seen[name] = features[row, :count]
            assert (features[row, count:] == 0).all()
    assert seen.keys() == {u.path for u in corpus.test}
    for name, features in seen.items():
        mel = torch.load(corpus.folder / name)
        assert features.shape == mel.shape
        assert (features - mel).abs().max() < 0.01


def test_a_spawned_worker_can_be_sent_the_dataset(made):
    *_, hparams, datasets = made
    next(hparams["epoch_counter"])
    for dataset in datasets.values():
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[3]["feats"], dataset[3]["feats"])


def test_an_unknown_speaker_is_minus_one(tmp_path, made):
    *_, datasets = made
    datasets["test"].data[datasets["test"].data_ids[0]]["spk_id"] = None
    assert datasets["test"][0]["target"].item() == -1


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
    corpus, _, hparams, datasets = made
    features = prepare.pack_corpus(
        corpus, tmp_path / store, **STORES.get(store, {})
    )
    if store == "device":  # a copy in memory, as on a GPU
        features.to("cpu")
        assert features.tensor.data_ptr() != features.data.ctypes.data
    manifests = {name: d.data for name, d in datasets.items()}
    encoder = label_encoder(corpus.speakers)

    @settings(max_examples=30, deadline=None)
    @given(
        name=st.sampled_from(["train", "test"]),
        numbers=st.lists(st.integers(0, 5), min_size=1, max_size=8),
        segment=st.integers(1, 70),  # utterances have 20 to 59 frames
        epoch=st.integers(0, 5),
    )
    def check(name, numbers, segment, epoch):
        hparams["segment_frames"] = segment
        hparams["epoch_counter"].current = epoch
        dataset = make_datasets(hparams, manifests, features, encoder)[name]
        batch = dataset.__getitems__(numbers)
        same(batch, PaddedBatch([dataset[i] for i in numbers]))
        assert batch.to("cpu") is batch

    check()


def test_the_loaders_bits_are_the_same_by_every_path(made, tmp_path):
    corpus, pack, hparams, datasets = made
    hparams["segment_frames"] = 40
    next(hparams["epoch_counter"])

    def batches(features, **more):
        manifests = {name: d.data for name, d in datasets.items()}
        encoder = label_encoder(corpus.speakers)
        sets = make_datasets(hparams, manifests, features, encoder)
        loaders = make_loaders({**hparams, **more}, sets)
        return [list(loaders[name]) for name in ("train", "test")]

    expected = batches(pack)
    files = prepare.pack_corpus(corpus, pack=False)
    full = prepare.pack_corpus(corpus, tmp_path / "f", pack_dtype="float32")
    pairs = [
        (expected, batches(pack, num_workers=2)),
        (batches(files), batches(files, num_workers=1)),
    ]
    on_device = prepare.pack_corpus(corpus, tmp_path / "packs")
    on_device.to("cpu")
    more = {"pack_on_device": True, "num_workers": 2}
    pairs.append((expected, batches(on_device, **more)))
    for one, other in pairs:
        for x, y in zip(chain(*one), chain(*other), strict=True):
            same(x, y)
    # The files and a pack of their full precision say the same.
    for x, y in zip(batches(files)[0], batches(full)[0], strict=True):
        assert x.id == y.id
        assert torch.equal(x.feats.data, y.feats.data)
        gap = (x.statistics.data - y.statistics.data).abs().max()
        assert gap < 1e-5


def test_balanced_training_sees_each_speaker_equally_often(made):
    corpus, pack, hparams, datasets = made
    manifest = datasets["train"].data
    some = dict(list(manifest.items())[:-6])  # the last speaker has two left
    hparams |= {"sampler": "balanced", "bucket_batches": 2}
    encoder = label_encoder(corpus.speakers)
    sets = make_datasets(hparams, {"train": some}, pack, encoder)
    for _ in range(3):
        next(hparams["epoch_counter"])
        loader = make_loaders(hparams, sets)["train"]
        loader.batch_sampler.set_epoch(hparams["epoch_counter"].current)
        targets = torch.cat([batch.target.data for batch in loader])
        counts = np.bincount(targets.flatten())
        assert counts.sum() == len(some)
        assert counts.max() - counts.min() <= 1


def test_an_unknown_sampler_costs_one_sentence(made):
    *_, hparams, datasets = made
    with pytest.raises(UserError, match="'fair' is none of all, balanced"):
        make_loaders({**hparams, "sampler": "fair"}, datasets)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_read_in_training_costs_one_sentence(made, workers):
    corpus, _, hparams, datasets = made
    (corpus.folder / "uttr-1-1.pt").write_bytes(b"PK\x03\x04rubbish")
    files = prepare.pack_corpus(corpus, pack=False)
    manifests = {"train": datasets["train"].data}
    encoder = label_encoder(corpus.speakers)
    sets = make_datasets(hparams, manifests, files, encoder)
    loader = make_loaders({**hparams, "num_workers": workers}, sets)["train"]
    with pytest.raises(SystemExit) as ended:
        run_command(lambda arguments: list(loader))
    path = corpus.folder / "uttr-1-1.pt"
    said = str(ended.value.code)
    assert said.startswith(f"Error: {path}: not a readable feature file (")
    assert "\n" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="forking is for Linux")
def test_a_process_ends_though_its_workers_wait_for_work(made):
    *_, hparams, datasets = made
    left = []

    def main():
        batches = iter(
            make_loaders({**hparams, "num_workers": 2}, datasets)["train"]
        )
        left.append((batches, next(batches)))  # an error's traceback does so

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 0


def test_only_a_pack_can_lie_on_a_device(made):
    files = prepare.pack_corpus(made[0], pack=False)
    with pytest.raises(UserError, match="give --pack True"):
        files.to("cpu")
