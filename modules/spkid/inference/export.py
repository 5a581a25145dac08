"""A trained run for others: SpeechBrain's folder, an ONNX file, a model card.

python -m spkid export RUN FOLDER
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import jinja2
import numpy as np
import ruamel.yaml
from hyperpyyaml import resolve_references
from ruamel.yaml.nodes import MappingNode

from spkid.backend import Backend
from spkid.data import load_feature_file
from spkid.errors import UserError, one_of
from spkid.evaluation import Evaluation
from spkid.files import read_json
from spkid.hparams import Settings
from spkid.inference.exported import is_export, save_speakers, save_tensors
from spkid.inference.identifier import SCORED_BY, SpeakerIdentifier
from spkid.inference.opening import load
from spkid.models.exported import WhitenedEmbedding

SOURCES = ("waveform", "features")
OWN = ("mean_var_norm", "embedding_model")  # of the run's YAML
MOST = 100  # held-out utterances that quantised weights are compared on
PAIRS = 2000  # held-out utterances that are compared with each other
RATED = {
    "valid": "held-out, new sessions",
    "known": "held-out, sessions that were trained on",
    "test": "test",
    "expected": "estimate for the test's recordings",
}
YAML = """
sample_rate: 16000
n_speakers: {n_speakers}
size: {size}
silence: {silence}
n_mels: {n_mels}
{scored_by}
audio_normalizer: !new:spkid.features.normalizer.SpeechNormalizer
    silence: !ref <silence>
compute_features: !new:spkid.features.LogMel
    n_mels: !ref <n_mels>
embedding_model: !new:spkid.models.exported.WhitenedEmbedding
    embedding_model: !ref <network>
    size: !ref <size>
classifier: !new:spkid.models.WhitenedCosine
    input_size: !ref <size>
    n_speakers: !ref <n_speakers>
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
"""


def export(
    run: str | Path,
    folder: str | Path,
    source: str = "waveform",
    quantized: bool = False,
    trust: bool = False,
) -> list[str]:
    """Writes a folder that SpeechBrain, ONNX Runtime and spkid load.

    Arguments
    ---------
    run : str or pathlib.Path
        The output folder of a finished run.
    folder : str or pathlib.Path
        A new one, an empty one, or an earlier export, which is replaced.
    source : str
        What the ONNX file takes: "waveform" (speech at 16 kHz) or "features"
        (log-mels).
    quantized : bool
        Whether to write an ONNX file with weights of 8 bits, too.
    trust : bool
        Whether the run's YAML may name modules of your own.

    Returns
    -------
    list of str
        The names of its files. A failure leaves what was there before.

    Raises
    ------
    UserError
        If there is no such run, the folder holds something else, or an answer
        of the ONNX file differs from PyTorch's.

    Example
    -------
    >>> export("nowhere", getfixture("tmp_path") / "new")
    Traceback (most recent call last):
    spkid.errors.UserError: nowhere: no such file or folder; name a run's ...
    """
    one_of(source, SOURCES, "onnx_input")
    run, target = Path(run), Path(os.path.realpath(folder))
    if target.exists() and not (
        target.is_dir() and (is_export(target) or not any(target.iterdir()))
    ):
        raise UserError(
            f"{folder}: holds something else; name a new folder, an empty one "
            "or an earlier export."
        )
    if run.is_file() or is_export(run):
        raise UserError(
            f"{run}: is exported already; name a run's output folder."
        )
    identifier = load(run, "torch", trust=trust)
    assert isinstance(identifier, SpeakerIdentifier)
    settings = Settings.of_run(run)
    if settings.values["evaluation"] == "windows":
        raise UserError(
            f"{settings.path}: evaluation=windows can't be exported; run "
            "train.py --test_only --evaluation whole first."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        made, old = Path(place, "new"), Path(place, "old")
        made.mkdir()
        _write(identifier, settings, run, made, source, quantized)
        names = sorted(path.name for path in made.iterdir())
        if target.exists():
            target.rename(old)
        made.rename(target)
    return names


def _write(identifier, settings, run, folder, source, quantized) -> None:
    """Fills the new folder."""
    backend = identifier.backend
    whitened = WhitenedEmbedding(identifier.embedding_model, backend.size)
    for name in ("centre", "projection"):
        setattr(
            whitened.backend, name, getattr(identifier.backend_classifier, name)
        )
    save_tensors(whitened, folder / "embedding_model.ckpt")
    text = _hyperparameters(settings, identifier)
    (folder / "hyperparams.yaml").write_text(text, encoding="utf-8")
    save_speakers(folder, backend)
    if find_spec("onnx") and find_spec("onnxscript"):
        from spkid.inference.onnx_export import export_onnx

        held_out = _held_out(run, settings) if quantized else ()
        path = folder / "model.onnx"
        export_onnx(identifier, path, source, quantized, held_out)
    elif quantized or source != SOURCES[0]:
        raise UserError(
            "An ONNX file can't be written; pip install onnx onnxscript "
            "onnxruntime."
        )
    card = _card(identifier, settings, run, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _hyperparameters(settings: Settings, identifier) -> str:
    """The YAML file, with references resolved as in a run's."""
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    pairs = []
    for key, node in yaml.compose(settings.text).value:
        if key.value in OWN:
            if key.value == "embedding_model":
                key.value = "network"
            pairs.append((key, node))
    own = io.StringIO()
    ruamel.yaml.YAML(pure=True).serialize(
        MappingNode("tag:yaml.org,2002:map", pairs), own
    )
    values = settings.values
    rest = YAML.format(
        n_speakers=len(identifier.speakers),
        size=identifier.backend.size,
        silence=identifier.silence,
        n_mels=values["n_mels"],
        scored_by="\n".join(
            f"{key}: {json.dumps(values[key])}" for key in SCORED_BY.values()
        ),
    )
    return resolve_references(own.getvalue() + rest).getvalue()


