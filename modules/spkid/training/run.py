"""A run's folder: what the run was started with, and what it leaves."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from speechbrain.core import RunOptions

from spkid.data import Corpus
from spkid.distributed import rank, world_size
from spkid.errors import UserError
from spkid.evaluation import PARTS, Evaluation, Expectation, by_part, expect
from spkid.files import lock_folder, read_json, save_atomically
from spkid.hparams import Settings
from spkid.sessions import sessions_digest

IDENTITY, SETTINGS = "run.json", "hyperparams.yaml"


class RunFolder:
    """The output folder of a run, reserved for this process.

    Arguments
    ---------
    settings : Settings
        Of the run.
    options : speechbrain.core.RunOptions
        SpeechBrain's.
    corpus : Corpus
        The data.

    Raises
    ------
    UserError
        If another process uses the folder, or a run that was started there
        has other settings or data.
    """

    def __init__(
        self, settings: Settings, options: RunOptions, corpus: Corpus
    ) -> None:
        self.path = Path(settings.values["output_folder"])
        self.settings = settings
        self._lock = lock_folder(self.path) if rank() == 0 else None
        self.identity = run_identity(settings, options, corpus)
        saved = Path(settings.values["save_folder"])
        # Where nothing was saved, nothing was started.
        started = any(saved.glob("CKPT*")) or (self.path / "model").exists()
        if (self.path / IDENTITY).exists() and started:
            theirs = read_json(self.path / IDENTITY)
            check_identity(self.path / IDENTITY, theirs, self.identity)

    def save_settings(self) -> None:
        """Writes hyperparams.yaml: the settings with all overrides."""
        save_atomically(
            f"# Generated {date.today()} from:\n"
            f"# {self.settings.path.resolve()}\n"
            f"# yamllint disable\n{self.settings.text}",
            self.path / SETTINGS,
        )

    def save_identity(self) -> None:
        """Writes run.json: what the run can't change from now on."""
        text = json.dumps(self.identity, indent=1)
        save_atomically(text, self.path / IDENTITY)

    def write_results(
        self,
        results: dict[str, Any],
        validated: Evaluation,
        tested: Evaluation,
    ) -> None:
        """Writes evaluation.npz, results.json and report.html, and says so.

        Arguments
        ---------
        results : dict
            What is known of the run beside its settings and accuracies.
        validated, tested : Evaluation
            What the tested weights say of the held-out and the test utterances.
        """
        values, expected = self.settings.values, expect(validated, tested)
        results = {
            **by_part(validated.summary()),
            "test": {"accuracy": tested.accuracy(), "loss": tested.mean_loss()},
            "system": self.settings.path.stem,
            **{key: values[key] for key in ("data_folder", "split", "seed")},
            "scored_by": self.settings.scoring(),
            **results,
        }
        if expected:
            results["expected"] = expected._asdict()
        both = Evaluation.concatenate([validated, tested], tested.speakers)
        both.save(self.path / "evaluation.npz")
        save_atomically(
            json.dumps(results, indent=1), self.path / "results.json"
        )
        # Matplotlib is slow to import, and needed here alone.
        from spkid.evaluation.report import write_report

        page, figures = write_report(self.path), []
        for name, part in PARTS.items():
            accuracy = both.of_part(name).accuracy(by_speaker=name != "test")
            if accuracy is not None:
                figures.append(f"{accuracy:.4f} on {part.name}")
            elif name == "test":
                figures.append(f"unknown on {part.name}")
        print(
            f"Accuracy: {', '.join(figures)}\n{expectation_line(expected)}"
            f"{page}: the run on one page\n"
            f"{self.path / 'results.json'}: these figures",
            flush=True,
        )


def run_identity(
    settings: Settings, options: RunOptions, corpus: Corpus
) -> dict[str, Any]:
    """What a run may not change when it resumes; see :class:`RunFolder`."""
    values = settings.fixed(options.test_only)
    for key in ("precision", "grad_accumulation_factor", "max_grad_norm"):
        # The command line goes before the YAML file.
        if key in options.overridden_args or key not in values:
            values[key] = getattr(options, key)
    return {
        "data": corpus.digest(),
        "data_folder": str(corpus.folder),
        "written_sessions": sessions_digest(corpus, settings.values),
        "processes": world_size(),
        **values,
    }


def check_identity(path: Path, theirs: dict, ours: dict) -> None:
    """Raises UserError if a run would resume with other settings or data.

    Arguments
    ---------
    path : pathlib.Path
        The file to blame.
    theirs, ours : dict
        What the run was started with, and would resume with. A value that
        begins with "yaml " is a digest; ``data`` is the digest of what was in
        ``data_folder``, which may have moved.

    Example
    -------
    >>> check_identity(Path("run.json"), {"seed": 1}, {"seed": 1})
    """
    for key, value in ours.items():
        if key == "data_folder" or theirs.get(key) == value:
            continue
        started, fix = f"{key}={theirs.get(key)}, not {value}", ""
        if key == "data":
            started = f"other data, from {theirs.get('data_folder')}"
        elif str(value).startswith("yaml "):
            started = f"another '{key}' in its YAML file"
        else:
            fix = f"resume with {theirs.get(key)}, or "
        raise UserError(
            f"{path}: this run was started with {started}; {fix}give another "
            "--output_folder to start a new one."
        )


def expectation_line(expected: Expectation | None) -> str:
    """A line with the estimated test accuracy; empty without an estimate."""
    if expected is None:
        return ""
    return (
        "Estimated test accuracy (from confidence): {:.4f} "
        "({:.4f} to {:.4f})\n".format(*expected)
    )
