"""The notebooks: they run from top to bottom, keep small outputs, and show images."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from repository_address import repository_name

FOLDER = Path(__file__).parents[1] / "scripts" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 400_000
# Text in a notebook -> its replacement in the test, which makes it quick.
SHORTCUTS = {"STEPS = 500": "STEPS = 4", "range(2000)": "range(200)", "ShapesDataset(2000": "ShapesDataset(200"}


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def has_image(cell: dict[str, Any]) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["first_images", "inside", "train_your_own"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_its_images_and_little_else(path):
    """Counts, identifiers and times that differ between executions are removed, so that changes can be read."""
    assert path.stat().st_size < MAX_BYTES
    cells = cells_of(path)
    assert sum(map(has_image, cells)) >= 4
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] is None for cell in code)
    assert [cell["id"] for cell in cells] == [f"cell-{number}" for number in range(len(cells))]
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    assert not [cell for cell in code if "/tmp" in json.dumps(cell) or "/root" in json.dumps(cell)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_and_installs_there_only(path):
    cells = cells_of(path)
    name = repository_name()
    title = "".join(cells[0]["source"])
    assert f"colab.research.google.com/github/{name}/blob/main/scripts/notebooks/{path.name}" in title
    (install,) = [cell for cell in cells if "".join(cell["source"]).startswith("%pip")]
    assert "".join(install["source"]) == f'%pip install -q "git+https://github.com/{name}"'
    assert install["metadata"]["tags"] == ["skip-execution"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    for name in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'needs {name}: pip install -e ".[notebooks]"')
    import nbformat
    from nbclient import NotebookClient

    text = path.read_text(encoding="utf-8")
    for long, short in SHORTCUTS.items():
        text = text.replace(long, short)
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        cell["outputs"] = []
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute()
    assert sum(map(has_image, notebook.cells)) == sum(map(has_image, cells_of(path)))
