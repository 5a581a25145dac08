"""What a new run takes over from a trained model."""

import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from corpus import make_corpus
from speechbrain.core import RunOptions

from ml2022hw4_prepare import read_corpus
from spkid.data import label_encoder
from spkid.errors import UserError
from spkid.hparams import Settings
from spkid.inference import SpeakerIdentifier
from spkid.training import AtomicCheckpointer, TrainedModel
from spkid.training.init_from import check_init_from
from spkid.training.run import RunFolder, check_start

ROOT = Path(__file__).resolve().parents[2]
TINY = {"d_model": 24, "n_layers": 1, "n_heads": 2, "d_ff": 32}
TINY |= {"embedding_size": 16}
OLD, NEW = ("ann", "bob", "cyd"), ("eve", "cyd", "dan", "ann")


def settings_of(n_speakers=4, system="conformer", **more):
    sizes = TINY if system == "conformer" else {"d_model": 24}
    path = ROOT / "hparams" / f"{system}.yaml"
    return Settings(path, sizes | {"n_speakers": n_speakers} | more)


def build(settings, seed):
    keys = ["mean_var_norm", "embedding_model", "classifier"]
    made = settings.replace(seed=seed).build(["__set_seed", *keys])
    for buffer in made["embedding_model"].buffers():
        buffer.add_(seed)  # of batch normalisation
    return made


def save(folder, settings=None, speakers=OLD, exported=False, seed=1):
    """A finished run's folder, or one in SpeechBrain's layout."""
    settings = settings or settings_of(len(speakers))
    made = build(settings, seed)
    values = settings.values | made
    SpeakerIdentifier.from_settings(values, speakers).save(folder)
    (folder / "hyperparams.yaml").write_text(settings.text)
    if exported:
        for path in (folder / "model").iterdir():
            path.rename(folder / path.name)
        (folder / "model").rmdir()
        (folder / "speakers.txt").unlink()
        label_encoder(speakers).save(folder / "label_encoder.ckpt")
    return made


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) for key in ours
    )


@pytest.mark.parametrize("kind", ["run", "exported", "file"])
def test_the_embedding_model_is_taken_over(tmp_path, kind):
    first = save(tmp_path, exported=kind == "exported")
    place = tmp_path / "model" / "embedding_model.ckpt"
    place = place if kind == "file" else tmp_path
    settings = settings_of(len(NEW))
    second, trained = build(settings, 2), TrainedModel.read(place)
    theirs = first["embedding_model"].state_dict()
    assert not equal(second["embedding_model"].state_dict(), theirs)
    trained.fill(second["embedding_model"], settings)
    assert equal(second["embedding_model"].state_dict(), theirs)
    taken = trained.fill_classes(second["classifier"], NEW, settings)
    assert taken == (0 if kind == "file" else 2)
    assert trained.speakers == (() if kind == "file" else OLD)
    assert trained.digest() == sha256(trained.path.read_bytes()).hexdigest()


# The transformer's classifier has a hidden layer of d_model units.
@pytest.mark.parametrize(
    ("system", "d_model"),
    [("conformer", 24), ("transformer", 24), ("transformer", 4)],
)
def test_classes_are_taken_over_by_name(tmp_path, system, d_model):
    """Known speakers' log-posteriors differ by as much as before."""
    names = (*OLD, "kim")  # as many as NEW has, and hidden units
    settings = settings_of(4, system, d_model=d_model)
    first, second = (build(settings, seed) for seed in (1, 2))
    save(tmp_path, settings, names)
    before = {
        k: v.clone() for k, v in second["classifier"].state_dict().items()
    }
    state = torch.get_rng_state()
    trained = TrainedModel.read(tmp_path)
    assert trained.fill_classes(second["classifier"], NEW, settings) == 2
    assert torch.equal(torch.get_rng_state(), state), "draws random numbers"
    size = 16 if system == "conformer" else d_model
    embeddings = torch.randn(5, size, generator=torch.manual_seed(0))
    ours = second["classifier"].eval()(embeddings)
    theirs = first["classifier"].eval()(embeddings)
    torch.testing.assert_close(
        ours[:, NEW.index("ann")] - ours[:, NEW.index("cyd")],
        theirs[:, names.index("ann")] - theirs[:, names.index("cyd")],
    )
    *_, last = (name for name, _ in second["classifier"].named_parameters())
    after = second["classifier"].state_dict()
    for new in ("eve", "dan"):
        row = NEW.index(new)
        assert torch.equal(after[last][row], before[last][row])


