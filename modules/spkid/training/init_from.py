"""The weights of a trained model, for a new run to start from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.encoder import CategoricalEncoder
from torch import nn

from spkid.errors import UserError, one_line
from spkid.files import read_bounded
from spkid.hparams import Settings
from spkid.trust import MAX_WEIGHTS, load_weights

# Where one differs, the weights are those of another model or other inputs.
SHAPED_BY = (
    *("normalization", "d_model", "n_layers", "n_heads", "d_ff"),
    *("kernel_size", "embedding_size"),
)
MAX_NAMES = 2**26  # bytes of the speakers' names
FILE = "embedding_model.ckpt"


@dataclass(frozen=True)
class TrainedModel:
    """What a new run can take over from a trained model.

    Attributes
    ----------
    path : pathlib.Path
        Its embedding_model.ckpt.
    embedding_model, classifier : dict
        Weights by name; the classifier's are empty where nobody says whose
        they are.
    speakers : tuple of str
        The classifier's, by class index.
    values : dict
        Of its hyperparams.yaml, if it has one.

    Example
    -------
    >>> path = getfixture("tmp_path") / "embedding_model.ckpt"
    >>> torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    >>> TrainedModel.read(path).embedding_model["weight"].shape
    torch.Size([3, 2])
    """

    path: Path
    embedding_model: dict[str, torch.Tensor]
    classifier: dict[str, torch.Tensor]
    speakers: tuple[str, ...]
    values: dict[str, Any]

    @classmethod
    def read(cls, place: str | Path) -> TrainedModel:
        """Reads a run's folder, an exported one, or an embedding_model.ckpt.

        Raises
        ------
        UserError
            If there is none, or one of its files is damaged.
        """
        folder = path = Path(place)
        if folder.is_dir():
            path = folder / "model" / FILE
            path = path if path.exists() else folder / FILE
        if not path.exists():
            raise UserError(
                f"{place}: holds no trained model ({path.name} is missing); "
                "give --init_from a finished run's folder, an exported one, or "
                f"an {FILE}."
            )
        speakers: tuple[str, ...] = ()
        if (folder / "speakers.txt").exists():
            speakers = _load(_read_names, folder / "speakers.txt")
        elif (folder / "label_encoder.ckpt").exists():
            speakers = _load(_read_encoder, folder / "label_encoder.ckpt")
        classifier, settings = path.with_name("classifier.ckpt"), {}
        if (folder / "hyperparams.yaml").exists():
            settings = Settings.of_run(folder).values
        return cls(
            path,
            _load(load_weights, path),
            _load(load_weights, classifier) if speakers else {},
            speakers,
            settings,
        )

    def digest(self) -> str:
        """The SHA-256 of its embedding_model.ckpt."""
        content = read_bounded(self.path, MAX_WEIGHTS)
        return hashlib.sha256(content).hexdigest()

    def fill(self, model: nn.Module, settings: Settings) -> None:
        """Loads the embedding model's weights.

        Raises
        ------
        UserError
            If a weight has another name or shape.
        """
        ours, theirs = model.state_dict(), self.embedding_model
        for name in ours | theirs:
            had, needed = (
                list(weights[name].shape) if name in weights else "missing"
                for weights in (theirs, ours)
            )
            if had != needed:
                raise UserError(
                    f"{self.path}: weight '{name}' is {had} there, but "
                    f"{needed} in {settings.path} with "
                    f"{settings.values['n_mels']} mel bands; give another "
                    "--init_from, or the YAML file that it was trained with."
                )
            if not theirs[name].isfinite().all():
                raise UserError(
                    f"{self.path}: weight '{name}' isn't finite, as after a "
                    "training that has diverged; give another --init_from."
                )
        model.load_state_dict(theirs)

    @torch.no_grad()
    def fill_classes(
        self, classifier: nn.Module, speakers: Sequence[str], settings: Settings
    ) -> int:
        """Loads the classes of those speakers whose names both know.

        Returns
        -------
        int
            How many; 0 if it is another kind of classifier.
        """
        index = {name: i for i, name in enumerate(self.speakers)}
        known = [i for i, name in enumerate(speakers) if name in index]
        rows = known, [index[speakers[i]] for i in known]
        # What grows with one more speaker has a part for each.
        more = settings.replace(n_speakers=len(speakers) + 1)
        larger = more.build_modules(["classifier"], trust=True)["classifier"]
        found = []
        for name, grown in larger.named_parameters():
            ours = classifier.get_parameter(name)
            theirs = self.classifier.get(name, torch.empty(0)).to(ours)
            shared = grown.shape == ours.shape
            n, m = (1, 1) if shared else (len(speakers), len(self.speakers))
            if theirs.shape[1:] != ours.shape[1:] or (
                theirs.numel() * n != ours.numel() * m
            ):
                return 0
            parts = ours.view(n, -1), theirs.reshape(m, -1)
            found.append((*parts, *(([0], [0]) if shared else rows)))
        for part, source, to, of in found if known else ():
            part[to] = source[of]
        return len(known)


def check_init_from(settings: Settings) -> None:
    """Raises UserError, before any data are read, if a new run can't start
    from what its ``init_from`` names.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.yaml"
    >>> _ = path.write_text("init_from: null")
    >>> check_init_from(Settings(path))
    """
    source, values = settings.values["init_from"], settings.values
    if source is None:
        return
    trained = TrainedModel.read(source)
    other = {
        key: trained.values[key]
        for key in SHAPED_BY
        if key in trained.values and key in values
        if trained.values[key] != values[key]
    }
    if other:
        had = [
            f"{key}={value}, not {values[key]}" for key, value in other.items()
        ]
        cure = [f"--{key}={value}" for key, value in other.items()]
        raise UserError(
            f"{trained.path}: was trained with {', '.join(had)}; give "
            f"{' '.join(cure)}, or another --init_from."
        )


def _load(read: Callable[[Path], Any], path: Path) -> Any:
    """What a file holds; whatever is wrong with it is one sentence."""
    try:
        return read(path)
    except Exception as error:  # torch has many for a bad file
        raise UserError(
            f"{path}: can't be loaded ({one_line(error)}); restore it, or give "
            "another --init_from."
        ) from None


def _read_names(path):
    """Of a run's speakers.txt."""
    return tuple(read_bounded(path, MAX_NAMES).decode().split("\n"))


def _read_encoder(path):
    """Of SpeechBrain's encoder, which opens anything of any size."""
    read_bounded(path, MAX_NAMES)
    encoder = CategoricalEncoder()
    encoder.load(path)
    return tuple(str(encoder.ind2lab[i]) for i in range(len(encoder)))
