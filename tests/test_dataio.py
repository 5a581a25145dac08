"""Datasets and loaders: the same items whoever reads them."""

import pickle

import pytest
import torch
from corpus import make_corpus
from speechbrain.utils.epoch_loop import EpochCounter

import prepare
from spkid.dataio import label_encoder, make_datasets, make_loaders
from validate import manifest, read_corpus


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
