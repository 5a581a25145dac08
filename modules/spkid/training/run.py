"""A run's folder: what the run was started with, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

from speechbrain.core import RunOptions

from spkid.data import Corpus, FeatureFiles, PackedFeatures
from spkid.distributed import gather, on_first, rank, together, world_size
from spkid.errors import UserError, cure_of
from spkid.evaluation import PARTS, Evaluation, Expectation, by_part, expect
from spkid.files import lock_folder, read_json, save_atomically
from spkid.hparams import Settings
from spkid.inference import SpeakerIdentifier
from spkid.sessions import sessions_digest
from spkid.training.checkpoints import AtomicCheckpointer, damaged_file
from spkid.training.init_from import TrainedModel, check_init_from
from spkid.training.loggers import check_tensorboard

IDENTITY, SETTINGS = "run.json", "hyperparams.yaml"
INITIAL = "init_from_sha256"  # of the weights that a run started from
# What a run writes into its folders. Where one of these stands without a mark
# of a run beside it or in the folder above, it is the user's own.
MARKS = (IDENTITY, SETTINGS, "split.json")
WRITTEN = {
    "output_folder": (
        *("results.json", "submission.csv", "evaluation.npz", "report.html"),
        *("speakers.txt", "skipped.txt", "log.txt", "env.log", "train.py"),
        "model",
    ),
    "manifest_folder": (
        *("train.json", "valid.json", "test.json", "split_report.json"),
    ),
    "save_folder": (),
    "train_log": (),
}


class RunFolder:
    """The folders of a run, reserved for this process.

    Arguments
    ---------
    settings : Settings
        Of the run.
    options : speechbrain.core.RunOptions
        SpeechBrain's.
    corpus : Corpus
        The data.
    features : PackedFeatures or FeatureFiles
        Their features.

    Raises
    ------
    UserError
        If another process uses one of the folders, or files are there that
        no run has written, or a run that was started there has other settings
        or data.
    """

    def __init__(
        self,
        settings: Settings,
        options: RunOptions,
        corpus: Corpus,
        features: PackedFeatures | FeatureFiles,
    ) -> None:
        self.path = Path(settings.values["output_folder"])
        self.saved = Path(settings.values["save_folder"])
        self.settings = settings
        self._locks = on_first(self._reserve)
        self.identity = run_identity(settings, options, corpus, features)
        on_first(self._check)

    def _reserve(self):
        """Locks all that the run writes to, before it writes anything."""
        folders: dict[str, tuple[Path, str]] = {}
        for key in WRITTEN:
            folder = Path(self.settings.values[key])
            if key == "train_log":
                folder = folder.parent
            check_foreign(folder, key)
            folders.setdefault(os.path.realpath(folder), (folder, key))
        return [lock_folder(*place) for place in folders.values()]

    def _check(self):
        """Where nothing was saved, nothing was started."""
        if any(self.saved.glob("CKPT*")):
            identity = self.saved / IDENTITY
            if not identity.exists():
                raise UserError(
                    f"{identity}: is missing, and says of what the checkpoints "
                    "there are; restore it, or give another --save_folder."
                )
            self._compare(identity)
        if (self.path / "model").exists() and (self.path / IDENTITY).exists():
            self._compare(self.path / IDENTITY)

    def _compare(self, identity):
        """With that of the start, which alone has read ``init_from``."""
        started = read_json(identity)
        check_identity(identity, started, self.identity)
        if INITIAL in started:
            self.identity[INITIAL] = started[INITIAL]

    def begin(
        self, identifier: SpeakerIdentifier, checkpointer: AtomicCheckpointer
    ) -> None:
        """Takes over the weights of ``init_from``, unless the run resumes.

        Raises
        ------
        UserError
            If they can't be read, or are those of another model.
        """
        source = self.settings.values["init_from"]
        if source is None:
            return
        with together():
            found = checkpointer.list_checkpoints()
            if any(gather([damaged_file(c.path) is None for c in found])[0]):
                return
            trained, speakers = TrainedModel.read(source), identifier.speakers
            trained.fill(identifier.embedding_model, self.settings)
            classes = trained.fill_classes(
                identifier.classifier, speakers, self.settings
            )
            self.identity[INITIAL] = trained.digest()
        on_first(
            print,
            f"Starts from {trained.path}: the embedding model, and the classes "
            f"of {classes} of {len(speakers)} speakers",
        )

    def save_settings(self) -> None:
        """Writes hyperparams.yaml: the settings with all overrides."""
        save_atomically(
            f"# Generated {date.today()} from:\n"
            f"# {self.settings.path.resolve()}\n"
            f"# yamllint disable\n{self.settings.text}",
            self.path / SETTINGS,
        )

    def save_identity(self) -> None:
        """Writes run.json, beside the checkpoints, too: what the run can't
        change from now on."""
        text = json.dumps(self.identity, indent=1)
        for folder in (self.saved, self.path):
            save_atomically(text, folder / IDENTITY)

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
            "init_from": values["init_from"],
            INITIAL: self.identity.get(INITIAL),
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
            elif name == "test" and len(tested):
                figures.append(f"unknown on {part.name}")
        print(
            f"Accuracy: {', '.join(figures)}\n{expectation_line(expected)}"
            f"{page}: the run on one page\n"
            f"{self.path / 'results.json'}: these figures",
            flush=True,
        )


def check_start(settings: Settings, options: RunOptions) -> None:
    """Raises UserError, before any data are read, for a test without a
    checkpoint, for TensorBoard where it isn't installed, for a log in the
    place of something else, and for a new run's ``init_from``."""
    log = Path(settings.values["train_log"])
    output = os.path.realpath(settings.values["output_folder"])
    names = {*WRITTEN["output_folder"], *MARKS, "lock", "history.json"}
    inside = os.path.realpath(log.parent) == output
    if log.is_dir() or (inside and log.name in names):
        raise UserError(
            f"--train_log {log}: is something else of this run, or a folder; "
            "name another file."
        )
    if options.test_only and options.debug:
        raise UserError("--debug and --test_only exclude each other; give one.")
    if settings.values["use_tensorboard"]:
        check_tensorboard()
    saved = Path(settings.values["save_folder"])
    if any(saved.glob("CKPT*")):
        return
    if options.test_only:
        raise UserError(
            f"{saved}: there is no checkpoint to test; train first, or name "
            "the run's --output_folder."
        )
    check_init_from(settings)


