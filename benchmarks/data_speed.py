#!/usr/bin/env python3
"""Speed and memory of spkid's data path at the HW4 data's true scale.

Makes random log-mels in the form of the data (64,666 files, 42.5 million
frames, 6.8 GB; ``--fraction`` of it on smaller machines), then times, taking
turns: an epoch of crops from a torch.load for each file and from the pack;
building the pack, and reading the files' bytes; a test pass one by one and in
batches by length; the start of training at growing sizes, with resident
memory; and session inference. Times are medians; the last line is JSON.

    python benchmarks/data_speed.py --fraction 0.015625
    python benchmarks/data_speed.py --folder /somewhere/with/14/GB
    python benchmarks/data_speed.py --measures test --device cuda

Everything is read from a warm cache if the memory is large enough for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.epoch_loop import EpochCounter
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "ML2022hw4"))
from ml2022hw4_prepare import read_corpus
from spkid.data import (
    Corpus,
    FeatureDataset,
    PackedFeatures,
    label_encoder,
    manifest,
    open_features,
    train_loader,
)
from spkid.features import UtteranceNorm
from spkid.inference import SpeakerIdentifier
from spkid.models import (
    AMSoftmax,
    AttentiveStatisticsPooling,
    ConformerEncoder,
    SpeakerEmbedding,
)
from spkid.sessions import infer_sessions, pack_fingerprints

Arguments = argparse.Namespace

BANDS, SPEAKERS, CROP, BATCH, MIB = 40, 600, 128, 32, 2**20
UTTERANCES, TEST, VALID = 64_666, 8_000, 5_666
MEASURES = ("crops", "build", "test", "growth", "sessions")
SLOW = 10  # seconds; a call that lasts longer is timed once
# The true lengths: percentile, frames.
QUANTILES = {
    0: 91, 0.1: 252, 1: 314, 5: 368, 10: 397, 15: 410, 20: 423, 25: 440,
    30: 455, 35: 474, 40: 493, 45: 518, 50: 540, 55: 569, 60: 601, 65: 636,
    70: 683, 75: 737, 80: 807, 85: 906, 90: 1055, 95: 1337, 97: 1568,
    98: 1773, 99: 2143, 99.5: 2544, 99.9: 3714, 99.99: 4881, 100: 7193,
}  # fmt: skip


def make_set(folder: Path, fraction: float) -> Path:
    """Writes the set if it is missing; a speaker has a mean spectrum."""
    if (folder / "testdata.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    total = round(UTTERANCES * fraction)
    places = (np.arange(total) + 0.5) / total * 100
    lengths = np.interp(places, list(QUANTILES), list(QUANTILES.values()))
    generator = np.random.default_rng(0)
    lengths = generator.permutation(lengths.round().astype(int)).tolist()
    noise = generator.normal(-2, 4, (200_000, BANDS)).astype(np.float32)
    voices = generator.normal(0, 1, (SPEAKERS, BANDS)).astype(np.float32)
    speakers = [f"id{i:05d}" for i in range(min(SPEAKERS, total // 8))]
    n_test = round(TEST * fraction)
    metadata = {speaker: [] for speaker in speakers}
    test = []
    for number, length in enumerate(tqdm(lengths, "Making the set")):
        name = f"uttr-{number:032x}.pt"
        first = int(generator.integers(len(noise) - length))
        speaker = number % len(speakers)
        mel = noise[first : first + length] + voices[speaker]
        torch.save(torch.from_numpy(mel), folder / name)
        entry = {"feature_path": name, "mel_len": length}
        own = metadata[speakers[speaker]]
        (test if number < n_test else own).append(entry)
    mapping = {speaker: i for i, speaker in enumerate(speakers)}
    contents = {
        "mapping": {
            "speaker2id": mapping,
            "id2speaker": {str(i): s for s, i in mapping.items()},
        },
        "metadata": {"n_mels": BANDS, "speakers": metadata},
        "testdata": {"n_mels": BANDS, "utterances": test},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read_set(folder: Path, share: float = 1.0) -> Corpus:
    """The set's corpus, or a share of its utterances spread over it."""
    corpus, _ = read_corpus(folder)
    step = round(1 / share)
    return replace(
        corpus, labelled=corpus.labelled[::step], test=corpus.test[::step]
    )


