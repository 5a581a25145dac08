"""One ONNX file of a trained system, compared with PyTorch before it is kept.

onnx and onnxscript are needed here alone; what uses the file needs neither.
"""

import base64
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from spkid.backend import Backend, unit
from spkid.errors import UserError
from spkid.features import LogMel
from spkid.inference.identifier import SpeakerIdentifier
from spkid.models.masks import relative_lengths

OPSET = 18
TOLERANCE = 1e-4  # of log-posteriors and of embeddings of length 1
BLOCK = 512  # queries that attend at once
FRAMES = [[1], [7], [100], [513], [33, 512, 700, 1, 250, 64, 90, 311]]
SAMPLES = [[4000], [16077], [8000, 40123, 201, 20000]]
EQUAL = [[100] * 2, [513]], [[16000] * 2, [40123]]  # frames, samples
OUTPUTS = ["embeddings", "log_posteriors"]


class _Network(nn.Module):
    """From log-mels to embeddings and log-posteriors."""

    speakers: torch.Tensor  # [size, speakers]; set_speakers() replaces them

    def __init__(self, identifier: SpeakerIdentifier) -> None:
        super().__init__()
        assert identifier.backend_classifier is not None
        self.mean_var_norm = identifier.mean_var_norm
        self.embedding_model = identifier.embedding_model
        self.classifier = identifier.backend_classifier
        prototypes = self.classifier.prototypes
        self.register_buffer("speakers", prototypes.T.contiguous())

    def forward(self, features, frames=None):
        relative = None
        if frames is not None:
            relative = relative_lengths(frames, features.shape[1])
        normed = self.mean_var_norm(features, relative, None)
        embeddings = self.embedding_model(normed, relative).squeeze(1)
        cosines = self.classifier.project(embeddings) @ self.speakers
        scaled = self.classifier.scale * cosines
        return embeddings, F.log_softmax(scaled, dim=-1)


class _FrontEnd(nn.Module):
    """LogMel as a convolution, with each waveform's own end reflected."""

    waves: torch.Tensor
    bands: torch.Tensor

    def __init__(self, log_mel: LogMel) -> None:
        super().__init__()
        spectrogram = log_mel.melspectrogram
        self.hop, self.reach = spectrogram.hop_length, spectrogram.n_fft // 2
        self.floor = log_mel.floor
        window = spectrogram.spectrogram.window.double()
        waves = torch.fft.rfft(torch.diag(window)).T
        waves = torch.cat((waves.real, waves.imag)).float()
        self.register_buffer("waves", waves.unsqueeze(1))
        bands = spectrogram.mel_scale.fb.T.contiguous()
        self.register_buffer("bands", bands.unsqueeze(2))

    def forward(self, waveforms, samples=None):
        size = waveforms.shape[1]
        if samples is None:
            samples = torch.full((waveforms.shape[0],), size)
        place = torch.arange(-self.reach, size + self.reach).abs().unsqueeze(0)
        place = torch.minimum(place, 2 * (samples.unsqueeze(1) - 1) - place)
        padded = waveforms.gather(1, place.clamp(min=0))
        waves = F.conv1d(padded.unsqueeze(1), self.waves, stride=self.hop)
        real, imaginary = waves.chunk(2, dim=1)
        mel = F.conv1d(real.square() + imaginary.square(), self.bands)
        features = mel.clamp(min=self.floor).log().transpose(1, 2)
        return features, 1 + samples // self.hop


def export_onnx(
    identifier: SpeakerIdentifier,
    path: Path,
    source: str = "waveform",
    quantized: bool = False,
    held_out: Sequence[np.ndarray] = (),
) -> None:
    """Writes an ONNX file, and what it was compared with as PATH.json.

    Arguments
    ---------
    identifier : SpeakerIdentifier
        With a back-end, on the CPU.
    path : pathlib.Path
        The file.
    source : str
        What it takes: "waveform" (speech at 16 kHz) or "features" (log-mels).
    quantized : bool
        Whether to write PATH with ``.int8``, too: weights of 8 bits.
    held_out : sequence of np.ndarray [frames, bands]
        Log-mels on which that is compared; none: random ones.

    Raises
    ------
    UserError
        If onnx isn't installed, or an answer differs from PyTorch's.

    Example
    -------
    >>> export_onnx(identifier, Path("model.onnx"))  # doctest: +SKIP
    """
    equal = identifier.equal_length
    network = _traced(
        _Network(identifier),
        (torch.zeros(2, 100, _bands(identifier)), torch.tensor([100, 60])),
        ["features", "frames"],
        OUTPUTS,
        equal,
    )
    parity = [_compare(network, identifier, EQUAL[0] if equal else FRAMES)]
    front = None
    if source == "waveform":
        front = _traced(
            _FrontEnd(identifier.log_mel),
            (torch.zeros(2, 16000), torch.tensor([16000, 9000])),
            ["waveforms", "samples"],
            ["mels", "counts"],
            equal,
        )
    facts = {
        "silence": identifier.silence,
        "shortest": 1 + identifier.log_mel.melspectrogram.n_fft // 2,
    }
    model = _finished(front, network, facts, identifier.backend, equal)
    if front is not None:
        lengths = EQUAL[1] if equal else SAMPLES
        parity.append(_compare(model, identifier, lengths))
    path.write_bytes(model.SerializeToString())
    report: dict[str, Any] = {
        "input": source,
        "padding": "none: batches of one length" if equal else "exact",
        "parity": parity,
        "exporter": f"torch.onnx.export(dynamo=True), {torch.__version__}",
        "bytes": path.stat().st_size,
    }
    if quantized:
        small = _quantize(network)
        report["quantized"] = _agreement(network, small, identifier, held_out)
        model = _finished(front, small, facts, identifier.backend, equal)
        path = path.with_suffix(".int8.onnx")
        path.write_bytes(model.SerializeToString())
        report["quantized"]["bytes"] = path.stat().st_size
        path = path.with_suffix("").with_suffix(".onnx")
    path.with_suffix(".onnx.json").write_text(json.dumps(report, indent=1))


