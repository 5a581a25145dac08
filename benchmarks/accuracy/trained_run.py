"""A finished run's system, tested on crops and padded batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ml2022hw4_prepare import prepare
from spkid.evaluation import UtteranceEmbedder, mean_embeddings
from spkid.files import read_json, save_atomically
from spkid.hparams import Settings
from spkid.inference import SpeakerIdentifier
from spkid.models.masks import relative_lengths, valid_mask

BATCH = 32  # utterances that are padded together
Crop = tuple[int, int]  # first frame, number of frames


class Run:
    """A finished run's system, and the labelled utterances of its data."""

    def __init__(self, folder: Path, pack_folder: Path | None = None) -> None:
        self.identifier = SpeakerIdentifier.from_run(folder)
        values = Settings.of_run(folder).values
        # Crops and batches are scored as they are, whatever the run does.
        self.identifier.embedder = UtteranceEmbedder(
            self.identifier.embedding_model, values["max_frames_per_batch"]
        )
        keys = ("pack", "pack_dtype", "on_bad_file", "max_bad_share")
        _, self.features = prepare(
            values["data_folder"],
            pack_folder=pack_folder or values["pack_folder"],
            **{key: values[key] for key in keys},
        )
        self.parts: dict[str, dict[str, str]] = {}
        for name in ("train", "valid", "test"):
            entries = read_json(folder / "manifests" / f"{name}.json")
            for key, entry in entries.items():
                if entry["spk_id"] is not None:
                    part = self.parts.setdefault(entry.get("part", name), {})
                    part[key] = entry["spk_id"]

    def sample(self, part: str, count: int) -> dict[str, str]:
        """Speakers of at most so many utterances of a part, by utterance; the
        same ones in each call."""
        own = sorted(self.parts.get(part, {}).items())
        chosen = np.random.default_rng(0).permutation(len(own))[:count]
        return {own[i][0]: own[i][1] for i in sorted(chosen)}

    def _right(self, log_posteriors, speakers):
        """Number of utterances whose speaker is recognised."""
        best = log_posteriors.argmax(dim=-1).flatten().tolist()
        guesses = [self.identifier.speakers[i] for i in best]
        return sum(map(str.__eq__, guesses, speakers))

    @torch.no_grad()
    def accuracy(
        self, utterances: dict[str, str], cut: Callable[[int], list[Crop]]
    ) -> float:
        """Share of utterances recognised by the mean embedding of the crops
        that ``cut`` makes of a length."""
        rows = [self.features.row[key] for key in utterances]
        crops = [
            (owner, row, *crop)
            for owner, row in enumerate(rows)
            for crop in cut(int(self.features.lengths[row]))
        ]
        owners, *parts = zip(*crops, strict=True)
        means = mean_embeddings(
            self.identifier.embed_parts(self.features, *parts),
            torch.tensor(owners),
            len(utterances),
        )
        log_posteriors = self.identifier.posteriors(means.unsqueeze(1))
        right = self._right(log_posteriors, utterances.values())
        return right / len(utterances)

    @torch.no_grad()
    def padded_accuracy(
        self, utterances: dict[str, str], filling: float | None
    ) -> float:
        """Share recognised in random batches that are padded to the longest:
        masked if ``filling`` is None, else filled with that value, which the
        system takes for speech."""
        keys, right = list(utterances), 0
        np.random.default_rng(1).shuffle(keys)
        for begin in range(0, len(keys), BATCH):
            batch = keys[begin : begin + BATCH]
            rows = [self.features.row[key] for key in batch]
            lengths = self.features.lengths[rows]
            features, statistics = self.features.batch(
                rows, [0] * len(rows), lengths
            )
            counts, longest = torch.from_numpy(lengths), features.shape[1]
            relative = relative_lengths(counts, longest)
            if filling is not None:
                mask = valid_mask(counts, longest)
                features.masked_fill_(~mask[..., None], filling)
                relative = None
            scores = self.identifier.classify(features, relative, statistics)
            right += self._right(scores, [utterances[key] for key in batch])
        return right / len(keys)


def train_accuracy(folder: Path, count: int = 1000) -> float:
    """Accuracy on whole training utterances; kept in the run's folder."""
    kept = folder / "train_accuracy.json"
    if not kept.exists():
        run = Run(folder)
        value = run.accuracy(run.sample("train", count), whole)
        save_atomically(json.dumps(value), kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def whole(length: int) -> list[Crop]:
    """The utterance as one crop."""
    return [(0, length)]


def crop_kinds(size: int | None) -> dict[str, Callable[[int], list[Crop]]]:
    """Ways to take ``size`` frames of an utterance, by their names."""
    if size is None:  # all ways are one
        return {"random": whole}
    generator = np.random.default_rng(size)

    def random(length):
        last = max(0, length - size)
        return [(int(generator.integers(last + 1)), min(size, length))]

    def windows(length):
        last = max(0, length - size)
        starts = {*range(0, last + 1, max(1, size // 2)), last}
        return [(start, min(size, length)) for start in sorted(starts)]

    return {
        "random": random,
        "first": lambda length: [(0, min(size, length))],
        "windows": windows,
    }