def _held_out(run: Path, settings: Settings) -> list[np.ndarray]:
    """Log-mels of held-out utterances, if they are at hand."""
    path, data = run / "manifests/valid.json", settings.values["data_folder"]
    if not (data and path.exists()):
        return []
    entries, bands = list(read_json(path).items()), settings.values["n_mels"]
    try:
        return [
            load_feature_file(data, name, bands, entry["length"])
            for name, entry in entries[:: 1 + len(entries) // MOST]
        ]
    except UserError:  # the data have moved
        return []


def _cosine(run: Path, backend: Backend) -> str:
    """Cosine that 1 % of held-out pairs of different speakers exceed; "" if
    there are too few."""
    if not (run / "evaluation.npz").exists():
        return ""
    found = Evaluation.load(run / "evaluation.npz")
    rows = np.flatnonzero(~np.isin(found.part, ("test", "train")))
    rows = rows[:: 1 + len(rows) // PAIRS]
    vectors = backend.project(np.asarray(found.embedding[rows], np.float32))
    target = found.target[rows]
    different = (vectors @ vectors.T)[target[:, None] != target]
    return f"{np.quantile(different, 0.99):.2f}" if len(different) > 999 else ""


def _card(identifier, settings: Settings, run: Path, folder: Path) -> str:
    """The model card."""
    results, report = (
        read_json(path) if path.exists() else {}
        for path in (run / "results.json", folder / "model.onnx.json")
    )
    accuracies = []
    for key, words in RATED.items():
        found = results.get(key) or {}
        if found.get("accuracy") is not None:
            figure = f"{found['accuracy']:.1%}"
            if "low" in found:
                figure += f" ({found['low']:.1%} to {found['high']:.1%})"
            accuracies.append((words, figure))
    template = Path(__file__).with_name("card.md.j2")
    return jinja2.Template(
        template.read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    ).render(
        speakers=len(identifier.speakers),
        system=results.get("system", "unknown"),
        parameters=f"{sum(p.numel() for p in identifier.parameters()):,}",
        data=Path(settings.values["data_folder"] or "the mini corpus").name,
        epochs=results.get("epochs", settings.values["number_of_epochs"]),
        **{key: settings.values[key] for key in ("seed", "split")},
        accuracies=accuracies or [("not measured", "")],
        silence=identifier.silence,
        cosine=_cosine(run, identifier.backend),
        onnx=report,
    )


def main(arguments: list[str]) -> None:
    """Exports a run, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="spkid export", description="Exports a run for SpeechBrain & ONNX."
    )
    parser.add_argument("model", help="a run's output folder")
    parser.add_argument("folder", help="a new folder, or an earlier export")
    parser.add_argument(
        "--onnx_input",
        choices=SOURCES,
        default=SOURCES[0],
        help="what model.onnx takes (%(default)s)",
    )
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="also write model.int8.onnx, with weights of 8 bits",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let the run name classes of others, whose code then runs",
    )
    args = parser.parse_args(arguments)
    names = export(
        args.model, args.folder, args.onnx_input, args.quantized, args.trust
    )
    print(f"{args.folder}: {', '.join(names)}")
    if "model.onnx" not in names:
        print("No ONNX file; for one, pip install onnx onnxscript onnxruntime.")
