"""From mapping.json, metadata.json and testdata.json to manifests and a pack.

Usage: python prepare.py DATA_FOLDER      (checks a data folder, packs it)

``train.py`` does the same by itself before it trains.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

import mini_corpus
from spkid.checkpoints import save_atomically
from spkid.errors import UserError, run_command
from spkid.hparams import plain_values
from spkid.packed import FeatureFiles, PackedFeatures
from spkid.scoring import Score

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_DATA = ROOT / "data"


@dataclass
class Utterance:
    """One feature file: its path in the data folder, its frames, its name."""

    path: str
    length: int
    speaker: str | None = None


@dataclass
class Corpus:
    """What the JSON files of a data folder say, checked."""

    folder: Path
    n_mels: int
    speakers: list[str]  # by class index
    labelled: list[Utterance] = field(default_factory=list)
    test: list[Utterance] = field(default_factory=list)
    has_test_labels: bool = False

    def digest(self) -> str:
        """32 hexadecimal digits that say which data these are."""
        content = [self.n_mels, self.speakers]
        content += [manifest(part) for part in (self.labelled, self.test)]
        text = json.dumps(content).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object without duplicate keys.

    Arguments
    ---------
    path : pathlib.Path
        The file.

    Returns
    -------
    dict

    Raises
    ------
    UserError
        If it is missing, isn't JSON, isn't an object or repeats a key.
    """

    def no_duplicates(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path}: key '{twice}' stands there twice.")
        return found

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=no_duplicates)
    except FileNotFoundError:
        raise UserError(
            f"{path}: the file is missing; --data_folder must name the folder "
            "with mapping.json, metadata.json and testdata.json."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, no object.")
    return content


def _get(content, key, kind, path):
    if key not in content:
        raise UserError(f"{path}: key '{key}' is missing.")
    value = content[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(
            f"{path}: key '{key}' is a {type(value).__name__}, "
            f"not a {kind.__name__}."
        )
    return value


def _utterance(entry, speaker, where):
    """One entry of a list of utterances, checked."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {str(entry)[:60]!r} is no object.")
    name = _get(entry, "feature_path", str, where)
    length = _get(entry, "mel_len", int, where)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name[0] in "/\\" or ".." in parts or ":" in parts[0]:
        raise UserError(
            f"{where}: feature_path {name!r} leaves the data folder; "
            "give a path inside it."
        )
    if not 0 < length < 10_000_000:
        raise UserError(
            f"{where}: mel_len of {name!r} is {length}; give its frames."
        )
    return Utterance(name, length, speaker)


def _read_speakers(path):
    """Speakers by class index: mapping.json alone decides."""
    mapping = read_json(path)
    indices = _get(mapping, "speaker2id", dict, path)
    if not indices:
        raise UserError(f"{path}: key 'speaker2id' is empty.")
    speakers = sorted(indices, key=lambda name: str(indices[name]).zfill(12))
    if [indices[name] for name in speakers] != list(range(len(indices))):
        raise UserError(
            f"{path}: the values of 'speaker2id' must be the whole numbers "
            f"from 0 to {len(indices) - 1}, each once."
        )
    names = _get(mapping, "id2speaker", dict, path)
    if names != {str(i): name for i, name in enumerate(speakers)}:
        raise UserError(
            f"{path}: 'id2speaker' is not the inverse of 'speaker2id'."
        )
    return speakers


def read_corpus(folder: str | Path) -> Corpus:
    """Reads and checks the JSON files of a data folder.

    Arguments
    ---------
    folder : str or pathlib.Path
        Holds mapping.json, metadata.json and testdata.json, and
        testlabels.json (feature path to speaker) where the test's labels are
        known.

    Returns
    -------
    Corpus

    Raises
    ------
    UserError
        For the first thing that is wrong, naming its file and key.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; --data_folder must name the "
            "folder with mapping.json, metadata.json and testdata.json."
        )
    speakers = _read_speakers(folder / "mapping.json")
    path = folder / "metadata.json"
    metadata = read_json(path)
    corpus = Corpus(folder, _get(metadata, "n_mels", int, path), speakers)
    listed = _get(metadata, "speakers", dict, path)
    for speaker in listed:
        if speaker not in set(speakers):
            raise UserError(
                f"{path}: speaker {speaker!r} is missing from mapping.json's "
                "'speaker2id'; add it there, or remove it here."
            )
        for entry in _get(listed, speaker, list, path):
            corpus.labelled.append(
                _utterance(entry, speaker, f"{path}, {speaker}")
            )
    missing = [s for s in speakers if not listed.get(s)]
    if missing:
        raise UserError(
            f"{path}: speaker {missing[0]!r} of mapping.json has no utterance "
            f"({len(missing)} such); add some, or remove it from mapping.json."
        )
    path = folder / "testdata.json"
    testdata = read_json(path)
    if _get(testdata, "n_mels", int, path) != corpus.n_mels:
        raise UserError(f"{path}: n_mels isn't metadata.json's.")
    labels_path = folder / "testlabels.json"
    labels = read_json(labels_path) if labels_path.exists() else None
    for entry in _get(testdata, "utterances", list, path):
        utterance = _utterance(entry, None, path)
        if labels is not None:
            utterance.speaker = _get(labels, utterance.path, str, labels_path)
            if utterance.speaker not in set(speakers):
                raise UserError(
                    f"{labels_path}: speaker {utterance.speaker!r} is missing "
                    "from mapping.json."
                )
        corpus.test.append(utterance)
    corpus.has_test_labels = labels is not None
    _check_files(corpus)
    return corpus


def _check_files(corpus):
    """Each path once; each file there, inside the folder, links included."""
    seen = set()
    root = os.path.realpath(corpus.folder)
    parents = {}
    for utterance in corpus.labelled + corpus.test:
        if utterance.path in seen:
            raise UserError(
                f"{corpus.folder}: feature_path {utterance.path!r} is listed "
                "twice in metadata.json and testdata.json; keep one."
            )
        seen.add(utterance.path)
        file = os.path.join(root, utterance.path)
        parent = os.path.dirname(file)
        if parent not in parents:
            place = os.path.realpath(parent)
            parents[parent] = place, os.path.commonpath((root, place)) != root
        place, outside = parents[parent]
        real = os.path.join(place, os.path.basename(file))
        if os.path.islink(real):
            real = os.path.realpath(real)
            outside = os.path.commonpath((root, real)) != root
        if outside:
            raise UserError(
                f"{file}: is a link that leaves the data folder; copy the "
                "file into it."
            )
        if not os.path.isfile(real):
            raise UserError(
                f"{file}: the feature file is missing, though the JSON lists "
                "it; download the data again, or remove the entry."
            )


def split_random(
    utterances: list[Utterance], valid_fraction: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Holds out utterances at random, the same share of each speaker's.

    Arguments
    ---------
    utterances : list of Utterance
        All labelled ones.
    valid_fraction : float
        Share to hold out, in (0, 1); at least one utterance of a speaker
        with two or more, none of a speaker with one.
    seed : int
        Of the draw.

    Returns
    -------
    tuple of list
        Training and validation utterances.
    """
    by_speaker = {}
    for utterance in utterances:
        by_speaker.setdefault(utterance.speaker, []).append(utterance)
    generator = np.random.default_rng(seed)
    held_out = set()
    for speaker in sorted(by_speaker):
        own = by_speaker[speaker]
        count = min(max(1, round(valid_fraction * len(own))), len(own) - 1)
        held_out.update(
            own[i].path for i in generator.permutation(len(own))[:count]
        )
    train = [u for u in utterances if u.path not in held_out]
    valid = [u for u in utterances if u.path in held_out]
    return train, valid


SPLITS = {"random": split_random}


def pack_corpus(
    corpus: Corpus,
    pack_folder: str | Path | None = None,
    pack: bool = True,
    pack_dtype: str = "float16",
) -> PackedFeatures | FeatureFiles:
    """Opens the pack of a corpus; builds it where it is missing or old.

    Arguments
    ---------
    corpus : Corpus
        The data; every file is checked while it is packed.
    pack_folder : str or pathlib.Path, optional
        Where the packs are kept; None: data/packs of this project.
    pack : bool
        False: no pack is written, the files themselves are read each time.
    pack_dtype : str
        "float16" or "float32".

    Returns
    -------
    PackedFeatures or FeatureFiles
    """
    utterances = corpus.labelled + corpus.test
    paths = [u.path for u in utterances]
    lengths = [u.length for u in utterances]
    if not pack:
        return FeatureFiles(corpus.folder, paths, lengths, corpus.n_mels)
    place = os.path.realpath(corpus.folder)
    name = hashlib.blake2b(place.encode(), digest_size=4).hexdigest()
    packs = Path(pack_folder) if pack_folder else DEFAULT_DATA / "packs"
    return PackedFeatures.build(
        packs / f"{os.path.basename(place)}-{name}",
        corpus.folder,
        paths,
        lengths,
        corpus.n_mels,
        pack_dtype,
    )


def manifest(utterances: list[Utterance]) -> dict[str, dict]:
    """Utterances in SpeechBrain's form.

    Arguments
    ---------
    utterances : list of Utterance
        In the order to keep.

    Returns
    -------
    dict
        Feature path to ``length`` (frames) and ``spk_id`` (a name, or None).
    """
    return {
        u.path: {"length": u.length, "spk_id": u.speaker} for u in utterances
    }


def write_manifests(
    corpus: Corpus,
    folder: str | Path,
    split: str,
    valid_fraction: float,
    seed: int,
) -> None:
    """Writes train.json, valid.json and test.json in SpeechBrain's form.

    A split that is there already, made of the same files by the same
    choices, is left as it is.

    Arguments
    ---------
    corpus : Corpus
        The data.
    folder : str or pathlib.Path
        Where to.
    split : str
        A key of ``SPLITS``.
    valid_fraction : float
        Share of the labelled utterances to validate on.
    seed : int
        Of the split.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is none of {', '.join(SPLITS)}.")
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction} isn't in (0, 1).")
    folder = Path(folder)
    choices = {
        "data": corpus.digest(),
        "split": split,
        "valid_fraction": valid_fraction,
        "seed": seed,
    }
    done = folder / "split.json"
    if done.exists() and read_json(done) == choices:
        return
    train, valid = SPLITS[split](corpus.labelled, valid_fraction, seed)
    if not valid:
        raise UserError(
            f"{corpus.folder / 'metadata.json'}: no speaker has two "
            "utterances, so nothing can be held out for validation; add some."
        )
    parts = {"train": train, "valid": valid, "test": corpus.test}
    for name, part in parts.items():
        text = json.dumps(manifest(part), indent=1)
        save_atomically(text, folder / f"{name}.json")
    save_atomically(json.dumps(choices, indent=1), done)


def resolve_data(
    hparams_file: str | Path, overrides: str
) -> tuple[Corpus, PackedFeatures | FeatureFiles, str]:
    """The data that a YAML file names; builds the mini corpus if it is none.

    Arguments
    ---------
    hparams_file : str or pathlib.Path
        A HyperPyYAML file with ``data_folder``, ``pack_folder``, ``pack`` and
        ``pack_dtype``.
    overrides : str
        The command line's, as YAML text.

    Returns
    -------
    tuple
        The corpus, its pack, and the overrides with what the data decide.
    """
    plain = plain_values(hparams_file, overrides)
    given = plain_values(hparams_file, overrides, only_given=True)
    for key in ("n_speakers", "n_mels"):
        if key in given:
            raise UserError(f"--{key}: the data decide it; leave it out.")
    folder = plain["data_folder"]
    if folder is None:
        print("No --data_folder: the embedded mini corpus is used.", flush=True)
        folder = mini_corpus.build(DEFAULT_DATA / "mini")
    corpus = read_corpus(folder)
    decided = {"n_speakers": len(corpus.speakers), "n_mels": corpus.n_mels}
    if "data_folder" not in given:
        decided["data_folder"] = str(folder)
    for key, value in decided.items():
        overrides += f"\n{key}: {json.dumps(value)}"
    choices = (plain[key] for key in ("pack_folder", "pack", "pack_dtype"))
    return corpus, pack_corpus(corpus, *choices), overrides


def write_submission(
    corpus: Corpus, scores: dict[str, Score], path: str | Path
) -> None:
    """Writes the competition's CSV, in the order of testdata.json.

    Arguments
    ---------
    corpus : Corpus
        The data.
    scores : dict
        By feature path.
    path : str or pathlib.Path
        The CSV file.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Id", "Category"])
    for utterance in corpus.test:
        guess = scores[utterance.path].guess
        writer.writerow([utterance.path, corpus.speakers[guess]])
    save_atomically(text.getvalue(), path)


def main(arguments: list[str]) -> None:
    """Checks and packs a data folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit(__doc__.strip())
    corpus = read_corpus(arguments[0])
    pack = pack_corpus(corpus)
    print(
        f"{corpus.folder} is in order: {len(corpus.speakers)} speakers, "
        f"{len(corpus.labelled)} labelled and {len(corpus.test)} test "
        f"utterances, {pack.lengths.sum() / 360_000:.1f} hours.\n"
        f"The pack is in {pack.file.parent}"
    )


if __name__ == "__main__":
    run_command(main)
