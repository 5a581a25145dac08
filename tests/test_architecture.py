"""What holds for every file of spkid, found by walking the package.

test_rooms.py holds which room may import which.
"""

import importlib
import inspect
import multiprocessing
import pkgutil
import random
import sys

import numpy as np
import pytest
import torch

import spkid

FILES = [info.name for info in pkgutil.walk_packages(spkid.__path__, "spkid.")]
WRITING = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"}


def public_parts():
    """Public functions and torch modules: what the rooms' faces list, all of
    the models and features, and the tools beside the rooms."""
    for file in FILES:
        module, room = importlib.import_module(file), file.split(".")[1]
        names = getattr(module, "__all__", None)
        if names is None:
            whole = room in ("models", "features") or file.count(".") == 1
            names = [n for n in vars(module) if whole and not n.startswith("_")]
        for name in names:
            part = getattr(module, name)
            kind = inspect.isfunction(part) or (
                inspect.isclass(part) and issubclass(part, torch.nn.Module)
            )
            if kind and part.__module__.startswith("spkid."):
                yield f"{part.__module__}.{name}", part


def test_every_public_function_and_torch_module_has_an_example():
    parts = dict(public_parts())
    assert "spkid.models.conformer.ConformerEncoder" in parts
    assert "spkid.models.masks.valid_mask" in parts
    examples = {
        name: "Example\n-------\n>>> " in (inspect.getdoc(part) or "")
        for name, part in parts.items()
    }
    assert [name for name, has_one in examples.items() if not has_one] == []


def import_everything_again():
    """Fails if that changes a random state or writes a file."""
    for name in [*sys.modules]:
        if name.split(".")[0] == "spkid":
            del sys.modules[name]
    sys.dont_write_bytecode = True
    sys.addaudithook(refuse_writing)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(987654321)  # which nobody else would choose
    states = random_states()
    for file in FILES:
        importlib.import_module(file)
    assert random_states() == states


def random_states():
    _, state, *rest = np.random.get_state()
    torchs = torch.initial_seed(), torch.get_rng_state().tolist()
    return random.getstate(), state.tolist(), rest, torchs


def refuse_writing(event, arguments):
    mode = str(arguments[1]) if event == "open" else ""
    if event in WRITING or set(mode) & set("wax+"):
        raise AssertionError(f"an import must not write: {event} {arguments}")


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(),
    reason="processes can't be forked here",
)
def test_importing_prints_nothing_draws_nothing_and_writes_nothing(capfd):
    process = multiprocessing.get_context("fork").Process(
        target=import_everything_again
    )
    process.start()
    process.join(60)
    printed = capfd.readouterr()
    assert process.exitcode == 0, printed.err
    assert (printed.out, printed.err) == ("", "")