def open_pack(corpus: Corpus, folder: Path) -> PackedFeatures:
    """The corpus's pack in a folder of packs; builds it if need be."""
    return open_features(corpus, folder)[0]


class Course(torch.utils.data.Dataset):
    """Crops as in the course's and the student's code: torch.load each."""

    def __init__(self, corpus: Corpus) -> None:
        indices = {name: i for i, name in enumerate(corpus.speakers)}
        self.items = [
            (str(corpus.folder / u.path), indices[u.speaker])
            for u in corpus.labelled
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, speaker = self.items[index]
        mel = torch.load(path, weights_only=True)
        if len(mel) > CROP:
            start = int(torch.randint(len(mel) - CROP, ()))
            mel = mel[start : start + CROP]
        return mel, speaker


def collate_course(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
    """The course's collate function: pads by -20."""
    mels, speakers = zip(*batch, strict=True)
    padded = nn.utils.rnn.pad_sequence(mels, True, padding_value=-20)
    return padded, torch.tensor(speakers)


def pack_loader(
    corpus: Corpus, pack: PackedFeatures, workers: int = 0
) -> Iterable:
    """spkid's loader: an epoch of crops."""
    counter = EpochCounter(1)
    next(counter)
    dataset = FeatureDataset(
        manifest(corpus.labelled),
        pack,
        label_encoder(corpus.speakers),
        segment_frames=CROP,
        epoch_counter=counter,
    )
    return train_loader(dataset, batch_size=BATCH, seed=0, num_workers=workers)


def alternate(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of calls that take turns; slow ones get one turn."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if times[name] and times[name][0] > SLOW:
                continue
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            print(f"  {name:<32}{times[name][-1]:>10.3f} s", flush=True)
    return {n: round(statistics.median(t), 4) for n, t in times.items()}


def ratio(over: float, under: float) -> float:
    """A quotient."""
    return round(over / under, 2)


def exhaust(loader: Iterable) -> None:
    """Draws all batches."""
    for _ in loader:
        pass


def measure_crops(corpus: Corpus, args: Arguments) -> dict:
    """One epoch of crops, read in five ways."""
    pack = open_pack(corpus, args.packs)
    on_device = open_pack(corpus, args.packs).to(args.device)
    # As many as are held out for validation are left out.
    corpus = replace(
        corpus, labelled=corpus.labelled[round(VALID * args.fraction) :]
    )
    print(f"An epoch: {len(corpus.labelled):,} crops of {CROP}", flush=True)
    loaders = {
        f"torch.load, {workers} workers": torch.utils.data.DataLoader(
            Course(corpus),
            BATCH,
            shuffle=True,
            num_workers=workers,
            collate_fn=collate_course,
        )
        for workers in (0, 2)
    }
    loaders |= {
        "pack, 0 workers": pack_loader(corpus, pack),
        "pack, 2 workers": pack_loader(corpus, pack, 2),
        f"pack on {args.device}": pack_loader(corpus, on_device),
    }
    exhaust(loaders["pack, 0 workers"])  # the cache is warmed
    calls = {n: (lambda it=it: exhaust(it)) for n, it in loaders.items()}
    seconds = alternate(calls, args.rounds)
    alone = seconds["torch.load, 0 workers"]
    two = seconds["torch.load, 2 workers"]
    best = seconds["pack, 0 workers"]
    return {
        "seconds": seconds,
        "pack_times_faster_than_0_workers": ratio(alone, best),
        "pack_times_faster_than_2_workers": ratio(two, best),
    }


def read_bytes(corpus: Corpus) -> None:
    """Reads each file's bytes."""
    for utterance in corpus.utterances:
        (corpus.folder / utterance.path).read_bytes()


def measure_build(corpus: Corpus, args: Arguments) -> dict:
    """Building the pack, reading the bytes, and a torch.load of each file."""
    print("Building the pack", flush=True)
    place = args.packs / "built"

    def build() -> None:
        shutil.rmtree(place, ignore_errors=True)
        open_pack(corpus, place)

    def load() -> None:
        for utterance in corpus.utterances:
            torch.load(corpus.folder / utterance.path, weights_only=True)

    read_bytes(corpus)
    calls = {
        "reading the bytes": lambda: read_bytes(corpus),
        "building the pack": build,
        "torch.load of each": load,
    }
    seconds = alternate(calls, args.rounds)
    read, built, loaded = seconds.values()
    cold = {}
    with contextlib.suppress(OSError):  # not root
        for name in ("reading the bytes", "building the pack"):
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            cold |= alternate({f"{name}, cold": calls[name]}, 1)
    shutil.rmtree(place)
    first, second = cold.values() or (1, float("nan"))
    return {
        "seconds": seconds | cold,
        "cold_build_times_cold_reading": ratio(second, first),
        "build_times_reading": ratio(built, read),
        "build_times_torch_load": ratio(built, loaded),
    }


def measure_test(corpus: Corpus, args: Arguments) -> dict:
    """The test utterances one by one and in batches, by the same model."""
    print(f"A test pass: {len(corpus.test):,} utterances", flush=True)
    torch.manual_seed(0)
    identifier = SpeakerIdentifier(
        UtteranceNorm(),
        SpeakerEmbedding(
            ConformerEncoder(BANDS, 64, n_layers=2, n_heads=4, d_ff=256),
            AttentiveStatisticsPooling(64),
            embedding_size=64,
        ),
        AMSoftmax(64, SPEAKERS),
        corpus.speakers,
    )
    identifier.to(args.device).eval()
    pack = open_pack(corpus, args.packs)
    passes, one, many = [], {}, {}
    identifier.embedding_model.register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0].shape[:2].numel())
    )

    @torch.inference_mode()
    def one_by_one() -> None:
        for utterance in corpus.test:
            path = corpus.folder / utterance.path
            mel = torch.load(path, weights_only=True)[None].to(args.device)
            one[utterance.path] = int(identifier.classify(mel).argmax())

    def bucketed() -> None:
        scored = identifier.score(pack, manifest(corpus.test))
        many.update(zip(scored.id, scored.guess, strict=True))

    calls = {"one by one": one_by_one, "in batches": bucketed}
    seconds = alternate(calls, 1 if args.device == "cpu" else args.rounds)
    return {
        "seconds": seconds,
        "batches_times_faster": ratio(*seconds.values()),
        "utterances": len(one),
        "equal_predictions": sum(int(one[name] == many[name]) for name in one),
        "longest_utterance": max(u.length for u in corpus.test),
        "most_frames_in_a_pass": max(passes),
    }


