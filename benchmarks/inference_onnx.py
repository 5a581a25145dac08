"""Speed of an exported system in ONNX Runtime and PyTorch, side by side.

From speech at 16 kHz to log-posteriors, with one thread. The systems take
turns, so that what else the machine does slows all of them. Of an export with
--onnx_input features, the answers are compared instead: 1 to 7,193 frames, the
longest utterance of the HW4 data, in padded batches of 1 to 8.

    python benchmarks/inference_onnx.py EXPORT [--repeats 7]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from spkid.backend import unit
from spkid.inference import SpeakerIdentifier
from spkid.models.masks import relative_lengths

BATCHES = {"1 x 5 s": (1, 80000), "8 x 10 s": (8, 160000)}
FRAMES = [
    [1],
    [2],
    [100],
    [1000],
    [7193],
    [1, 33, 100, 512, 700, 999, 3000, 7193],
]


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def compare(identifier, one):
    """Largest differences from PyTorch, over ``FRAMES``."""
    worst = {"embeddings of length 1": 0.0, "log_posteriors": 0.0}
    for counts in FRAMES:
        x = torch.randn(len(counts), max(counts), 40)
        lengths = torch.tensor(counts)
        with torch.inference_mode():
            own = identifier.embed(x, relative_lengths(lengths, max(counts)))
            told = identifier.posteriors(own.squeeze(1)).numpy()
        given = {"features": x.numpy(), "frames": lengths.numpy()}
        found, posteriors = one.run(None, given)
        pairs = (unit(found), unit(own.squeeze(1).numpy())), (posteriors, told)
        for name, (a, b) in zip(worst, pairs, strict=True):
            worst[name] = max(worst[name], float(np.abs(a - b).max()))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    identifier = SpeakerIdentifier.from_export(args.folder)
    found = {
        path.name: {"MB": round(path.stat().st_size / 1e6, 2)}
        for path in sorted(args.folder.glob("*.onnx"))
    }
    sessions = {name: session(args.folder / name) for name in found}
    inputs = {one.get_inputs()[0].name for one in sessions.values()}
    if "features" in inputs:
        print(json.dumps(compare(identifier, sessions["model.onnx"])))
        return
    found["torch"] = {}
    for words, shape in BATCHES.items():
        waves = np.random.default_rng(0).normal(0, 0.1, shape)
        waves = waves.astype(np.float32)
        seconds = {name: [] for name in found}
        for _ in range(1 + args.repeats):  # the first one warms up
            for name, one in sessions.items():
                given = (waves, np.full(shape[0], shape[1]))
                names = [i.name for i in one.get_inputs()]
                start = time.perf_counter()
                one.run(None, dict(zip(names, given, strict=False)))
                seconds[name].append(time.perf_counter() - start)
            with torch.inference_mode():
                start = time.perf_counter()
                mels = identifier.log_mel(torch.from_numpy(waves))
                identifier.classify(mels)
                seconds["torch"].append(time.perf_counter() - start)
        for name, one in seconds.items():
            found[name][words] = round(float(np.median(one[1:])), 4)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