def set_speakers(model: Any, backend: Backend) -> None:
    """Puts other speakers into an ONNX model of :func:`export_onnx`.

    Example
    -------
    >>> set_speakers(model, backend)  # doctest: +SKIP
    """
    from onnx import helper, numpy_helper

    held = next(t for t in model.graph.initializer if t.name == "speakers")
    values = backend.prototypes.T.astype(np.float32)
    held.CopyFrom(numpy_helper.from_array(values, held.name))
    shape = model.graph.output[1].type.tensor_type.shape
    shape.dim[1].dim_value = len(backend.speakers)
    del model.graph.value_info[:]  # which say the old shapes
    known = {one.key: one.value for one in model.metadata_props}
    known["backend"] = base64.b64encode(backend.to_bytes()).decode()
    known["speakers"] = json.dumps(backend.speakers)  # for other programs
    helper.set_model_props(model, known)


def _bands(identifier: SpeakerIdentifier) -> int:
    return int(identifier.log_mel.melspectrogram.n_mels)


def _traced(module, example, inputs, outputs, equal) -> Any:
    """A module as an ONNX model; ``equal``: it isn't told of padding."""
    axes = [{0: "batch", 1: inputs[1]}, {0: "batch"}]
    given = slice(0, 1) if equal else slice(0, 2)
    with _quietly():
        program = torch.onnx.export(
            module.eval(),
            example[given],
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=inputs[given],
            output_names=outputs,
            dynamic_shapes=tuple(axes[given]),
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: (
                    _attention()
                )
            },
        )
    assert program is not None
    return program.model_proto


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporters' notes are of no use; PyTorch's fast layers for Transformer
    inference, which they don't know, are off."""
    fast, disabled = torch.backends.mha, logging.root.manager.disable
    was_fast = fast.get_fastpath_enabled()
    logging.disable(logging.WARNING)
    fast.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        fast.set_fastpath_enabled(was_fast)


def _attention():
    """Attention by blocks of queries: 80 s would take 4 GB at once."""
    from onnxscript import FLOAT, opset18, script

    op: Any = opset18

    @script(default_opset=op)
    def by_blocks(
        query: FLOAT[...],  # type: ignore[misc,type-arg]
        keys: FLOAT[...],  # type: ignore[misc,type-arg]
        value: FLOAT[...],  # type: ignore[misc,type-arg]
        bias: FLOAT[...],  # type: ignore[misc,type-arg]
    ) -> FLOAT[...]:  # type: ignore[misc,type-arg]
        size = op.Constant(value_ints=[BLOCK])
        axis = op.Constant(value_ints=[2])
        zero = op.Constant(value_ints=[0])
        last = op.Shape(query, start=2, end=3) - op.Constant(value_ints=[1])
        blocks = op.Squeeze(last / size + op.Constant(value_ints=[1]))
        # The signature's FLOAT is found only if the body uses it.
        done = op.Cast(op.Slice(query, zero, zero, axis), to=FLOAT.dtype)
        for i in range(blocks):
            start = op.Reshape(i, op.Constant(value_ints=[1])) * size
            rows = op.Slice(query, start, start + size, axis)
            weights = op.Softmax(op.MatMul(rows, keys) + bias, axis=-1)
            done = op.Concat(done, op.MatMul(weights, value), axis=2)
        return done

    def attention(query, key, value, attn_mask=None, *_, **__):
        keys = op.Transpose(key, perm=[0, 1, 3, 2])
        scale = op.Constant(value_float=query.shape[-1] ** -0.5)
        keys = op.Mul(keys, scale)
        bias = op.Constant(value_floats=[0.0])
        if attn_mask is not None:
            bias = attn_mask
            if attn_mask.dtype.name == "BOOL":
                hidden = op.Constant(value_float=float("-inf"))
                bias = op.Where(attn_mask, bias_of_seen(), hidden)
            if attn_mask.shape[-2] != 1:  # of each query: as large as all
                scores = op.Add(op.MatMul(query, keys), bias)
                return op.MatMul(op.Softmax(scores, axis=-1), value)
        return by_blocks(query, keys, value, bias)

    def bias_of_seen():
        return op.Constant(value_float=0.0)

    return attention


