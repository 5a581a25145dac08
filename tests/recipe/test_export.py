"""A trained run, exported by the command, from its features to its answers."""

import csv
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import soundfile
from exports import voice
from harness import ENVIRONMENT, ROOT

from spkid.data import load_feature_file
from spkid.inference import load

pytestmark = pytest.mark.slow
SPEECHBRAIN = """
import sys
from speechbrain.inference.classifiers import EncoderClassifier
model = EncoderClassifier.from_hparams("exported", savedir="cache")
print(model.classify_file(sys.argv[1])[3][0])
"""


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    arguments = [finished[0], "exported", "--onnx_input", "features"]
    python(folder, "-m", "spkid", "export", *arguments)
    return folder


def python(folder, *arguments):
    """What Python prints, with the package and nothing else of this project."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=False,
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_onnx_answers_the_test_as_training_did(data, finished, place):
    session = onnxruntime.InferenceSession(place / "exported" / "model.onnx")
    held = session.get_modelmeta().custom_metadata_map
    names = json.loads(held["speakers"])
    test = json.loads((data / "testdata.json").read_text())
    with open(finished[0] / "submission.csv", newline="") as file:
        guesses = {row["Id"]: row["Category"] for row in csv.DictReader(file)}
    assert len(guesses) == len(test["utterances"]) > 0
    for one in test["utterances"]:
        path, length = one["feature_path"], one["mel_len"]
        features = load_feature_file(data, path, test["n_mels"], length)
        feed = {"features": features[None], "frames": np.array([length])}
        posteriors = session.run(["log_posteriors"], feed)[0][0]
        assert names[posteriors.argmax()] == guesses[path]


def test_speechbrain_answers_as_the_export_does(place):
    soundfile.write(place / "a.wav", 0.3 * voice(110, 0, 2.0), 16000)
    answer = load(place / "exported").identify(place / "a.wav")
    theirs = python(place, "-c", SPEECHBRAIN, "a.wav").split()
    assert theirs[-1] == answer.likeliest[0][0]
