"""The installed package: quick to import, typed, complete, and usable from any folder."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from commands import command, everything
from repository_address import repository_name

import clipgen

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# The package that is imported keeps its name if this one changes.
DISTRIBUTION = re.findall(r'^name = "([\w.-]+)"', PYPROJECT, re.MULTILINE)[0]
HEAVY = {
    "torch",
    "torchvision",
    "transformers",
    "open_clip",
    "pytorch_lightning",
    "numpy",
    "PIL",
    "hydra",
    "omegaconf",
    "rich",
}


def loaded_by(code: str, cwd: Path) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after running the code."""
    script = f"import sys\n{code}\nprint('loaded', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command_line", ["sample", "demo", "train", "baseline"])
def test_help_does_not_load_torch(tmp_path, command_line):
    """Only the help of clipgen-train may load Hydra, which finds the YAML files."""
    code = (
        f"from clipgen.cli.{command_line} import main\n"
        f"sys.argv = ['clipgen-{command_line}', '--help']\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0"
    )
    allowed = {"hydra", "omegaconf"} if command_line == "train" else set()
    loaded = loaded_by(code, tmp_path)
    assert "clipgen" in loaded and not loaded & (HEAVY - allowed)


def test_unknown_key_is_reported_before_torch_is_loaded(tmp_path):
    code = (
        "from clipgen.cli.train import main\n"
        "sys.argv = ['clipgen-train', 'stage=vqgan', 'model.chh=1']\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 1"
    )
    assert not loaded_by(code, tmp_path) & {"torch", "transformers", "open_clip", "pytorch_lightning"}


def test_import_does_not_load_torch(tmp_path):
    assert not loaded_by("import clipgen; clipgen.__version__; dir(clipgen)", tmp_path) & HEAVY
    assert {"torch", "open_clip"} <= loaded_by("import clipgen; clipgen.FrozenCLIP", tmp_path)


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version(DISTRIBUTION) == clipgen.__version__


def test_name_of_the_distribution_stands_in_one_place():
    """pyproject.toml must not name itself in an extra, and no module or page may ask for the distribution by name."""
    assert f"{DISTRIBUTION}[" not in PYPROJECT
    named = re.compile(
        rf"""version\(["']{DISTRIBUTION}["']\)|{DISTRIBUTION}(\[\w+\])? @ |install ["']?{DISTRIBUTION}\b"""
    )
    files = [ROOT / "README.md", *(ROOT / ".github").rglob("*.md")]
    for folder in ("clipgen", "configs", "scripts"):
        files += [path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".yaml", ".txt", ".ipynb")]
    assert len(files) > 200
    assert not [str(path) for path in files if named.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", ["CITATION.cff", "README.md"])
def test_citation_states_the_version(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"^\s*version *[:=] *\{?([\d.]+)", text, re.MULTILINE) == [clipgen.__version__]


def test_package_declares_its_types():
    """Without this file (PEP 561) the type checkers of other projects ignore our annotations."""
    assert (Path(clipgen.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["clipgen-train", "clipgen-sample", "clipgen-demo"])
def test_installed_commands_run_in_any_folder(tmp_path, name):
    done = command(name, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and name in done.stdout
    assert everything(tmp_path) == set()


def test_configuration_is_found_from_any_folder(tmp_path):
    done = command("clipgen-train", "stage=transformer", "experiment=coco", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0 and "n_embd: 1024" in done.stdout
    assert everything(tmp_path) == set()


# -------------------------------------------------------------------------------------------------------- wheel, sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build wheel and sdist, and return their folder."""
    pytest.importorskip("build", reason="needs the package build: pip install build")
    for name in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name, reason=f"without {name} here, building would need the network")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def names_in(built: Path, kind: str) -> set[str]:
    """Return the names of the files in the wheel or the sdist."""
    if kind == "wheel":
        return set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as tar:
        return {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}


@pytest.mark.slow
def test_wheel_is_complete(built):
    """The wheel is built from the sdist, so this checks the sdist as well."""
    names = names_in(built, "wheel")
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "clipgen").rglob("*.py")}
    configs = {f"clipgen/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    bundled = {path.relative_to(ROOT).as_posix() for path in (ROOT / "clipgen/bundled").rglob("*") if path.is_file()}
    assert {"clipgen/configs/train.yaml", "clipgen/configs/stage/vqgan.yaml"} <= configs
    assert "clipgen/bundled/shapes/clip/open_clip_model.safetensors" in bundled
    apart = [ROOT / "scripts" / name for name in ("notebooks", "replicate", "space")]
    files = [path for path in (ROOT / "scripts").rglob("*.py") if not any(path.is_relative_to(part) for part in apart)]
    scripts = {f"clipgen/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert not [name for name in names if name.startswith(tuple(f"clipgen/scripts/{part.name}/" for part in apart))]
    assert names >= package | configs | bundled | scripts | {"clipgen/py.typed"}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"clipgen"}
    assert next(built.glob("*.whl")).stat().st_size < 30e6  # most of it are the bundled models


@pytest.mark.slow
def test_sdist_has_documentation_and_tests(built):
    names = names_in(built, "sdist")
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "configs/train.yaml", "clipgen/py.typed"}
    assert names >= {
        "scripts/make_shards.py",
        "tests/conftest.py",
        "clipgen/bundled/shapes/clip/open_clip_model.safetensors",
    }
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.*") if path.suffix != ".yml"}
    assert names >= {"CITATION.cff", ".github/docs/index.md", ".github/pictures/bundled.png"} | pages
    assert not [name for name in names if name.startswith(("runs", "outputs", "data", ".venv"))]


@pytest.mark.slow
def test_page_on_pypi_has_no_relative_links(built):
    """PyPI shows README, and has none of the repository's files."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        text = wheel.read(name).decode()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 30 and all(link.startswith("https://") for link in links)
    repository = f"https://github.com/{repository_name()}"
    assert f"](https://github.com/{repository_name()}/raw/main/.github/pictures/demo.png)" in text
    for label in ("Repository", "Documentation", "Issues", "Changelog"):
        assert f"Project-URL: {label}, {repository}" in text
    for link in links:
        path = re.match(rf"{repository}/(?:blob|raw)/main/([^#]+)", link)
        assert path is None or (ROOT / path[1]).exists(), link


@pytest.mark.slow
def test_scripts_run_from_the_wheel(built, tmp_path):
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = [sys.executable, "-m", "clipgen", "estimate", "--help"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: estimate" in done.stdout, done.stderr


@pytest.mark.slow
def test_editable_installation_refers_to_the_repository(tmp_path):
    """It contains no copy of configs or scripts, which would be imported in the place of the package."""
    pytest.importorskip("hatchling", reason="needs hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme", reason="needs hatch-fancy-pypi-readme")
    code = f"import hatchling.build as b; b.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        (path,) = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert wheel.read(path).decode().strip() == str(ROOT)


@pytest.mark.slow
def test_wheel_finds_its_configuration(built, tmp_path):
    """The wheel is unpacked, without the repository beside it."""
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path / "site")
    code = "import clipgen.cli.config as c; print(c.config_dir());"
    code += " print(c.compose_config('stage=vqgan').model.gan.channels)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(tmp_path / "site" / "clipgen" / "configs"), "64"], done.stderr