def _finished(front, network, facts, backend, equal) -> Any:
    """The whole model, with its speakers and what :class:`OnnxIdentifier`
    must know."""
    import onnx
    from onnx import compose, helper

    model = onnx.ModelProto()
    model.CopyFrom(network)
    if front is not None:
        first = compose.add_prefix(
            front, "front.", rename_inputs=False, rename_outputs=False
        )
        first.ir_version = model.ir_version
        joints = [("mels", "features")]
        if not equal:
            joints.append(("counts", "frames"))
        model = compose.merge_models(first, model, joints, outputs=OUTPUTS)
    helper.set_model_props(model, {"spkid": json.dumps(facts)})
    set_speakers(model, backend)
    onnx.checker.check_model(model)
    return model


def _session(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )


def _compare(model, identifier, batches) -> dict[str, Any]:
    """The largest differences from PyTorch on padded batches of noise."""
    session, generator = _session(model), torch.Generator().manual_seed(0)
    names = [one.name for one in session.get_inputs()]
    waves = names[0] == "waveforms"
    shape = () if waves else (_bands(identifier),)
    worst = {name: 0.0 for name in OUTPUTS}
    for counts in batches:
        given = [torch.randn(n, *shape, generator=generator) for n in counts]
        x, lengths = pad_sequence(given, batch_first=True), torch.tensor(counts)
        feed = zip(names, (x.numpy(), lengths.numpy()), strict=False)
        with torch.no_grad():
            if waves:
                own = identifier.embed_waveforms([one.numpy() for one in given])
            else:
                padded = min(counts) < max(counts)
                share = relative_lengths(lengths, max(counts))
                own = identifier.embed(x, share if padded else None)
                own = own.squeeze(1).numpy()
            told = identifier.posteriors(torch.from_numpy(own)).numpy()
        found = session.run(OUTPUTS, dict(feed))
        pairs = (unit(found[0]), unit(own)), (found[1], told)
        for name, (a, b) in zip(OUTPUTS, pairs, strict=True):
            worst[name] = max(worst[name], float(np.abs(a - b).max()))
            if not worst[name] <= TOLERANCE:  # NaN, too
                raise UserError(
                    f"model.onnx: {name} differ from PyTorch's by "
                    f"{worst[name]:.1e}, more than {TOLERANCE}, so nothing was "
                    "written; try another version of torch or onnxscript."
                )
    return {"input": names[0], "lengths": batches, "largest_difference": worst}


def _quantize(network: Any) -> Any:
    """With products by weights of 8 bits, those of the back-end excepted."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    after, kept = {OUTPUTS[0]}, []
    for node in network.graph.node:  # each after those that it needs
        if after.intersection(node.input):
            after.update(node.output)
            kept.append(node.name)
    with tempfile.TemporaryDirectory() as folder, _quietly():
        whole, small = Path(folder, "whole.onnx"), Path(folder, "small.onnx")
        onnx.save(network, whole)
        quantize_dynamic(
            whole, small, weight_type=QuantType.QInt8, nodes_to_exclude=kept
        )
        return onnx.load(small)


def _agreement(network, small, identifier, held_out) -> dict[str, Any]:
    """How a quantised model answers, beside the whole one, and how fast."""
    random, bands = np.random.default_rng(0), _bands(identifier)
    utterances = list(held_out) or [
        random.normal(size=(n, bands)) for n in range(100, 500, 8)
    ]
    sessions = {"float32": _session(network), "int8": _session(small)}
    guesses: dict[str, list[int]] = {name: [] for name in sessions}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for features in [*utterances, *[random.normal(size=(500, bands))] * 7]:
        feed = {"features": features[None].astype(np.float32)}
        if not identifier.equal_length:
            feed["frames"] = np.array([len(features)])
        for name, session in sessions.items():
            start = time.perf_counter()
            _, posteriors = session.run(OUTPUTS, feed)
            seconds[name].append(time.perf_counter() - start)
            guesses[name].append(int(posteriors.argmax()))
    n = len(utterances)
    same = np.equal(guesses["float32"][:n], guesses["int8"][:n])
    return {
        "compared_on": "held-out utterances" if held_out else "random features",
        "utterances": n,
        "same_speaker": float(same.mean()),
        "seconds_for_5_s": {
            name: round(float(np.median(one[n:])), 4)
            for name, one in seconds.items()
        },
    }