def check_foreign(folder: Path, key: str) -> None:
    """Raises UserError where a run would write over files of the user's own.

    Arguments
    ---------
    folder : pathlib.Path
        That the run will write to.
    key : str
        Which of its folders it is; see ``WRITTEN``.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> check_foreign(folder, "manifest_folder")
    """
    places = folder, folder.parent  # the latter of manifests/ and final/
    if any((place / mark).exists() for place in places for mark in MARKS):
        return
    for name in WRITTEN[key]:
        if os.path.lexists(folder / name):
            raise UserError(
                f"{folder / name}: is there already, and no run has written "
                f"it; move it away, or give another --{key}."
            )


def run_identity(
    settings: Settings,
    options: RunOptions,
    corpus: Corpus,
    features: PackedFeatures | FeatureFiles,
) -> dict[str, Any]:
    """What a run may not change when it resumes; see :class:`RunFolder`."""
    values = settings.fixed(options.test_only)
    for key in (
        *("precision", "grad_accumulation_factor", "max_grad_norm"),
        "remove_vector_weight_decay",
    ):
        # The command line goes before the YAML file.
        if key in options.overridden_args or key not in values:
            values[key] = getattr(options, key)
    return {
        "data": corpus.digest(),
        "data_folder": str(corpus.folder),
        "written_sessions": sessions_digest(corpus, settings.values),
        "processes": world_size(),
        **values,
        "features": features.digest(),  # last: they may follow from values
    }


def check_identity(path: Path, theirs: dict, ours: dict) -> None:
    """Raises UserError if a run would resume with other settings or data.

    Arguments
    ---------
    path : pathlib.Path
        The file to blame.
    theirs, ours : dict
        What the run was started with, and would resume with. A value that
        begins with "yaml " is a digest; ``data`` and ``features`` are the
        digests of what was in ``data_folder``, which may have moved.

    Example
    -------
    >>> check_identity(Path("run.json"), {"seed": 1}, {"seed": 1})
    """
    for key, value in ours.items():
        if key == "data_folder" or theirs.get(key) == value:
            continue
        started, fix = f"{key}={theirs.get(key)}, not {value}", ""
        if key in ("data", "features"):
            started = f"other {key}, from {theirs.get('data_folder')}"
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


@contextmanager
def readable_log_errors(folder: Path) -> Iterator[None]:
    """Around SpeechBrain's create_experiment_directory, which hides why it
    couldn't write, and leaves a hook that logs each exception twice.

    Example
    -------
    >>> with readable_log_errors(Path("results")):
    ...     "here SpeechBrain makes the folder"
    'here SpeechBrain makes the folder'
    """
    try:
        yield
    except (OSError, ValueError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{cause.filename or folder}: the log can't be written "
            f"({cause.strerror or cause}); {cure_of(cause)}, and give the same "
            "command again."
        ) from None
    finally:
        sys.excepthook = sys.__excepthook__


@contextmanager
def debug_settings(settings: Settings) -> Iterator[Settings]:
    """Settings of a debug run, which works in a new folder inside the output
    folder; it is deleted at the end."""
    output = Path(settings.values["output_folder"])
    made, own = not output.exists(), ""

    def make():
        output.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="debug-", dir=output)

    try:
        own = on_first(make) or ""
        place = output / Path(gather(own)[0]).name
        yield settings.replace(
            output_folder=str(place),
            save_folder=str(place / "save"),
            manifest_folder=str(place / "manifests"),
            train_log=str(place / "train_log.txt"),
        )
    finally:
        if own:
            shutil.rmtree(own, ignore_errors=True)
        if made and rank() == 0:
            with suppress(OSError):  # packs are kept
                output.rmdir()
