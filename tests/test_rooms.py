"""Who may import whom, and that nothing private is imported."""

import ast
import importlib
from pathlib import Path

import pytest

MODULES = Path(__file__).resolve().parents[1] / "modules"
RECIPE = MODULES.parent / "recipes" / "ML2022hw4"
FILES = sorted(MODULES.rglob("*.py"))
USES = {"data", "sessions", "training", "evaluation", "inference", "backend"}
FORBIDDEN = {
    "audio": {"models", "features", *USES},
    "backend": {"models", "features", "audio", *USES} - {"backend"},
    "models": {"features", "audio", *USES},
    "features": USES,
    "data": USES - {"data"},
    "sessions": {"training", "evaluation", "inference"},
    "evaluation": {"training", "inference"},
    "inference": {"training"},
}


def name_of(path):
    """spkid.data.pack of modules/spkid/data/pack.py."""
    parts = path.relative_to(MODULES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def imports(path):
    """Modules that a file imports at its top, and the names it takes."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def room(name):
    return name.split(".")[1] if name.count(".") else ""


@pytest.mark.parametrize("name", NAMES)
def test_no_arrow_points_the_wrong_way(name):
    for module, taken in imports(NAMES[name]):
        if module.split(".")[0] == "spkid":
            full = (
                f"{module}.{taken}" if f"{module}.{taken}" in NAMES else module
            )
            assert room(full) not in FORBIDDEN.get(room(name), ()), full
        assert not (RECIPE / f"{module.split('.')[0]}.py").exists(), module


@pytest.mark.parametrize("path", [*FILES, *RECIPE.glob("*.py")], ids=str)
def test_nothing_private_crosses_a_module(path):
    for module, taken in imports(path):
        if module.split(".")[0] == "spkid":
            assert "._" not in module
            assert not (taken or "").startswith("_"), (module, taken)


def test_no_imports_in_a_circle():
    arrows = {name: set() for name in NAMES}
    for name, path in NAMES.items():
        for module, taken in imports(path):
            full = f"{module}.{taken}"
            target = full if full in NAMES else module
            if target in NAMES and target != name:
                arrows[name].add(target)
    done, begun = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in begun, " -> ".join([*begun, name])
        begun.append(name)
        for target in sorted(arrows[name]):
            visit(target)
        done.add(begun.pop())

    for name in sorted(arrows):
        visit(name)


@pytest.mark.parametrize(
    "name", [n for n, p in NAMES.items() if p.name == "__init__.py"]
)
def test_a_room_shows_what_it_lists(name):
    face = importlib.import_module(name)
    for shown in getattr(face, "__all__", ()):
        assert getattr(face, shown).__doc__ or not callable(
            getattr(face, shown)
        ), shown
