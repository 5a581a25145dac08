"""The trained system as one object: from log-mels or audio to speakers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from spkid.audio import SILENCES
from spkid.backend import Backend
from spkid.data import FeatureFiles, LengthBatches, PackedFeatures
from spkid.distributed import rank, world_size
from spkid.errors import UserError, one_line, one_of
from spkid.evaluation import Evaluation, UtteranceEmbedder
from spkid.features import LogMel
from spkid.files import read_bounded, save_atomically
from spkid.hparams import OUTDATED, Settings
from spkid.inference.questions import Questions
from spkid.keys import TRAINED, Range
from spkid.models import WhitenedCosine
from spkid.models.exported import WhitenedEmbedding
from spkid.models.masks import absolute_lengths, relative_lengths
from spkid.trust import (
    MAX_TRIAL,
    Bounded,
    check_size,
    load_weights,
)

WEIGHTS = ("embedding_model", "classifier")
# Arguments, and the keys of the YAML file.
SCORED_BY = {
    "max_frames": "max_frames_per_batch",
    "equal_length": "equal_length_batches",
    "evaluation": "evaluation",
    "window_frames": "window_frames",
    "window_hop": "window_hop",
}
BACKEND = "backend.npz"
AGAIN = "write it again with train.py --test_only, or train again"
MAX_NAMES = 2**26  # bytes of speakers.txt


class SpeakerIdentifier(nn.Module, Questions):
    """Normalisation, embedding model, classifier and the speakers' names.

    Validation, the final test, ``predict.py`` and the studies all score
    through it. It doesn't draw a random number. Once training has fitted a
    back-end, that classifies, and questions about recordings can be asked.

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
    silence, n_mels : str, int
        How training's features were made, as in
        :func:`spkid.audio.speech_blocks` and :class:`spkid.features.LogMel`.

    Example
    -------
    >>> from spkid.features import UtteranceNorm
    >>> from spkid.models import (
    ...     AMSoftmax, MeanPooling, SpeakerEmbedding, TransformerEncoder)
    >>> model = SpeakerEmbedding(TransformerEncoder(40), MeanPooling(80))
    >>> identifier = SpeakerIdentifier(
    ...     UtteranceNorm(), model, AMSoftmax(80, 2), ["ann", "bob"]).eval()
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
        silence: str = "hw4",
        n_mels: int = 40,
    ) -> None:
        super().__init__()
        self.silence = silence
        self.mean_var_norm = mean_var_norm
        self.embedding_model = embedding_model
        self.classifier = classifier
        self.speakers = tuple(speakers)
        self.backend_classifier: WhitenedCosine | None = None
        self.log_mel = LogMel(n_mels=n_mels)
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
            **{key: modules[name] for key, name in SCORED_BY.items()},
            silence=modules.get("silence", "hw4"),
            n_mels=modules.get("n_mels", 40),
        )

    @classmethod
    def from_run(
        cls, folder: str | Path, device: str = "cpu", trust: bool = False
    ) -> SpeakerIdentifier:
        """Loads a finished run's system, ready to score.

        A stranger's folder runs no code: of what its YAML names, only our own,
        SpeechBrain's and PyTorch's layers are imported and built. No seed is
        set, and no folder is made.

        Arguments
        ---------
        folder : str or pathlib.Path
            The run's output folder.
        device : str
            Where the system is to be.
        trust : bool
            Whether the YAML may name other torch modules, as a pooling of your
            own. Importing them runs their code.

        Raises
        ------
        UserError
            If there is no finished run, or it is damaged or isn't trusted.
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
        settings.need((*TRAINED, *SCORED_BY.values(), "n_mels"), OUTDATED)
        speakers = _read_speakers(folder / "speakers.txt")
        weights = dict(zip(WEIGHTS, paths, strict=True))
        modules = _build(settings, TRAINED, weights, trust)
        made = cls.from_settings(settings.values | modules, speakers).eval()
        size = made._try(settings)
        made._move(device)
        path = folder / "model" / BACKEND
        if path.exists():
            backend = Backend.load(path)
            if backend.speakers != made.speakers or backend.size != size:
                raise _damaged(path, ValueError("it is of another model"))
            made.set_backend(backend)
        return made

    @classmethod
    def from_export(
        cls, folder: str | Path, device: str = "cpu", trust: bool = False
    ) -> SpeakerIdentifier:
        """Loads what ``python -m spkid export`` wrote.

        Arguments and errors are those of :meth:`from_run`; nothing else that
        the folder's YAML names is built or run.
        """
        folder = Path(folder)
        settings = Settings.of_run(folder)
        keys = "mean_var_norm", "embedding_model"
        settings.need(
            (*keys, *SCORED_BY.values(), "n_mels", "silence"), OUTDATED
        )
        one_of(
            settings.values["silence"], SILENCES, f"{settings.path}: silence"
        )
        weights = {"embedding_model": folder / "embedding_model.ckpt"}
        modules = _build(settings, keys, weights, trust)
        backend = Backend.load(folder / BACKEND)
        whitened = modules["embedding_model"]
        if not isinstance(whitened, WhitenedEmbedding):
            raise UserError(
                f"{settings.path}: embedding_model isn't an export's; write it "
                "again with python -m spkid export."
            )
        modules["embedding_model"] = whitened.embedding_model
        modules["classifier"] = WhitenedCosine(
            backend.size, len(backend.speakers)
        )
        made = cls.from_settings(settings.values | modules, backend.speakers)
        made.eval()._try(settings)
        made._move(device)
        made.set_backend(backend)
        return made

    def _move(self, device: str) -> None:
        """To a device, if there is one."""
        try:
            if torch.device(device).type == "meta":
                raise ValueError("it holds no values")
            self.to(device)
        except Exception as error:  # each kind of device has its own
            raise UserError(
                f"--device={device}: can't be used ({one_line(error)}); give "
                "another one, as cpu."
            ) from None

    @torch.no_grad()
    def _try(self, settings: Settings) -> int:
        """Checks on silence that the parts fit each other and the names;
        gives the size of an embedding."""
        n_mels = settings.values["n_mels"]
        large = ValueError("it makes gigabytes of a second of silence")
        try:
            with Bounded(MAX_TRIAL, large):
                silence = torch.zeros(1, 100, n_mels)
                normed = self.mean_var_norm(silence, None, None)
                found = self.embedding_model(normed, None).squeeze(1)
                _, _, known = self.classifier(found.unsqueeze(1)).shape
        except Exception as error:  # whatever its modules say
            raise UserError(
                f"{settings.path}: its model doesn't run ({one_line(error)}); "
                "train again."
            ) from None
        if known != len(self.speakers):
            raise UserError(
                f"{settings.path.with_name('speakers.txt')}: has "
                f"{len(self.speakers)} names, but the classifier knows "
                f"{known} speakers; {AGAIN}."
            )
        return found.shape[1]

    def set_backend(self, backend: Backend) -> None:
        """From now on classifies by a back-end."""
        self.backend, self.speakers = backend, backend.speakers
        classifier = WhitenedCosine(backend.size, len(backend.speakers))
        for name in ("centre", "projection", "prototypes"):
            value = torch.from_numpy(np.asarray(getattr(backend, name)))
            setattr(classifier, name, value.float())
        classifier.scale.fill_(backend.calibration.scale)
        device = next(self.embedding_model.parameters()).device
        self.backend_classifier = classifier.to(device)

    def embed_waveforms(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings [n, size] of speech at 16 kHz, each [samples]."""
        with torch.no_grad():
            return np.stack([self._embed_waveform(w) for w in waveforms])

    def _embed_waveform(self, waveform):
        device = next(self.embedding_model.parameters()).device
        features = self.log_mel(torch.from_numpy(waveform)[None].to(device))
        return self.embed(features)[0, 0].cpu().numpy()

    def save(self, folder: str | Path) -> None:
        """Writes weights, back-end and names into a run's folder."""
        if self.backend_classifier is not None:
            self.backend.save(Path(folder, "model", BACKEND))
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
        return self.posteriors(
            self.embed(features, relative_lengths, statistics)
        )

    def posteriors(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Log-posteriors [..., speakers] of embeddings [..., size], by the
        back-end if there is one."""
        fitted = self.backend_classifier
        return (self.classifier if fitted is None else fitted)(embeddings)

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
                    self.posteriors(embeddings.unsqueeze(1)).squeeze(1),
                    torch.tensor(targets, device=embeddings.device),
                    embeddings,
                    counts,
                    [entry.get("part", "test") for entry in own],
                    self.speakers,
                )
            )
        return Evaluation.concatenate(scored, self.speakers).gather()


def _build(
    settings: Settings,
    keys: Sequence[str],
    paths: dict[str, Path],
    trust: bool,
) -> dict[str, Any]:
    """Modules of a YAML file's keys, with the weights of files by key."""
    Range(1, 10_000).check(
        settings.values["n_mels"], f"{settings.path}: n_mels"
    )
    weights = {}
    for name, path in paths.items():
        try:
            weights[name] = load_weights(path)
        except Exception as error:  # torch has many for a bad file
            raise _damaged(path, error) from None
    build = partial(settings.build_modules, keys, trust)
    if not trust:
        check_size(build, weights, settings.path)
    modules = build()
    for name, path in paths.items():
        try:
            modules[name].load_state_dict(weights[name])
        except Exception as error:  # another shape, type or name
            raise _damaged(path, error) from None
    return modules


def _read_speakers(path: Path) -> list[str]:
    """The names by class index that :meth:`SpeakerIdentifier.save` wrote."""
    try:
        names = read_bounded(path, MAX_NAMES).decode().split("\n")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if len(set(names)) < len(names) or "" in names:
        raise _damaged(path, ValueError("a name is empty or appears twice"))
    return names


def _damaged(path: Path, error: Exception) -> UserError:
    """Says what is wrong with a file of a finished run."""
    return UserError(f"{path}: can't be loaded ({one_line(error)}); {AGAIN}.")
