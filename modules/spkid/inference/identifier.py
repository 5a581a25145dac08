"""The trained system as one object: from log-mels to speakers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spkid.data import FeatureFiles, LengthBatches, PackedFeatures
from spkid.distributed import rank, world_size
from spkid.errors import UserError
from spkid.evaluation import Evaluation, UtteranceEmbedder
from spkid.files import save_atomically
from spkid.hparams import Settings
from spkid.keys import TRAINED
from spkid.models.masks import absolute_lengths, relative_lengths

WEIGHTS = ("embedding_model", "classifier")


class SpeakerIdentifier(nn.Module):
    """Normalisation, embedding model, classifier and the speakers' names.

    Validation, the final test, ``predict.py`` and the studies all score
    through it. It doesn't draw a random number.

    Arguments
    ---------
    mean_var_norm : torch.nn.Module
        Maps (log-mels, relative lengths, statistics) to features.
    embedding_model : torch.nn.Module
        Maps (features, relative lengths) to embeddings [batch, 1, size].
    classifier : torch.nn.Module
        Maps embeddings to log-posteriors [batch, 1, speakers].
    speakers : sequence of str
        Names by class index.
    max_frames : int
        Padded frames of a batch; halved when memory runs out.
    equal_length : bool
        Only utterances of the same length share a batch: for embedding models
        that aren't exact under padding.
    evaluation, window_frames, window_hop
        As in :class:`spkid.evaluation.UtteranceEmbedder`.

    Example
    -------
    >>> from spkid.features import UtteranceNorm
    >>> from spkid.models import (
    ...     AMSoftmax, MeanPooling, SpeakerEmbedding, TransformerEncoder)
    >>> model = SpeakerEmbedding(TransformerEncoder(40), MeanPooling(80))
    >>> identifier = SpeakerIdentifier(
    ...     UtteranceNorm(), model, AMSoftmax(80, 2), ["ann", "bob"])
    >>> log_posteriors = identifier.classify(torch.randn(3, 50, 40))
    >>> log_posteriors.shape
    torch.Size([3, 1, 2])
    >>> speakers = [identifier.speakers[i] for i in log_posteriors.argmax(-1)]
    """

    def __init__(
        self,
        mean_var_norm: nn.Module,
        embedding_model: nn.Module,
        classifier: nn.Module,
        speakers: Sequence[str],
        max_frames: int = 16000,
        equal_length: bool = False,
        evaluation: str = "whole",
        window_frames: int = 400,
        window_hop: int = 200,
    ) -> None:
        super().__init__()
        self.mean_var_norm = mean_var_norm
        self.embedding_model = embedding_model
        self.classifier = classifier
        self.speakers = tuple(speakers)
        self.equal_length = equal_length
        self.embedder = UtteranceEmbedder(
            embedding_model,
            max_frames,
            equal_length,
            evaluation,
            window_frames,
            window_hop,
        )

    @classmethod
    def from_settings(
        cls, modules: dict[str, Any], speakers: Sequence[str]
    ) -> SpeakerIdentifier:
        """Makes one of a YAML file's objects and values, by their names."""
        return cls(
            modules["mean_var_norm"],
            modules["embedding_model"],
            modules["classifier"],
            speakers,
            modules["max_frames_per_batch"],
            modules["equal_length_batches"],
            modules["evaluation"],
            modules["window_frames"],
            modules["window_hop"],
        )

    @classmethod
    def from_run(
        cls, folder: str | Path, device: str = "cpu"
    ) -> SpeakerIdentifier:
        """Loads a finished run's system, ready to score.

        Of what the run's YAML names, only torch modules are called (what it
        names is imported, if it is installed). No seed is set, and no folder is
        made.

        Raises
        ------
        UserError
            If there is no finished run.
        """
        folder = Path(folder)
        paths = [folder / "model" / f"{name}.ckpt" for name in WEIGHTS]
        for path in (*paths, folder / "speakers.txt"):
            if not path.exists():
                raise UserError(
                    f"{folder}: holds no finished run ({path.name} is "
                    "missing); name the --output_folder of one."
                )
        settings = Settings.of_run(folder)
        modules = settings.build_modules(TRAINED)
        for name, path in zip(WEIGHTS, paths, strict=True):
            try:
                weights = torch.load(
                    path, map_location="cpu", weights_only=True
                )
                modules[name].load_state_dict(weights)
            except Exception as error:  # torch has many for a bad file
                why = str(error).strip().partition("\n")[0]
                raise UserError(
                    f"{path}: can't be loaded ({why}); train again."
                ) from None
        names = (folder / "speakers.txt").read_text(encoding="utf-8")
        made = cls.from_settings(settings.values | modules, names.split("\n"))
        return made.to(device).eval()

    def save(self, folder: str | Path) -> None:
        """Writes the weights and the speakers' names into a run's folder."""
        for name in WEIGHTS:
            weights = io.BytesIO()
            torch.save(getattr(self, name).state_dict(), weights)
            path = Path(folder, "model", f"{name}.ckpt")
            save_atomically(weights.getvalue(), path)
        names = "\n".join(self.speakers)
        save_atomically(names, Path(folder, "speakers.txt"))

    def embed(
        self,
        features: torch.Tensor,
        relative_lengths: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeds utterances of any length, whole or by windows.

        Arguments
        ---------
        features : torch.Tensor [batch, frames, bands]
            Log-mels, padded.
        relative_lengths : torch.Tensor [batch], optional
            SpeechBrain's relative lengths; None: nothing is padded.
        statistics : torch.Tensor [batch, 2, bands], optional
            Means and deviations to normalise by, if not the features' own.

        Returns
        -------
        torch.Tensor [batch, 1, size]
        """
        lengths = None
        if relative_lengths is not None:
            lengths = absolute_lengths(relative_lengths, features.shape[1])
        features = self.mean_var_norm(features, relative_lengths, statistics)
        return self.embedder(features, lengths)

    def classify(
        self,
        features: torch.Tensor,
        relative_lengths: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-posteriors [batch, 1, speakers]; arguments as in
        :meth:`embed`."""
        return self.classifier(
            self.embed(features, relative_lengths, statistics)
        )

    forward = classify

    @torch.no_grad()
    def embed_parts(
        self,
        store: PackedFeatures | FeatureFiles,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
    ) -> torch.Tensor:
        """Embeds parts of stored utterances, in batches by length.

        Each part is normalised by its whole utterance.

        Arguments
        ---------
        store : PackedFeatures or FeatureFiles
            The features.
        rows, starts, counts : sequence of int [parts]
            The utterance's row, and the part's first frame and frames.

        Returns
        -------
        torch.Tensor [parts, size]
        """
        batches = LengthBatches(
            counts, self.embedder.max_frames, self.equal_length
        )
        embeddings: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for batch in batches:
            chosen = ([column[i] for i in batch] for column in (starts, counts))
            for i, embedding in zip(
                batch,
                self._embed_stored(store, [rows[i] for i in batch], *chosen),
                strict=True,
            ):
                embeddings[i] = embedding
        return torch.stack(embeddings)

    def _embed_stored(self, store, rows, starts, counts):
        """Embeddings [batch, size] of a batch of stored parts."""
        device = next(self.embedding_model.parameters()).device
        features, statistics = store.batch(rows, starts, counts)
        relative = None
        if min(counts) < max(counts):
            lengths = torch.tensor(counts, device=device)
            relative = relative_lengths(lengths, max(counts))
        return self.embed(
            features.to(device), relative, statistics.to(device)
        ).squeeze(1)

    @torch.no_grad()
    def score(
        self,
        store: PackedFeatures | FeatureFiles,
        manifest: dict[str, dict],
        progress: str = "",
    ) -> Evaluation:
        """Scores utterances, in batches by length within the frame budget.

        In a distributed run each process scores its share, and all get the
        whole table.

        Arguments
        ---------
        store : PackedFeatures or FeatureFiles
            The features.
        manifest : dict
            In SpeechBrain's form: utterance id to ``length`` (frames),
            ``spk_id`` (None where it is unknown) and, if it isn't a test,
            ``part``.
        progress : str
            What a progress bar says; "": none is shown.
        """
        self.eval()
        ids, entries = list(manifest), list(manifest.values())
        index = {speaker: i for i, speaker in enumerate(self.speakers)}
        batches = LengthBatches(
            [entry["length"] for entry in entries],
            self.embedder.max_frames,
            self.equal_length,
            rank(),
            world_size(),
        )
        scored = []
        for batch in tqdm(batches, progress, disable=not progress):
            own = [entries[i] for i in batch]
            counts = [entry["length"] for entry in own]
            rows = [store.row[ids[i]] for i in batch]
            embeddings = self._embed_stored(
                store, rows, [0] * len(batch), counts
            )
            targets = [index.get(entry["spk_id"], -1) for entry in own]
            scored.append(
                Evaluation.of_batch(
                    [ids[i] for i in batch],
                    self.classifier(embeddings.unsqueeze(1)).squeeze(1),
                    torch.tensor(targets, device=embeddings.device),
                    embeddings,
                    counts,
                    [entry.get("part", "test") for entry in own],
                    self.speakers,
                )
            )
        return Evaluation.concatenate(scored, self.speakers).gather()
