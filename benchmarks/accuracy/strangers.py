"""Strangers and enrolment, on speakers that a run has never heard.

Usage: python benchmarks/accuracy/strangers.py RUN DATA_FOLDER
           [--pack_folder DIR] [--trained RUN]

RUN is the output folder of a run that was trained on some of the speakers of
DATA_FOLDER (which needs testlabels.json); the others are strangers. Measured:
  promise   how many strangers pass for somebody where --fpir promises 1 and
            5 %, and how many known speakers' test utterances are named then
            (detection and identification rate); beside a threshold on the
            plain cosine with the classifier's weights, which is chosen on the
            same held-out utterances, with their own speaker left out
  enrolment accuracy on 20 strangers who are enrolled from 1, 3 and 5 labelled
            utterances, beside all known speakers; the test utterances are
            asked, or with --trained, a run that was trained on them, all that
            it hasn't heard, and its accuracy on these stands beside
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2] / "recipes" / "ML2022hw4")
)
from ml2022hw4_prepare import prepare
from spkid.backend import Backend
from spkid.errors import UserError, run_command
from spkid.evaluation import Evaluation
from spkid.inference import SpeakerIdentifier

RATES = (0.01, 0.05)
ENROLLED, DRAWS = 20, 5


class Heard:
    """All utterances of a data folder, embedded by a run."""

    def __init__(self, run: Path, data: Path, pack_folder: Path | None):
        self.identifier = SpeakerIdentifier.from_run(run)
        if self.identifier.backend_classifier is None:
            raise UserError(
                f"{run}: has no back-end; give train.py's "
                "--test_only, which fits one."
            )
        corpus, features = prepare(data, pack_folder=pack_folder)
        rows = [features.row[u.path] for u in corpus.utterances]
        counts = [u.length for u in corpus.utterances]
        self.embedding = self.identifier.embed_parts(
            features, rows, [0] * len(rows), counts
        ).numpy()
        self.path = np.array([u.path for u in corpus.utterances])
        self.speaker = np.array([str(u.speaker) for u in corpus.utterances])
        self.is_test = np.arange(len(rows)) >= len(corpus.labelled)
        self.is_known = np.isin(self.speaker, self.identifier.speakers)
        self.held_out = Evaluation.load(run / "evaluation.npz").of_part("new")


def promise(heard: Heard) -> dict[str, list[float]]:
    """Rates at each of ``RATES``, by the back-end and by plain cosines."""
    backend, held = heard.identifier.backend, heard.held_out
    index = {name: i for i, name in enumerate(backend.speakers)}
    known = heard.is_test & heard.is_known
    probes = heard.embedding[known], heard.embedding[~heard.is_known]
    target = np.array([index[name] for name in heard.speaker[known]])
    plain = Backend.of_means(
        heard.identifier.classifier.weight.detach().numpy(), backend.speakers
    )
    left_out = plain.cosines(held.embedding.astype(np.float32))
    np.put_along_axis(left_out, held.target[:, None], -1.0, axis=1)
    found: dict[str, list[float]] = {}
    for name, scores, thresholds in (
        ("back-end", backend.scores, [backend.threshold(r) for r in RATES]),
        (
            "cosine",
            plain.cosines,
            np.quantile(left_out.max(1), [1 - r for r in RATES]),
        ),
    ):
        own, strange = (scores(embeddings) for embeddings in probes)
        right = own.argmax(1) == target
        for threshold in thresholds:
            passed = float((strange.max(1) >= threshold).mean())
            named = float(((own.max(1) >= threshold) & right).mean())
            found.setdefault(f"{name} FPIR", []).append(passed)
            found.setdefault(f"{name} DIR", []).append(named)
    return found


def enrolment(heard: Heard, trained: Path | None) -> dict[str, float]:
    """Accuracy on strangers who are enrolled beside all known speakers."""
    backend, asked = heard.identifier.backend, heard.is_test
    if trained is not None:
        table = Evaluation.load(trained / "evaluation.npz")
        asked = np.isin(heard.path, table.id)
    strange = ~heard.is_known
    names = [
        name
        for name in sorted(set(heard.speaker[strange & asked]))
        if (heard.speaker[~asked & ~heard.is_test] == name).sum() >= 5
    ][:ENROLLED]
    probes = np.isin(heard.speaker, names) & asked
    found = {"enrolled": float(len(names)), "asked": float(probes.sum())}
    rng = np.random.default_rng(0)
    for count in (1, 3, 5):
        right = []
        for _ in range(DRAWS):
            gallery = backend
            for name in names:
                own = ~asked & ~heard.is_test & (heard.speaker == name)
                chosen = rng.choice(np.flatnonzero(own), count, replace=False)
                gallery = gallery.enroll(name, heard.embedding[chosen])
            guess = gallery.cosines(heard.embedding[probes]).argmax(1)
            said = np.array(gallery.speakers)[guess]
            right.append(float((said == heard.speaker[probes]).mean()))
        found[f"from {count}"] = float(np.mean(right))
    if trained is not None:
        found["trained"] = float(
            table.right[np.isin(table.id, heard.path[probes])].mean()
        )
    return found


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pack_folder", type=Path)
    parser.add_argument("--trained", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    heard = Heard(args.run, args.data, args.pack_folder)
    rates = promise(heard)
    print(f"{'promised':22}" + "".join(f"{rate:>8.0%}" for rate in RATES))
    for name, values in rates.items():
        print(f"{name:22}" + "".join(f"{value:>8.1%}" for value in values))
    accuracies = enrolment(heard, args.trained)
    for name, value in accuracies.items():
        print(f"{name:22}{value:>8.3g}")
    print(json.dumps({"run": str(args.run), **rates, **accuracies}))


if __name__ == "__main__":
    run_command(main)
