#!/usr/bin/env python3
"""Trains a speaker identification system on data in the form of ML2022 HW4.

Usage: python train.py hparams/conformer.yaml [--data_folder DIR] [--key value]

Any key of the YAML file and any run option of SpeechBrain can be given. The
same command, given again, goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.core import RunOptions
from speechbrain.dataio.dataio import load_data_json
from speechbrain.utils.distributed import ddp_init_group, if_main_process

import prepare
from ml2022hw4_prepare import read_json
from results import (
    EVALUATION,
    WEIGHTS,
    by_part,
    evaluation_settings,
    write_results,
)
from speaker_brain import SpeakerBrain
from spkid.data.dataset import label_encoder, make_datasets, make_loaders
from spkid.errors import run_command, table
from spkid.evaluation.scores import summarize, summarize_parts
from spkid.files import lock_folder, save_atomically
from spkid.hparams import (
    all_values,
    check_device,
    load_hparams,
    override,
    parse_arguments,
    plain_values,
)
from spkid.sessions import split
from spkid.training.checkpoints import RunState, check_identity

# What a run may change when it goes on: none of these moves a number.
FREE = {
    *("data_folder", "pack_folder", "output_folder", "save_folder"),
    *("manifest_folder", "train_log", "train_logger", "tensorboard_logger"),
    *("use_tensorboard", "checkpointer", "pack_on_device"),
    *("on_bad_file", "max_bad_share", "num_workers", "max_frames_per_batch"),
    *("ckpt_interval_minutes", "nonfinite_patience", "final_fit"),
}


def run_identity(hparams_file, overrides, hparams, run_opts, corpus):
    """What a run may not change when it goes on."""
    alone = not torch.distributed.is_initialized()
    free = FREE | set(EVALUATION if run_opts.test_only else ())
    values = all_values(hparams_file, overrides)
    for key in ("precision", "grad_accumulation_factor", "max_grad_norm"):
        # The command line's goes before the YAML file's.
        if key in run_opts.overridden_args or key not in values:
            values[key] = getattr(run_opts, key)
    return {
        "data": corpus.digest(),
        "data_folder": str(corpus.folder),
        "written_sessions": split.sessions_digest(corpus, hparams),
        "processes": 1 if alone else torch.distributed.get_world_size(),
        **{key: value for key, value in values.items() if key not in free},
        "parameters": sum(
            parameter.numel()
            for module in hparams["modules"].values()
            for parameter in module.parameters()
        ),
    }


def make_brain(hparams, run_opts, corpus, pack, identity):
    """A Brain and its loaders, ready to fit or to evaluate."""
    modules, hparams["loggers"] = hparams["modules"], [hparams["train_logger"]]
    if hparams["use_tensorboard"]:
        hparams["loggers"].append(hparams["tensorboard_logger"]())
    run_state = RunState(identity)
    hparams["checkpointer"].add_recoverable("run_state", run_state)
    brain = SpeakerBrain(
        modules=modules,
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.run_state = run_state
    encoder = label_encoder(corpus.speakers)
    if if_main_process():
        save_atomically(
            "\n".join(corpus.speakers),
            Path(hparams["output_folder"]) / "speakers.txt",
        )
    folder = Path(hparams["manifest_folder"])
    manifests = {
        name: load_data_json(folder / f"{name}.json")
        for name in ("train", "valid", "test")
    }
    brain.parts = {
        key: entry["part"] for key, entry in manifests["valid"].items()
    }
    manifests = {name: part for name, part in manifests.items() if part}
    if hparams["pack_on_device"]:
        pack.to(brain.device)
    datasets = make_datasets(hparams, manifests, pack, encoder)
    loaders = make_loaders(hparams, datasets)
    brain.train_sampler = loaders["train"].batch_sampler  # told the epoch
    brain.checkpointer.add_recoverable("dataloader-TRAIN", loaders["train"])
    return brain, loaders


def choose_weights(brain, valid_loader):
    """The averaged or the single best checkpoint: validation decides."""
    most = brain.hparams.average_checkpoints
    if valid_loader is None:  # the latest ones
        brain.checkpointer.load_average(most, "epoch", WEIGHTS)
        return most, summarize_parts({}, {}), {}
    best = None
    for count in sorted({1, most}):
        brain.checkpointer.load_average(count, "accuracy", WEIGHTS)
        brain.evaluate(valid_loader)
        result = summarize_parts(brain.scores, brain.parts)
        if best is None or result["accuracy"] >= best[1]["accuracy"]:
            best = count, result, brain.scores
    brain.checkpointer.load_average(best[0], "accuracy", WEIGHTS)
    return best


def final_fit(brain, loaders, output, averaged):
    """What another run needs that trains on all utterances, for as many steps
    as validation found best."""
    best = brain.checkpointer.find_checkpoint(max_key="accuracy")
    trained = len(loaders["train"].dataset)
    everything = trained + len(loaders["valid"].dataset)
    epochs = round(best.meta["epoch"] * trained / everything)
    return {
        "final_fit": False,
        "split": "none",
        "output_folder": str(output / "final"),
        "number_of_epochs": max(1, epochs),
        "average_checkpoints": averaged,
    }


def open_output(hparams_file, overrides, hparams, identity, corpus, pack):
    """The output folder with the manifests; it may hold an earlier part of
    this run alone."""
    output = Path(hparams["output_folder"])
    if (output / "run.json").exists():
        # Before anything of the earlier run is overwritten.
        begun = read_json(output / "run.json")
        check_identity(output / "run.json", begun, identity)
    sb.create_experiment_directory(
        experiment_directory=str(output),
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    sys.excepthook = sys.__excepthook__
    sb.utils.distributed.run_on_main(
        split.write_manifests,
        [corpus, pack, hparams["manifest_folder"], hparams],
    )
    # Only now, lest a choice that can't be carried out be the run's for good.
    if if_main_process():
        if not (output / "run.json").exists():
            save_atomically(json.dumps(identity, indent=1), output / "run.json")
        if corpus.skipped:
            save_atomically(table(corpus.skipped, None), output / "skipped.txt")
    return output


def train(
    hparams_file: str, run_opts: RunOptions, overrides: str
) -> dict[str, object] | None:
    """One run: prepares, trains, tests, and says where the results are.

    Arguments
    ---------
    hparams_file : str
        A HyperPyYAML file.
    run_opts : speechbrain.core.RunOptions
        SpeechBrain's options.
    overrides : str
        Other values of the YAML file's keys.

    Returns
    -------
    dict
        Overrides for another run on all utterances; None if none is wanted.
    """
    # Every process reads the data; the first one writes what is missing.
    if not if_main_process():
        torch.distributed.barrier()
    corpus, pack, overrides = prepare.resolve_data(hparams_file, overrides)
    if if_main_process() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    if if_main_process():
        # Before the checkpointer, which clears away what is saved in part.
        lock_folder(
            Path(plain_values(hparams_file, overrides)["output_folder"])
        )
    hparams = load_hparams(hparams_file, overrides)
    identity = run_identity(hparams_file, overrides, hparams, run_opts, corpus)
    output = open_output(
        hparams_file, overrides, hparams, identity, corpus, pack
    )
    brain, loaders = make_brain(hparams, run_opts, corpus, pack, identity)
    if if_main_process():
        sizes = [f"{len(loaders['train'].dataset)} training"]
        sizes += [f"{len(brain.parts)} validation", f"{len(corpus.test)} test"]
        print(
            f"{len(corpus.speakers)} speakers, {', '.join(sizes)} utterances "
            f"from {corpus.folder}"
        )
        if corpus.skipped:
            print(f"{output / 'skipped.txt'}: {len(corpus.skipped)} bad files")
        print(f"Results go to {output}", flush=True)
    if brain.distributed_launch:
        # Else all ranks would drop the same units.
        torch.manual_seed(hparams["seed"] + torch.distributed.get_rank())
    valid = loaders.get("valid")
    brain.fit(hparams["epoch_counter"], loaders["train"], valid)
    if brain.test_only:
        brain.checkpointer.recover_if_possible()  # its epochs and seconds
    averaged, result, validated = choose_weights(brain, valid)
    brain.scores = {}
    if "test" in loaders:
        brain.evaluate(loaders["test"])
    if brain.debug:
        if if_main_process():
            shutil.rmtree(output)
            print("The debug run has passed; it leaves no results.")
        return None
    if if_main_process():
        results = by_part(result) | {
            "test": summarize(brain.scores),
            "system": Path(hparams_file).stem,
            "data_folder": str(corpus.folder),
            "split": hparams["split"],
            "seed": hparams["seed"],
            "speakers": len(corpus.speakers),
            "parameters": identity["parameters"],
            "epochs": hparams["epoch_counter"].current,
            "averaged_checkpoints": averaged,
            "scored_by": evaluation_settings(hparams),
            "skipped_steps": brain.skipped_steps,
            "seconds": round(brain.run_state.seconds, 1),
        }
        validated = validated, brain.parts
        write_results(output, corpus, hparams, results, validated, brain.scores)
        print(f"{hparams['train_log']}: each epoch", flush=True)
    if hparams["final_fit"] and valid is not None:
        return final_fit(brain, loaders, output, averaged)
    return None


def main(arguments: list[str]) -> None:
    """Trains, and where it is wanted once more on all utterances."""
    hparams_file, run_opts, overrides = parse_arguments(arguments)
    if "distributed_backend" not in run_opts.overridden_args and (
        not torch.cuda.is_available()
    ):
        run_opts = replace(run_opts, distributed_backend="gloo")
    if "device" in run_opts.overridden_args:
        check_device(run_opts.device)
    ddp_init_group(run_opts)
    if run_opts.debug:  # what it leaves would pass for a run's beginning
        output = plain_values(hparams_file, overrides)["output_folder"]
        debugged = str(Path(output) / "debug")
        overrides = override(overrides, {"output_folder": debugged})
    again = train(hparams_file, run_opts, overrides)
    if again:
        print("Once more, on all utterances:", flush=True)
        given = plain_values(hparams_file, overrides, only_given=True)
        for key in ("save_folder", "manifest_folder", "train_log"):
            given.pop(key, None)  # those of the first run
        train(hparams_file, run_opts, override("", given | again))
    if torch.distributed.is_initialized():
        # Else a process that ends first may abort, which ends the one that
        # is still writing the results.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
