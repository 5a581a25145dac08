"""A stranger's run folder: it runs nothing, and takes no memory to speak of.

Each attack has a canary: a folder that it would make.
"""

import sys
from pathlib import Path

import pytest
import torch

from spkid.errors import UserError
from spkid.hparams import Settings
from spkid.keys import TRAINED
from spkid.trust import Bounded, check_size, load_weights

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "hparams").glob("*.yaml"))
LAYER = "!new:torch.nn.Linear\n    in_features: 2\n    out_features: 3\n"
NOT_A_MODULE = r"isn't a torch module that is installed|can't be read"
NEEDS_TRUST = r"isn't one of the classes .* --trust \(in Python: trust=True\)"
ATTACKS = {
    "apply": ("!apply:os.mkdir [{ran}]", NOT_A_MODULE),
    "applyref": ("!applyref:os.mkdir [{ran}]", NOT_A_MODULE),
    "apply of torch": ("!apply:torch.save [1, {ran}]", NOT_A_MODULE),
    "new": ("!new:subprocess.Popen [[mkdir, {ran}]]", NEEDS_TRUST),
    "name": ("!name:os.mkdir [{ran}]", NEEDS_TRUST),
    "python": ("!!python/object/apply:os.mkdir [{ran}]", NOT_A_MODULE),
    "module": ("!module:canary", NOT_A_MODULE),
    "copy": ("!copy <other>", NOT_A_MODULE),
    "reference": ("!ref <other.__class__>", NOT_A_MODULE),
    "arithmetic": ("!ref <other> + __import__('canary')", NOT_A_MODULE),
    "include": ("!include:canary.yaml", NOT_A_MODULE),
    # HyperPyYAML reads what is in round brackets once more, and obeys it.
    "tuple": ("(!!python/object/apply:os.mkdir [{ran}])", "constructor"),
    "module here": ("!new:canary.Layer []", NEEDS_TRUST),
    "name of a module here": ("!name:canary.Layer", NEEDS_TRUST),
    "module of torch": ("!new:torch.utils.data.DataLoader [[1]]", NEEDS_TRUST),
    "hub": ("!new:torch.hub.load [canary, canary]", NEEDS_TRUST),
    "jit": ("!new:torch.jit.ScriptModule []", NEEDS_TRUST),
    "through us": ("!new:spkid.features.os.mkdir [{ran}]", NOT_A_MODULE),
    "through our file": (
        "!new:spkid.models.conformer.torch.hub.load [canary]",
        NEEDS_TRUST,
    ),
    "no class of ours": ("!new:spkid.models.canary.Layer []", NOT_A_MODULE),
    "function of ours": ("!name:spkid.models.masks.valid_mask", NOT_A_MODULE),
    "method": ("!name:torch.nn.Module.load_state_dict", NEEDS_TRUST),
    "parallel": ("!new:torch.nn.DataParallel []", NOT_A_MODULE),
    "copies": ("!new:torch.nn.TransformerEncoder [1, 1000000000]", NEEDS_TRUST),
    "lazy": ("!new:torch.nn.LazyLinear [4]", NEEDS_TRUST),
    "download": (
        "!new:speechbrain.lobes.models.huggingface_transformers.wav2vec2."
        "Wav2Vec2 [canary, {ran}]",
        NEEDS_TRUST,
    ),
}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A folder that is made by who imports the module ``canary``."""
    ran, text = tmp_path / "ran", "import os\nos.mkdir({!r})\n"
    text += "import torch\nclass Layer(torch.nn.Linear): pass\n"
    (tmp_path / "canary.py").write_text(text.format(str(ran)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield ran
    sys.modules.pop("canary", None)


def settings_of(folder, text):
    (folder / "hyperparams.yaml").write_text(text)
    return Settings.of_run(folder)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["{}", "!new:torch.nn.Sequential\n  - {}"])
def test_a_strangers_yaml_runs_nothing(tmp_path, canary, attack, place):
    attacking, words = ATTACKS[attack]
    value = place.format(attacking.format(ran=canary))
    text = f"other: 1\nlayer: {LAYER}key: {value}\n"
    with pytest.raises(UserError, match=words) as caught:
        settings_of(tmp_path, text).build_modules(["layer", "key"])
    assert "\n" not in str(caught.value)
    assert "hyperparams.yaml" in str(caught.value)
    assert not canary.exists()
    assert "canary" not in sys.modules


def test_a_tag_by_another_name_runs_nothing(tmp_path, canary):
    text = "%TAG !x! tag:yaml.org,2002:python/\n---\n"
    text += f"key: !x!object/apply:os.mkdir [{canary}]\n"
    with pytest.raises(UserError, match="can't be read"):
        settings_of(tmp_path, text).build_modules(["key"])
    assert not canary.exists()


def test_who_is_trusted_may_bring_modules(tmp_path, canary):
    text = "key: !new:canary.Layer [2, 3]\nkind: !new:os.mkdir [a]\n"
    settings = settings_of(tmp_path, text)
    with pytest.raises(UserError, match=NEEDS_TRUST):
        settings.build_modules(["key"])
    assert not canary.exists()
    layer = settings.build_modules(["key"], trust=True)["key"]
    assert layer.out_features == 3
    assert canary.exists()
    with pytest.raises(UserError, match="isn't a torch module"):
        settings.build_modules(["kind"], trust=True)


def test_a_module_that_cannot_be_imported_is_one_sentence(tmp_path, canary):
    canary.mkdir()  # so that the module can't
    settings = settings_of(tmp_path, "key: !new:canary.Layer [2, 3]\n")
    with pytest.raises(UserError, match=r"canary\.Layer can't be imported"):
        settings.build_modules(["key"], trust=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_built_is_what_hyperpyyaml_builds(path):
    settings = Settings(path)
    ours = settings.build_modules(TRAINED)
    theirs = settings.build()
    for key in TRAINED:
        assert str(ours[key]) == str(theirs[key])
        pairs = zip(
            ours[key].state_dict().items(),
            theirs[key].state_dict().items(),
            strict=True,
        )
        assert all(a[0] == b[0] and a[1].shape == b[1].shape for a, b in pairs)


def test_arguments_are_those_of_hyperpyyaml(tmp_path):
    text = (
        "shared: &a !new:torch.nn.Linear [2, 2]\n"
        "one: !new:torch.nn.Sequential [*a, *a]\n"
        "two: !new:torch.nn.Conv2d\n    in_channels: 1\n    out_channels: 2\n"
        "    kernel_size: (3, 5)\n    bias: False\n"
        "three: !new:torch.nn.ReLU\n"
        "four: !new:torch.nn.LeakyReLU\n    negative_slope: 1e-3\n"
    )
    made = settings_of(tmp_path, text).build_modules(
        ["one", "two", "three", "four"]
    )
    assert made["one"][0] is made["one"][1]
    assert made["two"].kernel_size == (3, 5)
    assert made["two"].bias is None
    assert made["four"].negative_slope == 1e-3
    with pytest.raises(UserError, match="'four' must be a torch module"):
        settings_of(tmp_path, "four: 4").build_modules(["four"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("key: !new:torch.nn.Linear [1, 2, 3, 4, 5, 6, 7]", "'key' !new:torch"),
        ("key: !new:torch.nn.Linear\n    in_feature: 2", "in_feature"),
        ("key: !new:torch.nn.Linear [&a [*a], 2]", "more than 10,000 values"),
        (
            "a0: &a0 [1, 1]\n"
            + "".join(
                f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
                for i in range(1, 9)
            )
            + "key: !new:torch.nn.Sequential [*a8]",
            "more than 10,000 values",
        ),
        (
            "a0: &a0 {x: 1}\n"
            + "".join(
                f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n"
                for i in range(1, 9)
            )
            + "key: !new:torch.nn.Sequential [*a8]",
            "more than 10,000 values",
        ),
        ("key: !new:torch.nn.Linear ([&a [1], *a], 2)", "read|aliases"),
        ("key: !new:torch.nn.ReLU\n  inplace: ([&a [1], *a])", "aliases"),
        (
            f"a: &a {'x' * 20000}\nkey: [{', '.join(['*a'] * 99)}]",
            "more than 10,000 values",
        ),
        ("key: " + "[" * 3000, "recursion"),
        ("# " + "x" * 2**18, "bytes, more than"),
    ],
    ids=[
        *("many", "wrong", "itself", "aliases", "merges", "scalar", "tuple"),
        *("texts", "deep", "giant"),
    ],
)
def test_a_bomb_is_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        settings_of(tmp_path, text).build_modules(["key"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "!new:torch.nn.Linear [1000000000, 100]",
        "!new:torch.nn.Linear [1000000000000, 10000000000000]",
        "!new:torch.nn.LSTM [8, 8, 1000000000]",
        "!new:torch.nn.Sequential [!new:torch.nn.Embedding [100000, 10000]]",
        "!new:spkid.models.TransformerEncoder [40, 24, 1000000000, 4, 32]",
        # What isn't registered.
        "!new:speechbrain.nnet.CNN.SincConv [2, 1000000001, null, 1]",
        "!new:speechbrain.nnet.CNN.GaborConv1d\n  out_channels: 4\n"
        "  kernel_size: 5\n  stride: 1\n  in_channels: 1\n"
        "  n_fft: 2000000000",
    ],
)
def test_a_giant_model_takes_no_memory(tmp_path, text):
    settings = settings_of(tmp_path, f"key: {text}")
    weights = {"key": torch.nn.Linear(2, 3).state_dict()}
    with pytest.raises(UserError, match=r"larger model|overflow"):
        check_size(
            lambda: settings.build_modules(["key"]), weights, settings.path
        )
    hooks = torch.nn.modules.module
    assert not hooks._global_parameter_registration_hooks
    assert not hooks._global_module_registration_hooks


def test_repeated_weights_are_no_room(tmp_path):
    """A view of one number has any shape."""
    settings = settings_of(tmp_path, "key: !new:torch.nn.Linear [100000, 9999]")
    weights = {
        "key": {
            "weight": torch.zeros(1).expand(9999, 100000),
            "bias": torch.zeros(1).expand(9999),
        }
    }
    with pytest.raises(UserError, match="larger model"):
        check_size(
            lambda: settings.build_modules(["key"]), weights, settings.path
        )


def test_a_check_of_size_leaves_the_random_state(tmp_path):
    settings = Settings(FILES[0])
    modules = settings.build_modules(TRAINED)
    weights = {key: modules[key].state_dict() for key in TRAINED}
    before = torch.get_rng_state()
    check_size(lambda: settings.build_modules(TRAINED), weights, settings.path)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_without_memory_are_refused(tmp_path):
    """They claim any size, and so would leave room for any model."""
    weights = {"weight": torch.zeros(100_000, 100_000, device="meta")}
    torch.save(weights, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="doesn't hold tensors by names"):
        load_weights(tmp_path / "a.ckpt")


FORESEEN = {
    "zeros": lambda x: torch.zeros(10**12),
    "arange": lambda x: torch.arange(10**12),
    "pad": torch.nn.ZeroPad1d(10**12),
    "broadcast": lambda x: x + torch.zeros(1).expand(10**12, 1, 4, 9),
    "copy of a view": lambda x: x.expand(10**12, 4, 9).clone(),
    "cat": lambda x: torch.cat([x.expand(10**12, 4, 9)] * 2),
    "convolution": torch.nn.Conv1d(4, 4, 1, padding=10**12),
    "transposed": torch.nn.ConvTranspose1d(4, 4, 1, stride=10**12),
    "product": lambda x: (
        x[0, :, :1].expand(4, 1) @ x[0, :1, :1].expand(1, 10**12)
    ),
    "batch": lambda x: x.expand(10**12, 4, 9) @ x.expand(10**12, 4, 9).mT,
    "upsample": torch.nn.Upsample(10**12),
    "pool": torch.nn.AdaptiveAvgPool1d(10**12),
    "norm": torch.nn.LocalResponseNorm(10**12),
}


@pytest.mark.parametrize("name", FORESEEN)
def test_what_takes_memory_is_foreseen(name):
    refusal = UserError("too large")
    x = torch.ones(1, 4, 9)
    with (
        torch.no_grad(),
        pytest.raises(UserError, match="too large"),
        Bounded(2**20, refusal),
    ):
        FORESEEN[name](x)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_foreseen_is_what_is_made(path):
    """A run's own systems stay far below the limit."""
    modules = Settings(path).build_modules(TRAINED)
    x = torch.zeros(1, 100, 40)

    def run():
        model = modules["embedding_model"].eval()
        return model(modules["mean_var_norm"](x, None, None), None)

    with torch.no_grad():
        expected = run()
        with Bounded(2**28, UserError("too large")) as bound:
            assert torch.equal(run(), expected)
    assert bound.left < 2**28 - expected.numel() * 4
