"""A finished run's model, asked about other forms of its utterances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import prepare
from ml2022hw4_prepare import read_corpus, read_json
from predict import load_run
from spkid.data.batches import LengthBatches
from spkid.evaluation.embedder import mean_embeddings
from spkid.files import save_atomically
from spkid.models.masks import relative_lengths


class Run:
    """A finished run's model, and the utterances it was validated on."""

    def __init__(self, folder: Path, pack_folder: Path | None = None) -> None:
        self.hparams = load_run(folder)
        for module in self.hparams["modules"].values():
            module.eval()
        keys = ("data_folder", "on_bad_file", "max_bad_share")
        corpus = read_corpus(*(self.hparams[key] for key in keys))
        self.speakers = corpus.speakers
        place = pack_folder or self.hparams["pack_folder"]
        keys = ("pack", "pack_dtype")
        self.pack = prepare.pack_corpus(
            corpus, place, *(self.hparams[key] for key in keys)
        )
        manifests = folder / "manifests"
        self.parts = {}
        for name in ("train", "valid", "test"):
            entries = read_json(manifests / f"{name}.json")
            for key, entry in entries.items():
                if entry["spk_id"] is not None:
                    part = entry.get("part", name)
                    self.parts.setdefault(part, {})[key] = entry["spk_id"]

    def sample(self, part: str, count: int) -> dict[str, str]:
        """At most so many utterances of a part, drawn once and for all."""
        own = sorted(self.parts.get(part, {}).items())
        chosen = np.random.default_rng(0).permutation(len(own))[:count]
        return {own[i][0]: own[i][1] for i in sorted(chosen)}

    @torch.no_grad()
    def embed(
        self, pieces: list[torch.Tensor], rows: list[int]
    ) -> torch.Tensor:
        """Embeddings [pieces, size] of parts of utterances."""
        found = [None] * len(pieces)
        for batch in LengthBatches(
            [len(piece) for piece in pieces],
            self.hparams["max_frames_per_batch"],
            self.hparams["equal_length_batches"],
        ).batches:
            self._embed_batch(batch, pieces, rows, found)
        return torch.stack(found)

    def _embed_batch(self, batch, pieces, rows, found):
        lengths = torch.tensor([len(pieces[i]) for i in batch])
        padded = torch.nn.utils.rnn.pad_sequence(
            [pieces[i] for i in batch], batch_first=True
        )
        statistics = torch.stack([self.pack.statistics(rows[i]) for i in batch])
        modules = self.hparams["modules"]
        features = modules["preprocess"](padded, lengths, statistics)
        relative = relative_lengths(lengths, padded.shape[1])
        embeddings = modules["embedding_model"](features, relative).squeeze(1)
        for i, embedding in zip(batch, embeddings, strict=True):
            found[i] = embedding

    def accuracy(
        self,
        utterances: dict[str, str],
        cut: Callable[[int], list[tuple[int, int]]],
    ) -> float:
        """Share of utterances that are recognised by the mean embedding of
        the (first frame, frames) pieces that ``cut`` makes of a length."""
        pieces, rows, owner = [], [], []
        for index, key in enumerate(utterances):
            row = self.pack.row[key]
            for start, count in cut(int(self.pack.lengths[row])):
                frames = self.pack.frames(row, start, count)
                pieces.append(torch.from_numpy(frames))
                rows.append(row)
                owner.append(index)
        embeddings = self.embed(pieces, rows)
        count = len(utterances)
        means = mean_embeddings(embeddings, torch.tensor(owner), count)
        with torch.no_grad():
            guesses = self.hparams["classifier"](means.unsqueeze(1))
        names = [
            self.speakers[guess]
            for guess in guesses.squeeze(1).argmax(dim=1).tolist()
        ]
        right = map(str.__eq__, names, utterances.values())
        return float(np.mean(list(right)))

    @torch.no_grad()
    def padded_accuracy(
        self, utterances: dict[str, str], value: float | None
    ) -> float:
        """The same in random batches of 32, padded to each batch's longest:
        masked, or filled with a value and taken for frames of speech."""
        keys = list(utterances)
        np.random.default_rng(1).shuffle(keys)
        right = 0
        modules = self.hparams["modules"]
        for begin in range(0, len(keys), 32):
            batch = keys[begin : begin + 32]
            rows = [self.pack.row[key] for key in batch]
            pieces = [torch.from_numpy(self.pack.frames(row)) for row in rows]
            lengths = torch.tensor([len(piece) for piece in pieces])
            padded = torch.nn.utils.rnn.pad_sequence(
                pieces, batch_first=True, padding_value=value or 0.0
            )
            if value is not None:
                lengths[:] = padded.shape[1]
            statistics = torch.stack(
                [self.pack.statistics(row) for row in rows]
            )
            features = modules["preprocess"](padded, lengths, statistics)
            relative = relative_lengths(lengths, padded.shape[1])
            embeddings = modules["embedding_model"](features, relative)
            guesses = modules["classifier"](embeddings).argmax(dim=-1)
            for key, guess in zip(
                batch, guesses.flatten().tolist(), strict=True
            ):
                right += self.speakers[guess] == utterances[key]
        return right / len(keys)


def train_accuracy(folder: Path, count: int = 1000) -> float:
    """Accuracy on whole utterances that were trained on; kept in a file."""
    kept = folder / "train_accuracy.json"
    if not kept.exists():
        run = Run(folder)
        value = run.accuracy(run.sample("train", count), whole)
        save_atomically(json.dumps(value), kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def whole(length: int) -> list[tuple[int, int]]:
    """The utterance as one piece."""
    return [(0, length)]


def crop_kinds(size: int | None) -> dict[str, Callable]:
    """Ways to take ``size`` frames of an utterance, by their names."""
    if size is None:  # all ways are one
        return {"random": whole}
    generator = np.random.default_rng(size)

    def random(length):
        last = max(0, length - size)
        return [(int(generator.integers(last + 1)), min(size, length))]

    def windows(length):
        last = max(0, length - size)
        starts = range(0, last + 1, max(1, size // 2))
        starts = sorted({*starts, last})
        return [(start, min(size, length)) for start in starts]

    return {
        "random": random,
        "first": lambda length: [(0, min(size, length))],
        "windows": windows,
    }