def own_mib() -> float:
    """Memory of this process and its children, without the page cache."""
    total = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    for process in (str(os.getpid()), *children.split()):
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        # What a fork shares with its parent counts once.
        total += int(rollup.split("Pss_Anon:")[1].split()[0])
    return total / 1024


def start_training(args: Arguments) -> dict:
    """Time to the first batch on a built pack, and memory in an epoch."""
    before = own_mib()
    begin = time.perf_counter()
    laps = {}

    def lap(name: str) -> None:
        laps[name] = round(time.perf_counter() - begin - sum(laps.values()), 3)

    corpus = read_set(args.set, args.share)
    lap("JSON and checks")
    pack = open_pack(corpus, args.packs)
    lap("pack")
    loader = pack_loader(corpus, pack, args.workers)
    lap("datasets and loaders")
    batches = iter(loader)
    next(batches)
    lap("first batch")
    started = time.perf_counter() - begin
    peak = own_mib()
    for number, _ in enumerate(batches):
        if number % 50 == 0:
            peak = max(peak, own_mib())
    return {
        "utterances": len(corpus.utterances),
        "start_s": round(started, 3),
        "laps": laps,
        "loader_mib": round(peak - before, 1),
        "process_mib": round(peak, 1),
    }


def find_sessions(args: Arguments) -> dict:
    """Infers the sessions of the labelled utterances; time and memory."""
    corpus = read_set(args.set)
    pack = open_pack(corpus, args.packs)
    pack.file.with_name("fingerprints.npy").unlink(missing_ok=True)
    peak, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak.append(own_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    paths = [u.path for u in corpus.labelled]
    prints = pack_fingerprints(pack, paths, progress=False)
    middle = time.perf_counter()
    found = infer_sessions(prints, [u.speaker for u in corpus.labelled])
    end = time.perf_counter()
    done.set()
    watcher.join()
    return {
        "utterances": len(paths),
        "fingerprints_s": round(middle - begin, 1),
        "inference_s": round(end - middle, 1),
        "peak_own_mib": round(max(peak, default=own_mib())),
        "sessions": len(set(zip(found.speaker, found.label, strict=True))),
    }


def in_own_process(*options: object) -> dict:
    """The figures that this script prints with hidden options."""
    command = [sys.executable, __file__, *map(str, options)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_sessions(_: Corpus, args: Arguments) -> dict:
    """Session inference from a built pack."""
    print("Inferring the sessions", flush=True)
    found = in_own_process("--sessions-of", args.set, "--packs", args.packs)
    print(f"  {found}", flush=True)
    return found


def measure_growth(_: Corpus, args: Arguments) -> dict:
    """Start of training and memory at 1/16, 1/4 and the whole set."""
    print("Start of training on a built pack, loader memory", flush=True)
    figures = {}
    for share in (1 / 16, 1 / 4, 1):
        open_pack(read_set(args.set, share), args.packs)
        for workers in (0, 2):
            found = in_own_process(
                *("--start-of", args.set, "--packs", args.packs),
                *("--share", share, "--workers", workers),
            )
            figures[f"{share:g} of the set, {workers} workers"] = found
            print(
                f"  {found['utterances']:>6} utterances, {workers} workers: "
                f"{found['start_s']:.2f} s, loader {found['loader_mib']:.0f} "
                f"MiB of {found['process_mib']:.0f} MiB",
                flush=True,
            )
    return figures


def parse() -> Arguments:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--fraction", type=float, default=1.0, help="of the true size")
    add("--folder", type=Path, help="keeps the set (default: temporary)")
    add("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--start-of", dest="set", type=Path, help=argparse.SUPPRESS)
    add("--sessions-of", dest="sessions", type=Path, help=argparse.SUPPRESS)
    add("--packs", type=Path, help=argparse.SUPPRESS)
    add("--share", type=float, help=argparse.SUPPRESS)
    add("--workers", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures what the command line asks for."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.sessions:
        args.set = args.sessions
        print(json.dumps(find_sessions(args)))
        return
    if args.set:
        print(json.dumps(start_training(args)))
        return
    temporary = None if args.folder else tempfile.mkdtemp(prefix="hw4-scale-")
    folder = args.folder or Path(temporary)
    try:
        args.set = make_set(folder / f"set-{args.fraction:g}", args.fraction)
        args.packs = folder / "packs"
        corpus = read_set(args.set)
        figures = {
            "fraction": args.fraction,
            "utterances": len(corpus.utterances),
            "frames": sum(u.length for u in corpus.utterances),
            "device": args.device,
            "threads": args.threads,
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        }
        measures = {
            "crops": measure_crops,
            "build": measure_build,
            "test": measure_test,
            "growth": measure_growth,
            "sessions": measure_sessions,
        }
        for name in args.measures:
            figures[name] = measures[name](corpus, args)
        print(json.dumps(figures))
    finally:
        if temporary:
            shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
