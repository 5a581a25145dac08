"""Whatever an error advises works, followed to the letter.

A full disk and a signal ("the same command again") are in test_resume.py and
chaos.py.
"""

import errno
import json
import os
import re
import shutil
import subprocess

import pytest
import speechbrain as sb
import torch
from corpus import make_corpus
from harness import ROOT, assert_one_sentence, run, run_train, train_arguments

import ml2022hw4_prepare
import predict
import train
from ml2022hw4_prepare import prepare
from spkid.errors import UserError
from spkid.evaluation import UtteranceEmbedder
from spkid.features import UtteranceNorm
from spkid.files import lock_folder
from spkid.hparams import Settings
from spkid.sessions import SPLIT_KEYS, divide

SHORT = "--number_of_epochs=1"


# --- data folders ----------------------------------------------------------

FIRST = "uttr-0-0.pt"


def change(file, how):
    """What changes a JSON file of a data folder."""

    def apply(folder):
        content = json.loads((folder / file).read_text())
        how(content)
        (folder / file).write_text(json.dumps(content))

    return apply


def spoil(file, content):
    """What writes other bytes into a file of a data folder."""
    return lambda folder: (folder / file).write_bytes(content)


def of_first(content):
    """Where metadata.json lists the first speaker's utterances."""
    return content["speakers"]["id00000"]


# What is wrong in the JSON files, and the advice; the right values are those
# that were there before.
JSON = {
    "no file": (
        lambda d: (d / "mapping.json").unlink(),
        "must name the folder",
    ),
    "Latin-1": (spoil("mapping.json", b'{"\xe4": 1}'), "save it as UTF-8"),
    "a key twice": (
        spoil("mapping.json", b'{"id2speaker": {}, "id2speaker": {}}'),
        "keep one",
    ),
    "an index": (
        change("mapping.json", lambda c: c["speaker2id"].update(id00000=9)),
        "use the integers from 0 to 3, each once",
    ),
    "an inverse": (
        change("mapping.json", lambda c: c["id2speaker"].update({"3": "ann"})),
        "make 'id2speaker' the inverse of 'speaker2id'",
    ),
    "a key missing": (
        change("metadata.json", lambda c: of_first(c)[0].pop("mel_len")),
        "add it",
    ),
    "a type": (
        change("metadata.json", lambda c: of_first(c)[0].update(mel_len=7.0)),
        "correct it",
    ),
    "a length": (
        change("metadata.json", lambda c: of_first(c)[0].update(mel_len=7)),
        "make the two agree",
    ),
    "a name": (
        change(
            "metadata.json",
            lambda c: of_first(c)[0].update(feature_path="uttr\n.pt"),
        ),
        "rename it",
    ),
    "a path": (
        change(
            "metadata.json",
            lambda c: of_first(c)[0].update(feature_path="../a.pt"),
        ),
        "give a path inside it",
    ),
    "a file twice": (
        change("metadata.json", lambda c: of_first(c).append(of_first(c)[0])),
        "keep one",
    ),
    "a stranger": (
        change("metadata.json", lambda c: c["speakers"].update(ann=[])),
        "or remove it here",
    ),
    "bands": (
        change("testdata.json", lambda c: c.update(n_mels=-1)),
        "give the number of bands",
    ),
}


@pytest.mark.parametrize("name", JSON)
def test_a_mended_list_is_in_order(tmp_path, name):
    harm, advice = JSON[name]
    folder, packs = make_corpus(tmp_path / "data"), tmp_path / "packs"
    right = shutil.copytree(folder, tmp_path / "right")
    harm(folder)
    with pytest.raises(UserError, match=advice):
        prepare(folder, pack_folder=packs)
    for path in right.glob("*.json"):
        shutil.copy(path, folder)
    prepare(folder, pack_folder=packs)


def link_out(folder):
    outside = folder.parent / "outside.pt"
    (folder / FIRST).rename(outside)
    (folder / FIRST).symlink_to(outside)


def copy_in(folder):
    target = (folder / FIRST).resolve()
    (folder / FIRST).unlink()
    shutil.copy(target, folder / FIRST)