def test_a_class_may_have_several_rows(tmp_path):
    head = "!new:spkid.models.AMSoftmax {input_size: 2, sub_centers: 2, "
    path = tmp_path / "a.yaml"
    path.write_text(
        f"n_speakers: 3\nclassifier: {head}n_speakers: !ref <n_speakers>}}\n"
    )
    weight = torch.arange(12.0).view(6, 2)
    trained = TrainedModel(path, {}, {"weight": weight}, OLD, {})
    settings = Settings(path, {"n_speakers": 4})
    classifier = settings.build()["classifier"]
    assert trained.fill_classes(classifier, NEW, settings) == 2
    assert torch.equal(classifier.weight[2:4], weight[4:6])  # cyd
    assert torch.equal(classifier.weight[6:8], weight[0:2])  # ann


def test_the_margin_stays_the_runs_own(tmp_path):
    save(tmp_path)["classifier"].set_margin(0.0)
    path = tmp_path / "model" / "classifier.ckpt"
    weights = torch.load(path)
    torch.save(weights | {"margin": torch.tensor(0.0)}, path)
    settings = settings_of()
    classifier = build(settings, 2)["classifier"]
    margin = classifier.margin.clone()
    assert margin > 0
    TrainedModel.read(tmp_path).fill_classes(classifier, NEW, settings)
    assert classifier.margin == margin


@pytest.mark.parametrize(
    ("speakers", "system"), [(("zoe",), "transformer"), (OLD, "conformer")]
)
def test_other_classes_are_left_as_they_are(tmp_path, speakers, system):
    """No speaker is known, or it is another kind of classifier."""
    save(tmp_path, settings_of(len(speakers), system), speakers)
    settings = settings_of(4, "transformer")
    classifier = build(settings, 2)["classifier"]
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    trained = TrainedModel.read(tmp_path)
    assert trained.fill_classes(classifier, NEW, settings) == 0
    assert equal(classifier.state_dict(), before)


def test_settings_of_another_model_are_named(tmp_path):
    save(tmp_path)
    given = {"init_from": str(tmp_path), "dropout": 0.5, "lr": 0.5}
    check_init_from(settings_of(**given))
    with pytest.raises(UserError) as caught:
        check_init_from(settings_of(d_model=32, n_heads=4, **given))
    assert str(caught.value) == (
        f"{tmp_path / 'model' / 'embedding_model.ckpt'}: was trained with "
        "d_model=24, not 32, n_heads=2, not 4; give --d_model=24 --n_heads=2, "
        "or another --init_from."
    )


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ({"n_mels": 80}, r"is \[.*40.*\] there, but \[.*80.*with 80 mel bands"),
        ({"embedding_size": 8}, r"project.* is \[16.* there, but \[8, .*\] in"),
        ({"system": "transformer"}, "is missing there, but|but missing in"),
    ],
    ids=["bands", "embedding", "system"],
)
def test_other_shapes_are_refused(tmp_path, ours, words):
    """Of a file that has no settings beside it."""
    save(tmp_path)
    path, settings = (
        tmp_path / "model/embedding_model.ckpt",
        settings_of(**ours),
    )
    model = build(settings, 2)["embedding_model"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as caught:
        TrainedModel.read(path).fill(model, settings)
    assert str(caught.value).startswith(f"{path}: weight '")
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "exported"),
    [
        ("model/embedding_model.ckpt", False),
        ("model/classifier.ckpt", False),
        ("speakers.txt", False),
        ("hyperparams.yaml", False),
        ("label_encoder.ckpt", True),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, exported):
    save(tmp_path, exported=exported)
    TrainedModel.read(tmp_path)
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut off\xff")
    with pytest.raises(UserError) as caught:
        TrainedModel.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert str(caught.value).count("\n") == 0


