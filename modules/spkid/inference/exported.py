"""The files of an exported folder that hold its speakers."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

import torch

from spkid.backend import Backend
from spkid.errors import UserError
from spkid.files import save_atomically
from spkid.models import WhitenedCosine


def is_export(folder: str | Path) -> bool:
    """Whether a folder is an exported one.

    Example
    -------
    >>> is_export(getfixture("tmp_path"))
    False
    """
    needed = "hyperparams.yaml", "embedding_model.ckpt"
    return all(Path(folder, name).is_file() for name in needed)


def save_tensors(module: torch.nn.Module, path: Path) -> None:
    """Writes a module's tensors.

    Example
    -------
    >>> save_tensors(torch.nn.Linear(2, 3), getfixture("tmp_path") / "a.ckpt")
    """
    content = io.BytesIO()
    torch.save(module.state_dict(), content)
    save_atomically(content.getvalue(), path)


def save_speakers(folder: str | Path, backend: Backend) -> Path:
    """Puts a back-end's speakers behind each door of an exported folder.

    Arguments
    ---------
    folder : str or pathlib.Path
        With hyperparams.yaml; ONNX files in it are changed, too.
    backend : Backend
        Of the folder's embedding model.

    Returns
    -------
    pathlib.Path
        The back-end's file, which is written last.

    Raises
    ------
    UserError
        If there is an ONNX file, and onnx isn't installed.

    Example
    -------
    >>> import numpy as np
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text("n_speakers: 3")
    >>> backend = Backend.of_means(np.eye(2), ["ann", "bob"])
    >>> save_speakers(folder, backend).name
    'backend.npz'
    >>> (folder / "hyperparams.yaml").read_text()
    'n_speakers: 2'
    """
    from speechbrain.dataio.encoder import CategoricalEncoder

    folder, count = Path(folder), len(backend.speakers)
    changed = {}
    for path in sorted(folder.glob("*.onnx")):
        try:
            import onnx
        except ImportError:
            raise UserError(
                f"{path}: holds the speakers, too; pip install onnx to change "
                "them there, or remove the file."
            ) from None
        from spkid.inference.onnx_export import set_speakers

        model = onnx.load(path)
        set_speakers(model, backend)
        changed[path] = model.SerializeToString()
    for path, content in changed.items():
        save_atomically(content, path)
    # Of embeddings that are whitened already.
    classifier = WhitenedCosine(backend.size, count, backend.calibration.scale)
    classifier.prototypes = torch.from_numpy(backend.prototypes).float()
    save_tensors(classifier, folder / "classifier.ckpt")
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(backend.speakers)
    with tempfile.TemporaryDirectory() as place:
        encoder.save(Path(place, "names"))
        names = Path(place, "names").read_bytes()
    save_atomically(names, folder / "label_encoder.ckpt")
    settings = folder / "hyperparams.yaml"
    text = re.sub(
        r"(?m)^(\s*n_speakers: )\d+$",
        rf"\g<1>{count}",
        settings.read_text(encoding="utf-8"),
    )
    save_atomically(text, settings)
    backend.save(folder / "backend.npz")
    return folder / "backend.npz"