WITHOUT_FIRST = change("metadata.json", lambda c: of_first(c).pop(0))
FILES = {
    "a link": (link_out, "copy the file into it", copy_in),
    "no file": (
        lambda folder: (folder / FIRST).unlink(),
        "or remove its entry",
        WITHOUT_FIRST,
    ),
    "an empty file": (
        spoil(FIRST, b""),
        "or remove its entry",
        WITHOUT_FIRST,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_mended_files_are_in_order(tmp_path, name):
    harm, advice, mend = FILES[name]
    folder, packs = make_corpus(tmp_path / "data"), tmp_path / "packs"
    harm(folder)
    with pytest.raises(UserError, match=advice):
        prepare(folder, pack_folder=packs)
    mend(folder)
    prepare(folder, pack_folder=packs)


def amplify(folder):
    torch.save(1e5 * torch.load(folder / FIRST), folder / FIRST)


def spoil_three(folder):
    for number in range(3):
        spoil(f"uttr-0-{number}.pt", b"<html>")(folder)


OPTIONS = {
    "float16": (
        amplify,
        {},
        "give --pack_dtype float32",
        {"pack_dtype": "float32"},
    ),
    "many bad files": (
        spoil_three,
        {"on_bad_file": "skip"},
        "max_bad_share=0.05 allows; fix them, or raise it",
        {"on_bad_file": "skip", "max_bad_share": 0.1},
    ),
    "an absent speaker": (
        change("metadata.json", lambda c: of_first(c).clear()),
        {},
        "give --speakers present",
        {"speakers": "present"},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_advised_option_prepares_the_data(tmp_path, name):
    harm, first, advice, then = OPTIONS[name]
    folder, packs = make_corpus(tmp_path / "data"), tmp_path / "packs"
    harm(folder)
    with pytest.raises(UserError, match=advice):
        prepare(folder, pack_folder=packs, **first)
    prepare(folder, pack_folder=packs, **then)
    # The command has the same options.
    words = [f"--{key}={value}" for key, value in then.items()]
    ml2022hw4_prepare.main([str(folder), f"--pack_folder={packs}", *words])


# --- splits ----------------------------------------------------------------

SPLITS = {
    "one session each": (
        {"n_utterances": 2},
        {},
        "give --sessions inferred",
        {"sessions": "inferred"},
    ),
    "one utterance each": (
        {"n_utterances": 1},
        {},
        "give --split none",
        {"split": "none"},
    ),
    "a fold": (
        {"n_utterances": 4},
        {"split": "folds", "fold": 9, "n_folds": 10},
        "give --n_folds 8 and a --fold from 0 to 7",
        {"split": "folds", "fold": 7, "n_folds": 8},
    ),
}
CHOICES = dict.fromkeys(SPLIT_KEYS, 0) | {
    "split": "session",
    "sessions": "auto",
    "valid_fraction": 0.3,
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_advised_split_exists(tmp_path, name):
    sizes, first, advice, then = SPLITS[name]
    folder = make_corpus(tmp_path / "data", **sizes)
    corpus, features = prepare(folder, pack=False)
    with pytest.raises(UserError, match=advice):
        divide(corpus, features, CHOICES | first)
    divide(corpus, features, CHOICES | then)


def test_a_single_session_is_split_at_random(tmp_path):
    folder = make_corpus(tmp_path / "data")

    def repeat(content):
        """All of a speaker's utterances become like the first one."""
        for first, *others in content["speakers"].values():
            for other in others:
                path = folder / other["feature_path"]
                shutil.copy(folder / first["feature_path"], path)
                other["mel_len"] = first["mel_len"]

    change("metadata.json", repeat)(folder)
    corpus, features = prepare(folder, pack=False)
    with pytest.raises(UserError, match="give --split random"):
        divide(corpus, features, CHOICES | {"sessions": "inferred"})
    divide(corpus, features, CHOICES | {"split": "random"})


def test_a_session_that_is_missing(tmp_path):
    folder = make_corpus(tmp_path / "data")
    corpus, features = prepare(folder, pack=False)
    (folder / "sessions.json").write_text("{}")
    with pytest.raises(UserError, match="or give --sessions inferred"):
        divide(corpus, features, CHOICES)
    divide(corpus, features, CHOICES | {"sessions": "inferred"})


def test_a_larger_known_fraction_measures_the_gap(tmp_path):
    folder = make_corpus(tmp_path / "data")
    corpus, features = prepare(folder, pack=False)
    report = divide(corpus, features, CHOICES)[1]
    assert "give a larger --known_fraction" in "".join(report["warnings"])
    report = divide(corpus, features, CHOICES | {"known_fraction": 0.1})[1]
    assert "known_fraction" not in "".join(report["warnings"])
    assert report["known"]


# --- train.py: options that are refused before the data --------------------

REFUSED = [
    ("--drop_out=0.5", "did you mean --dropout?", "--dropout=0.5"),
    ("--precision=fp16", "give fp32 or bf16", "--precision=bf16"),
    ("--bfloat16_mix_prec", "give --precision bf16", "--precision=bf16"),
    ("--device=gpu0", "give another one, as cpu", "--device=cpu"),
    ("--n_heads=5", "n_heads=5 must divide d_model=24", "--n_heads=4"),
    ("--batch_size=1", "must lie in [2, ", "--batch_size=2"),
    ("--split=x", "session, folds, random or none", "--split=random"),
    ("--window_hop=999", "at most window_frames=400", "--window_hop=400"),
    ("--pack=0", "pack=0 must be True or False", "--pack=True"),
    ("--optimizer_step_limit=3", "give --number_of_epochs", SHORT),
    ("--n_mels=40", "remove it", SHORT),
    ("--lr=", "give one", "--lr=0.01"),
    (
        "--ckpt_interval_steps=3",
        "give --ckpt_interval_minutes 0",
        "--ckpt_interval_minutes=0",
    ),
]


def test_refused_options_are_mended(data, tmp_path):
    """All mended ones together train."""
    output = tmp_path / "out"
    for wrong, advice, _ in REFUSED:
        words = train_arguments(data, output, wrong)
        with pytest.raises(UserError, match=re.escape(advice)):
            train.main(words)
    done = run_train(data, output, *(right for _, _, right in REFUSED))
    assert done.returncode == 0, done.stderr


def test_a_batch_for_more_processes():
    path, key = ROOT / "hparams" / "conformer.yaml", "batch_size"
    with pytest.raises(UserError, match="must be at least 8"):
        Settings(path, {key: 4}).check(n_processes=8)
    Settings(path, {key: 8}).check(n_processes=8)


# --- train.py: what happens during a run -----------------------------------


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def poison():
    """No loss is finite from now on."""
    loss = sb.nnet.losses.nll_loss
    sb.nnet.losses.nll_loss = lambda *a, **k: loss(*a, **k) * float("nan")


@pytest.mark.parametrize("step", [1, 10], ids=["at once", "later"])
def test_a_run_that_diverged(data, tmp_path, step):
    """With a checkpoint of it, too, where other settings would be refused."""
    fault = {"fate": ("step", step, False), "do": poison}
    wrong = ["--nonfinite_patience=0", "--number_of_epochs=2"]
    done = run_train(data, tmp_path / "out", *wrong, **fault)
    advice = "start a run in another --output_folder with a lower --lr, with "
    advice += "--precision fp32, or with --max_grad_norm 1"
    assert_one_sentence(done, advice)
    for option in ("--lr=0.001", "--precision=fp32", "--max_grad_norm=1"):
        done = run_train(data, tmp_path / option, SHORT, option)
        assert done.returncode == 0, done.stderr


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_batch_without_memory(data, tmp_path):
    fault = {"fate": ("step", 10, False), "do": no_memory}
    done = run_train(data, tmp_path / "out", **fault)
    advice = "start a run in another --output_folder with half the --batch_size"
    assert_one_sentence(done, f"{advice} and --grad_accumulation_factor 2")
    more = ["--batch_size=2", "--grad_accumulation_factor=2", SHORT]
    done = run_train(data, tmp_path / "new", *more)
    assert done.returncode == 0, done.stderr


def small_memory():
    """No utterance of more than 30 frames can be embedded from now on."""
    embed = UtteranceEmbedder._embed

    def limited(self, features, parts):
        if max(count for _, _, count in parts) > 30:
            no_memory()
        return embed(self, features, parts)

    UtteranceEmbedder._embed = limited


def test_an_utterance_without_memory(data, tmp_path):
    fault = {"fate": ("validation", 1, False), "do": small_memory}
    done = run_train(data, tmp_path / "out", SHORT, **fault)
    found = re.search(
        "(--window_frames) (.*) (--window_hop) (.*)\\.", done.stderr
    )
    assert_one_sentence(done, "start a run in another --output_folder with")
    more = [f"{found[1]}={found[2]}", f"{found[3]}={found[4]}", SHORT]
    done = run_train(data, tmp_path / "new", *more, **fault)
    assert done.returncode == 0, done.stderr


def test_a_disk_without_room_for_a_pack(data, tmp_path):
    output, new = tmp_path / "out", tmp_path / "new"
    fault = {"fate": ("packing", 3, False), "do": no_space}
    done = run_train(data, output, **fault)
    advice = (
        "free the space",
        "name another folder by --pack_folder",
        "or give --pack False",
    )
    assert_one_sentence(done, *advice)
    for option in ("--pack=False", f"--pack_folder={new}"):
        done = run_train(data, output, SHORT, option)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(output)


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    place = tmp_path_factory.mktemp("read_only")
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# Options that name a place, and the advice; the default places work.
PLACES = [
    ("--output_folder={file}", "name a folder, not a file"),
    ("--output_folder={file}/out", "name a folder, not a file"),
    ("--pack_folder={file}", "name another folder by --pack_folder"),
    ("--save_folder={file}", "name a folder, not a file"),
    ("--output_folder={read_only}/out", "name a place that can be written"),
    ("--pack_folder={read_only}", "name another folder by --pack_folder"),
    ("--save_folder={read_only}", "name a place that can be written"),
    ("--manifest_folder={read_only}", "name a place that can be written"),
    ("--output_folder={locked}", "or give another --output_folder"),
    ("--save_folder={locked}", "or give another --save_folder"),
    ("--test_only", "train first"),
]


def test_another_place_works(data, read_only, tmp_path):
    places = {name: tmp_path / name for name in ("file", "locked")}
    places["file"].touch()
    lock = lock_folder(places["locked"])
    for given, advice in PLACES:
        if "read_only" in given and read_only is None:
            continue
        option = given.format(**places, read_only=read_only)
        done = run_train(data, tmp_path / "out", SHORT, option)
        assert_one_sentence(done, advice)
    lock.release()
    done = run_train(data, tmp_path / "out", SHORT)
    assert done.returncode == 0, done.stderr


def test_a_refused_run_resumes_or_starts_elsewhere(data, finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "out")
    done = run_train(data, output, "--seed=7")
    advice = "resume with 1986, or give another --output_folder"
    assert_one_sentence(done, advice)
    for folder, seed in ((output, 1986), (tmp_path / "new", 7)):
        done = run_train(data, folder, f"--seed={seed}")
        assert done.returncode == 0, done.stderr
    (output / "save" / "run.json").unlink()
    done = run_train(data, output)
    assert_one_sentence(done, "or give another --save_folder")
    done = run_train(data, output, f"--save_folder={tmp_path / 'save'}")
    assert done.returncode == 0, done.stderr


def test_files_of_the_users_own(data, tmp_path):
    own, output = tmp_path / "out" / "model", tmp_path / "out"
    own.mkdir(parents=True)
    advice = "move it away, or give another --output_folder"
    assert_one_sentence(run_train(data, output, SHORT), advice)
    own.rename(tmp_path / "away")
    done = run_train(data, output, SHORT)
    assert done.returncode == 0, done.stderr


# --- predict.py and the report ---------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def test_weights_that_are_cut(data, finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "out")
    cut(output / "model" / "classifier.ckpt")
    with pytest.raises(UserError, match="train again"):
        predict.main([str(output)])
    done = run_train(data, output)
    assert done.returncode == 0, done.stderr
    predict.main([str(output)])


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("speakers.txt", "name the --output_folder of one"),
        ("model/classifier.ckpt", "name the --output_folder of one"),
        ("hyperparams.yaml", "name the --output_folder of a finished run"),
    ],
)
def test_another_run_can_predict(finished, tmp_path, file, advice):
    output = shutil.copytree(finished[0], tmp_path / "out")
    (output / file).unlink()
    with pytest.raises(UserError, match=advice):
        predict.main([str(output)])
    target = tmp_path / "submission.csv"
    predict.main([str(finished[0]), f"--submission={target}"])


def test_other_data_to_predict(data, finished, tmp_path):
    folder, target = make_corpus(tmp_path / "new"), tmp_path / "a.csv"
    words = [str(finished[0]), f"--data_folder={folder}"]
    words.append(f"--submission={target}")
    listed = (folder / "testdata.json").read_text()
    change("testdata.json", lambda c: c["utterances"].clear())(folder)
    with pytest.raises(UserError, match="has no utterance; add some"):
        predict.main(words)
    (folder / "testdata.json").write_text(listed)
    (folder / "testlabels.json").unlink()
    names = {"speaker2id": {"ann": 0}, "id2speaker": {"0": "ann"}}
    change("mapping.json", lambda c: c.update(names))(folder)
    with pytest.raises(UserError, match=r"give the mapping\.json that the run"):
        predict.main(words)
    shutil.copy(data / "mapping.json", folder)
    predict.main(words)
    assert target.exists()


def test_scores_are_written_again(data, finished, tmp_path, caplog):
    output = shutil.copytree(finished[0], tmp_path / "out")
    cut(output / "evaluation.npz")
    advice = "train.py with --test_only writes it again"
    predict.main([str(output)])
    assert advice in caplog.text
    done = run_train(data, output, "--test_only")
    assert done.returncode == 0, done.stderr
    caplog.clear()
    predict.main([str(output)])
    assert advice not in caplog.text


@pytest.mark.parametrize("advice", ["--pack False", "--pack_folder"])
def test_other_commands_without_room_for_a_pack(
    data, finished, tmp_path, advice
):
    option = ["--pack=False"]
    if advice == "--pack_folder":
        option = [f"--pack_folder={tmp_path / 'new'}"]
    output = shutil.copytree(finished[0], tmp_path / "out")
    fault = {"fate": ("packing", 3, False), "do": no_space}
    blocked = f"--pack_folder={tmp_path / 'packs'}"
    for program, folder in (("ml2022hw4_prepare", data), ("predict", output)):
        done = run(program, [folder, blocked], **fault)
        assert_one_sentence(done, advice)
        done = run(program, [folder, *option])
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "advice", "option"),
    [
        ([], "not a readable feature file", "--on_bad_file=skip"),
        (["--on_bad_file=skip"], "or raise it", "--max_bad_share=0.5"),
    ],
)
def test_bad_files_to_predict(finished, tmp_path, given, advice, option):
    folder = make_corpus(tmp_path / "new")
    for name in ("uttr-test-1.pt", "uttr-test-2.pt"):
        (folder / name).write_bytes(b"PK no tensor")
    words = [str(finished[0]), f"--data_folder={folder}", *given]
    words.append(f"--submission={tmp_path / 'a.csv'}")
    with pytest.raises(UserError, match=advice):
        predict.main(words)
    predict.main([*words, option, "--max_bad_share=0.5"])


class Norm(UtteranceNorm):
    """A user's own."""


def test_a_run_that_is_trusted(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "out")
    path = output / "hyperparams.yaml"
    own = f"!new:{__name__}.Norm"
    path.write_text(
        path.read_text().replace("!new:spkid.features.UtteranceNorm", own)
    )
    with pytest.raises(UserError, match="give --trust"):
        predict.main([str(output)])
    predict.main([str(output), "--trust"])