def test_no_code_of_a_strangers_weights_runs(tmp_path):
    class Stranger:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    path = tmp_path / "embedding_model.ckpt"
    torch.save({"weight": Stranger()}, path)
    with pytest.raises(UserError, match=r"embedding_model\.ckpt: can't be lo"):
        TrainedModel.read(path)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("there", [False, True])
def test_what_holds_no_model_is_named(tmp_path, there):
    place = tmp_path / "first"
    if there:
        place.mkdir()
    with pytest.raises(UserError, match=f"{place}: holds no trained model"):
        TrainedModel.read(place)


def test_it_is_checked_before_the_data_unless_the_run_resumes(tmp_path):
    output = str(tmp_path / "out")
    settings = settings_of(init_from=str(tmp_path), output_folder=output)
    with pytest.raises(UserError, match="holds no trained model"):
        check_start(settings, RunOptions())
    save(tmp_path, settings_of(3, n_layers=2))
    with pytest.raises(UserError, match="n_layers=2, not 1; give --n_layers=2"):
        check_start(settings, RunOptions())
    check_start(settings.replace(n_layers=2), RunOptions())
    (tmp_path / "out" / "save" / "CKPT+1").mkdir(parents=True)
    check_start(settings, RunOptions())


class Features:
    def digest(self):
        return "a"


def begin(corpus, output, source, seed=2):
    """A run's start: its folder, weights and checkpoints."""
    settings = settings_of(
        len(corpus.speakers), init_from=str(source), output_folder=str(output)
    )
    run = RunFolder(settings, RunOptions(device="cpu"), corpus, Features())
    made = build(settings, seed)
    identifier = SpeakerIdentifier.from_settings(
        settings.values | made, corpus.speakers
    )
    checkpointer = AtomicCheckpointer(
        output / "save", {"embedding_model": made["embedding_model"]}
    )
    run.begin(identifier, checkpointer)
    run.save_identity()
    return run.identity, made["embedding_model"].state_dict(), checkpointer


def test_only_a_run_that_has_nothing_saved_reads_it(tmp_path, capsys):
    data, source = make_corpus(tmp_path / "data"), tmp_path / "first"
    corpus, output = read_corpus(data)[0], tmp_path / "out"
    first = save(source, speakers=("id00002", "ann"))
    theirs = first["embedding_model"].state_dict()
    identity, weights, checkpointer = begin(corpus, output, source)
    assert equal(weights, theirs)
    path = source / "model" / "embedding_model.ckpt"
    digest = sha256(path.read_bytes()).hexdigest()
    assert identity["init_from"] == str(source)
    assert identity["init_from_sha256"] == digest
    said = f"{path}: the embedding model, and the classes of 1 of 4 speakers\n"
    assert capsys.readouterr().out == f"Starts from {said}"
    saved = checkpointer.save_checkpoint({"epoch": 1})
    source.rename(tmp_path / "away")
    identity, weights, _ = begin(corpus, output, source)
    assert not equal(weights, theirs)
    assert identity["init_from_sha256"] == digest
    with pytest.raises(UserError, match=f"resume with {source}, or give anoth"):
        begin(corpus, output, tmp_path / "away")
    # A run whose checkpoints are all damaged starts again.
    (saved.path / "embedding_model.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="holds no trained model"):
        begin(corpus, output, source)
    shutil.move(tmp_path / "away", source)
    assert equal(begin(corpus, output, source)[1], theirs)
