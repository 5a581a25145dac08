"""A system exported to ONNX: the same questions, without PyTorch."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spkid.audio import SILENCES
from spkid.backend import Backend
from spkid.errors import AudioError, UserError, one_line, one_of
from spkid.files import read_bounded
from spkid.inference.questions import Questions

MAX_BYTES = 2**31  # of an ONNX file


class OnnxIdentifier(Questions):
    """Answers from one ONNX file, which holds the speakers, too.

    ``python -m spkid export`` writes it. The file runs no code, and names no
    other file.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.

    Raises
    ------
    UserError
        If it is missing, damaged, or takes log-mels instead of waveforms.

    Example
    -------
    >>> OnnxIdentifier("nowhere/model.onnx")
    Traceback (most recent call last):
    spkid.errors.UserError: nowhere/model.onnx: there is no such file; ...
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).exists():
            raise UserError(
                f"{path}: there is no such file; write it with python -m "
                "spkid export."
            )
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                f"{path}: needs ONNX Runtime; pip install onnxruntime."
            ) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            # Of bytes: so the file can't name another one.
            self.session = onnxruntime.InferenceSession(
                read_bounded(path, MAX_BYTES),
                options,
                providers=["CPUExecutionProvider"],
            )
            held = self.session.get_modelmeta().custom_metadata_map
            facts = json.loads(held["spkid"])
            self.silence, self.shortest = facts["silence"], facts["shortest"]
            one_of(self.silence, SILENCES, "silence")
            self.set_backend(
                Backend.from_bytes(base64.b64decode(held["backend"]))
            )
        except Exception as error:  # onnxruntime has many for a bad file
            raise UserError(
                f"{path}: can't be loaded ({one_line(error)}); write it again "
                "with python -m spkid export."
            ) from None
        self.inputs = [one.name for one in self.session.get_inputs()]
        if "waveforms" not in self.inputs:
            raise UserError(
                f"{path}: takes log-mels; for recordings, write it again with "
                "--onnx_input waveform."
            )

    def embed_waveforms(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings [n, size] of speech at 16 kHz, each [samples]."""
        return np.concatenate([self._embed(one) for one in waveforms])

    def _embed(self, waveform: np.ndarray) -> np.ndarray:
        if len(waveform) < self.shortest:
            raise AudioError(
                f"Speech must have at least {self.shortest} samples, not "
                f"{len(waveform)}."
            )
        given = (waveform[None].astype(np.float32), np.array([len(waveform)]))
        feed = dict(zip(self.inputs, given, strict=False))
        return self.session.run(["embeddings"], feed)[0]
