"""The layer contracts of pyproject.toml, the public names, and the separation of library and command line."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.api import read_configuration

import clipgen

PACKAGE = Path(clipgen.__file__).parent
ROOT = Path(__file__).parents[1]
CONTRACTS = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
LINT = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(limit_to_contracts=(sys.argv[1],), no_cache=True))
"""
LIBRARY = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli")


@pytest.mark.parametrize("contract", [contract["id"] for contract in CONTRACTS])
def test_import_contract_is_kept(contract):
    command = [sys.executable, "-c", LINT, contract]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def layer_numbers() -> dict[str, int]:
    """Return the layer of each module of the package, 0 for the lowest."""
    (contract,) = [contract for contract in CONTRACTS if contract["id"] == "layers"]
    numbers = {}
    for number, layer in enumerate(reversed(contract["layers"])):
        for module in re.findall(r"\w+", layer):
            numbers[module] = number
    return numbers


def test_architecture_page_lists_every_module_in_the_order_of_the_layers():
    page = (ROOT / ".github" / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`clipgen/.*?) \|", page, re.MULTILINE)
    listed = [re.findall(r"`clipgen/(\w+)", row) for row in rows]
    numbers = layer_numbers()
    assert sorted(name for row in listed for name in row if name != "__init__") == sorted(numbers)
    order = [numbers[name] for row in listed for name in row if name != "__init__"]
    assert order == sorted(order)


def calls_of(path: Path, name: str) -> list[int]:
    """Return the lines of a file that call a function by its bare name."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_library_does_not_print(path):
    assert not calls_of(path, "print")


def test_public_names_are_imported_lazily_from_their_modules():
    assert set(clipgen.__all__) == {"VQGAN", "ConditionalTransformer", "FrozenCLIP", "TextToImage", "__version__"}
    for name in set(clipgen.__all__) - {"__version__"}:
        public_class = getattr(clipgen, name)
        assert public_class.__name__ == name and public_class.__doc__
        assert public_class.__module__.startswith("clipgen.")
        assert public_class is getattr(importlib.import_module(public_class.__module__), name)


def test_unknown_public_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'VQGan'; it offers VQGAN, "):
        _ = clipgen.VQGan
