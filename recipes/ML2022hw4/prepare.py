"""From mapping.json, metadata.json and testdata.json to manifests and a pack.

Usage: python prepare.py DATA_FOLDER [--on_bad_file stop | skip]
                         [--max_bad_share 0.05] [--pack_folder DIR]

Checks a data folder and packs it; ``train.py`` does the same by itself before
it trains.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from pathlib import Path

import mini_corpus
from ml2022hw4_prepare import LIMITS, read_corpus, unusable
from spkid.data.corpus import Corpus
from spkid.data.feature_file import FeatureFiles
from spkid.data.pack import PackedFeatures
from spkid.errors import UserError, run_command, table
from spkid.hparams import check_values, override, plain_values

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_DATA = ROOT / "data"


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
        The data; every file is checked while it is packed. Files that can't
        be used are left out of it, too, if it allows that.
    pack_folder : str or pathlib.Path, optional
        Where the packs are kept; None: data/packs of this project.
    pack : bool
        False: no pack is written, the files themselves are read each time.
    pack_dtype : str
        "float16" or "float32".

    Returns
    -------
    PackedFeatures or FeatureFiles

    Raises
    ------
    UserError
        For all files that can't be used, unless they may be skipped.
    """
    utterances = corpus.labelled + corpus.test
    if not pack and corpus.on_bad_file == "skip":  # nothing else opens all
        corpus.leave_out(unusable(corpus.folder, utterances, corpus.n_mels))
        utterances = corpus.labelled + corpus.test
    paths = [u.path for u in utterances]
    lengths = [u.length for u in utterances]
    if not pack:
        return FeatureFiles(corpus.folder, paths, lengths, corpus.n_mels)
    place = os.path.realpath(corpus.folder)
    name = hashlib.blake2b(place.encode(), digest_size=4).hexdigest()
    packs = Path(pack_folder) if pack_folder else DEFAULT_DATA / "packs"
    n_bad = 0

    def left_out(_path, _error):
        nonlocal n_bad
        n_bad += 1
        if n_bad == len(utterances):  # there is no pack of nothing
            corpus.leave_out(unusable(corpus.folder, utterances, corpus.n_mels))

    pack = PackedFeatures.build(
        packs / f"{os.path.basename(place)}-{name}",
        corpus.folder,
        paths,
        lengths,
        corpus.n_mels,
        pack_dtype,
        on_error=left_out,
    )
    # The pack of an earlier attempt lacks the bad ones, too: they are opened
    # again for what is wrong with them.
    absent = [u for u in utterances if u.path not in pack.row]
    bad = unusable(corpus.folder, absent, corpus.n_mels)
    if len(bad) < len(absent):
        raise UserError(
            f"{pack.file.parent}: lacks files that can be read now; delete it "
            "to have it rebuilt."
        )
    corpus.leave_out(bad)
    _warn_of_twins(corpus, pack)
    return pack


def _warn_of_twins(corpus, pack):
    """Says which files hold the same features under several names."""
    seen, twins = {}, []
    for row, path in enumerate(pack.paths):
        key = int(pack.lengths[row]), int(pack.checksums[row])
        if seen.setdefault(key, path) != path:
            twins.append((seen[key], path))
    if twins:
        first, second = twins[0]
        logger.warning(
            "%s: %d feature files hold what another one holds (%s and %s, "
            "...); copies flatter what is measured on them.",
            corpus.folder,
            len(twins),
            second,
            first,
        )


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
    check_values(hparams_file, plain, LIMITS)
    given = plain_values(hparams_file, overrides, only_given=True)
    for key in ("n_speakers", "n_mels"):
        if key in given:
            raise UserError(f"--{key}: the data decide it; leave it out.")
    folder = plain["data_folder"]
    if folder is None:
        print("No --data_folder: the embedded mini corpus is used.", flush=True)
        folder = mini_corpus.build(DEFAULT_DATA / "mini")
    corpus = read_corpus(folder, plain["on_bad_file"], plain["max_bad_share"])
    decided = {"n_speakers": len(corpus.speakers), "n_mels": corpus.n_mels}
    decided["data_folder"] = os.path.abspath(folder)
    if plain["pack_folder"]:
        decided["pack_folder"] = os.path.abspath(plain["pack_folder"])
    choices = (plain[key] for key in ("pack_folder", "pack", "pack_dtype"))
    pack = pack_corpus(corpus, *choices)
    return corpus, pack, override(overrides, decided)


def main(arguments: list[str]) -> None:
    """Checks and packs a data folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("--on_bad_file", default="stop")
    parser.add_argument("--max_bad_share", type=float, default=0.05)
    parser.add_argument("--pack_folder", type=Path)
    args = parser.parse_args(arguments)
    corpus = read_corpus(args.data_folder, args.on_bad_file, args.max_bad_share)
    pack = pack_corpus(corpus, args.pack_folder)
    if corpus.skipped:
        print(f"Skipped:\n{table(corpus.skipped)}")
    print(
        f"{corpus.folder} is in order: {len(corpus.speakers)} speakers, "
        f"{len(corpus.labelled)} labelled and {len(corpus.test)} test "
        f"utterances, {pack.lengths.sum() / 360_000:.1f} hours.\n"
        f"The pack is in {pack.file.parent}"
    )


if __name__ == "__main__":
    run_command(main)
