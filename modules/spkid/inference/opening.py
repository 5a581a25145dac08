"""Opens a trained system, whatever it is stored as."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from spkid.backend import Backend
from spkid.errors import UserError, one_of
from spkid.files import lock_folder
from spkid.inference.questions import Questions

RUNTIMES = ("torch", "onnx")
PATIENCE = 20.0  # seconds, until others have changed the speakers
GALLERY = "gallery.npz"  # in model/: the back-end after speakers came or went


def load(
    model: str | Path,
    runtime: str | None = None,
    device: str = "cpu",
    trust: bool = False,
) -> Questions:
    """Opens a trained system, to ask it about recordings.

    Arguments
    ---------
    model : str or pathlib.Path
        A run's output folder, an exported folder, or an ONNX file.
    runtime : str, optional
        "torch" or "onnx", which needs no PyTorch; None: what fits the model.
    device : str
        Where PyTorch runs.
    trust : bool
        Whether a run's YAML may name modules of your own.

    Raises
    ------
    UserError
        If there is no such model, or it is damaged or isn't trusted.

    Example
    -------
    >>> load("nowhere")
    Traceback (most recent call last):
    spkid.errors.UserError: nowhere: no such file or folder; name a run's ...
    """
    path = Path(model)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; name a run's output folder, an "
            "exported folder or an .onnx file."
        )
    if runtime is not None:
        one_of(runtime, RUNTIMES, "runtime")
    exported = path / "model.onnx"
    if path.is_file() or runtime == "onnx":
        from spkid.inference.onnx_identifier import OnnxIdentifier

        if path.is_file() and runtime == "torch":
            raise UserError(f"{path}: an ONNX file needs --runtime onnx.")
        return OnnxIdentifier(path if path.is_file() else exported)
    from spkid.inference.identifier import SpeakerIdentifier

    if (path / "embedding_model.ckpt").exists():
        return SpeakerIdentifier.from_export(path, device, trust)
    identifier = SpeakerIdentifier.from_run(path, device, trust)
    if identifier.backend_classifier is None:
        raise UserError(
            f"{path / 'model'}: has no back-end (backend.npz), as it was "
            "trained with an older version; train.py with --test_only fits one."
        )
    use_gallery(identifier, path)
    return identifier


def use_gallery(identifier: Questions, model: str | Path) -> None:
    """Takes over who has come and gone since a run was trained.

    Raises
    ------
    UserError
        If the file is damaged, or of other weights, as before the run was
        trained further.
    """
    path = folder_of(Path(model)) / GALLERY
    if not os.path.lexists(path):
        return
    cure = "enrol again after removing it, which brings back the run's speakers"
    gallery, trained = Backend.load(path, cure), identifier.backend
    if not np.array_equal(gallery.projection, trained.projection):
        raise UserError(f"{path}: is of other weights; {cure}.")
    identifier.set_backend(gallery)


@contextmanager
def changing(model: str | Path) -> Iterator[None]:
    """Keeps others from changing a model's speakers meanwhile.

    Raises
    ------
    UserError
        If another process is at it, or the model is an ONNX file.

    Example
    -------
    >>> with changing(getfixture("tmp_path")):
    ...     pass
    """
    path = Path(model)
    if path.is_file():
        raise UserError(
            f"{path}: an ONNX file can't be changed; enrol in the run's folder "
            "and export it again."
        )
    if not path.exists():
        raise UserError(f"{path}: no such folder; name a run's output folder.")
    lock = lock_folder(folder_of(path), patience=PATIENCE)
    try:
        yield
    finally:
        if lock:
            lock.release()


def folder_of(model: Path) -> Path:
    """Where a model's weights and speakers are.

    Example
    -------
    >>> folder_of(getfixture("tmp_path")) == getfixture("tmp_path")
    True
    """
    return model / "model" if (model / "model").is_dir() else model


def save_gallery(model: str | Path, backend: Backend) -> Path:
    """Keeps the speakers of a model after some came or went.

    Example
    -------
    >>> import numpy as np
    >>> backend = Backend.of_means(np.eye(2), ["ann", "bob"])
    >>> save_gallery(getfixture("tmp_path"), backend).name
    'gallery.npz'
    """
    if (Path(model) / "embedding_model.ckpt").exists():
        from spkid.inference.exported import save_speakers

        return save_speakers(model, backend)
    path = folder_of(Path(model)) / GALLERY
    backend.save(path)
    return path
