"""The house: a module imports from its own line of README's "The code" or those above it, and only the command line
knows about commands."""

from __future__ import annotations

import ast
import importlib
from itertools import takewhile
from pathlib import Path

import pytest

import clipgen

PACKAGE = Path(clipgen.__file__).parent
COMMAND_LINE_ONLY = {"hydra", "omegaconf", "argparse", "rich"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def lines_of_the_readme() -> dict[str, int]:
    """The line in which README's "The code" names each module and folder."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = readme.partition("```\nclipgen/\n")[2].partition("\nconfigs/")[0].splitlines()
    names = [takewhile(lambda word: word.endswith((".py", "/")), line.split()) for line in lines]
    return {name.removesuffix(".py").rstrip("/"): line for line, some in enumerate(names) for name in some}


FLOORS = lines_of_the_readme()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Everything a module imports, inside functions too: ``from a import b`` is both ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the line"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms(names: set[str]) -> set[str]:
    """The parts of clipgen among imports; ``clipgen`` itself (its version) is the ground that all stand on."""
    return {name.split(".")[1] for name in names if name.startswith("clipgen.")} - set(dir(clipgen)) - {"__version__"}


def test_the_house_is_found():
    assert {"vqgan", "cli.train", "nets.gpt", "data.shapes"} <= {name_of(path) for path in MODULES}
    assert rooms(imports(PACKAGE / "transformer.py")) >= {"vqgan", "clip", "nets", "losses", "sampling"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    room = name_of(path).split(".")[0]
    assert room in FLOORS, f'clipgen.{room} has no line yet in README\'s "The code"'
    for other in rooms(imports(path)):
        assert FLOORS[other] <= FLOORS[room], f"{path.name} (line {FLOORS[room]}) imports {other} ({FLOORS[other]})"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_knows_about_commands(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert path.parent.name == "cli" or not tops & COMMAND_LINE_ONLY


@pytest.mark.parametrize("path", [p for p in MODULES if FLOORS.get(name_of(p).split(".")[0], 2) < 2], ids=name_of)
def test_files_and_networks_know_no_trainer(path):
    assert "pytorch_lightning" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name != "cli"], ids=name_of)
def test_libraries_do_not_print(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


def test_public_names():
    assert set(clipgen.__all__) == {"VQGAN", "ConditionalTransformer", "FrozenCLIP", "TextToImage", "__version__"}
    for name in set(clipgen.__all__) - {"__version__"}:
        found = getattr(clipgen, name)
        assert found.__name__ == name and found.__module__.startswith("clipgen.")
        assert found is getattr(importlib.import_module(found.__module__), name) and found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'VQGan'; it offers VQGAN, "):
        _ = clipgen.VQGan
