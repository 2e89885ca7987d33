"""README and .github/docs: links resolve, names exist, commands parse, examples run."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import TINY_VQGAN
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from clipgen.data.shapes import ShapesDataset
from clipgen.images import to_pil

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / ".github").glob("[A-Z]*.md")), *sorted((ROOT / ".github" / "docs").glob("*.md"))]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ENTRY_POINTS = re.findall(r'^(clipgen-[\w-]+) = "([\w.]+):(\w+)"$', PYPROJECT, re.MULTILINE)
COMMANDS = {name: (module, function) for name, module, function in ENTRY_POINTS}
HYDRA_COMMANDS = {"clipgen-train": "train", "clipgen-encode": "encode"}  # command -> root configuration
OTHER_PROGRAMS = ("python", "pip", "pytest", "torchrun")
SETUP_COMMANDS = ["pip install -e . && clipgen-demo", 'pip install -e ".[test]" && pytest -n 2']
TINY_RUN = ["trainer.max_steps=2", "trainer.val_check_interval=1", "data.train_size=64", "data.val_size=64"]


def fenced_blocks(page: Path, language: str) -> list[str]:
    """Return the contents of a page's fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its fenced code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path, pattern: str) -> list[str]:
    """Return the pieces of a page's inline code that a pattern matches completely."""
    pieces = dict.fromkeys(re.findall(r"`([^`\n]+)`", prose(page)))
    return [piece for piece in pieces if re.fullmatch(pattern, piece)]


def blocks_of_all_pages(language: str) -> list[Any]:
    """Return a parameter for each fenced block of a language."""
    return [
        pytest.param(block, id=f"{page.stem} {language} {number}")
        for page in PAGES
        for number, block in enumerate(fenced_blocks(page, language))
    ]


# ------------------------------------------------------------------------------------------------------ text and links


def test_readme_has_at_most_1200_words():
    assert len(README.read_text(encoding="utf-8").split()) <= 1200


def test_readme_prints_both_setup_commands():
    lines = [line.split("  ")[0].strip() for block in fenced_blocks(README, "bash") for line in block.splitlines()]
    assert set(SETUP_COMMANDS) <= set(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_outside_tables_have_at_most_120_characters(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if len(line) > 120 and (page == README or not line.startswith("|"))]
    assert not long


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in heading_anchors(target), f"{page.name} links to {link}: no such heading"


def test_index_links_every_page():
    index = ROOT / ".github" / "docs" / "index.md"
    links = re.findall(r"\]\(([^)#\s]+)\)", index.read_text(encoding="utf-8"))
    linked = {(index.parent / link).resolve() for link in links if "://" not in link}
    assert set(PAGES) - {index} <= linked


# ------------------------------------------------------------------------------------------------------- names in text


def name_exists(name: str) -> bool:
    """Return whether a dotted name is a module or something that can be reached from one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            functools.reduce(getattr, parts[length:], module)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_dotted_names_exist(page):
    missing = [name for name in inline_code(page, r"clipgen(\.\w+)+") if not name_exists(name)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_in_the_repository_exist(page):
    paths = inline_code(page, r"(clipgen|configs|scripts|tests)/[\w./]*")
    missing = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_repository_map_names_existing_modules():
    (repository_map,) = re.findall(r"^```\nclipgen/\n(.*?)^configs/", README.read_text(), re.DOTALL | re.MULTILINE)
    for line in repository_map.splitlines():
        names, _, description = line.strip().partition("  ")
        assert description
        for name in names.split():
            assert (ROOT / "clipgen" / name).exists(), f"README lists clipgen/{name}"


def compose_config(name: str, *overrides: str) -> DictConfig:
    """Compose the configuration of a command as Hydra does, which refuses unknown keys and options."""
    importlib.import_module("clipgen.cli.config")  # registers what the YAML files refer to, if anything
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a nested mapping, inner nodes included."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from flat_keys(value, f"{prefix}{key}.")


@functools.cache
def all_config_keys() -> set[str]:
    """Return the keys of both stages with every kind of data."""
    keys: set[str] = set()
    for stage in ("vqgan", "transformer"):
        for data in sorted((ROOT / "configs" / "data").glob("*.yaml")):
            config = compose_config("train", f"stage={stage}", f"data={data.stem}")
            keys |= set(flat_keys(OmegaConf.to_container(config)))
    return keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_config_keys_exist(page):
    files = r"(?!.*\.(json|csv|safetensors)$)"
    codes = inline_code(page, files + r"(model|data|trainer|clip|image_logger|metrics)\.[a-z_0-9.]+(=\S+)?")
    missing = [code for code in codes if code.split("=")[0] not in all_config_keys()]
    assert not missing


# ------------------------------------------------------------------------------------------------------------ commands


def shell_words(block: str, folder: Path) -> list[list[str]]:
    """Return the commands of a bash block, with their arguments as the shell passes them on; none is executed."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    record = r"record() { printf '%s\037' " + '"$@"' + r"; printf '\036'; }"
    programs = (*COMMANDS, *OTHER_PROGRAMS)
    functions = [f'{program}() {{ record {program} "$@"; }}' for program in programs]
    # The programs of SLURM run the command that follows, or that of --wrap.
    functions += ['srun() { "$@"; }', 'sbatch() { eval "${@: -1}"; }']
    script = "\n".join(["set -e", record, *functions, block])
    done = subprocess.run([bash, "-c", script], cwd=folder, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\n{block}"
    return [command.split("\x1f")[:-1] for command in done.stdout.split("\x1e")[:-1]]


class ParsedError(BaseException):
    """Raised when a command has parsed its arguments, so that it does no work."""


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Let the next command parse these arguments and stop."""

    def stop_after(parse: Any) -> Any:
        def parse_and_stop(*arguments: Any, **options: Any) -> None:
            parse(*arguments, **options)
            raise ParsedError

        return parse_and_stop

    def exit_process(code: int) -> None:
        raise AssertionError(f"{argv} ended with {code}")

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(os, "_exit", exit_process)
    monkeypatch.setattr(sys, "argv", argv)


def check_hydra_command(argv: list[str]) -> None:
    """Compose the configuration of clipgen-train or clipgen-encode."""
    # Sweepers and launchers are plugins that need not be installed.
    overrides = [argument for argument in argv[1:] if "=" in argument and not argument.startswith("hydra")]
    if "--multirun" in argv:  # each sweep by its first value
        overrides = [re.sub(r"=.*interval\(", "=", override).partition(",")[0] for override in overrides]
    if any(override.startswith("resume=") for override in overrides) and not any(
        override.startswith("stage=") for override in overrides
    ):
        overrides.append("stage=vqgan")  # as the run folder's own arguments would say
    compose_config(HYDRA_COMMANDS[argv[0]], *overrides)


def check_command(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command's arguments by its own parser."""
    if argv[0] == "torchrun":
        argv = argv[argv.index("--no-python") + 1 :]
    if argv[0] in HYDRA_COMMANDS:
        check_hydra_command(argv)
    elif argv[0] in COMMANDS:
        module, function = COMMANDS[argv[0]]
        with monkeypatch.context() as patch, pytest.raises(ParsedError):
            stop_after_parsing(patch, argv)
            getattr(importlib.import_module(module), function)()
        if argv[0] == "clipgen-demo":
            overrides = [argument for argument in argv[1:] if "=" in argument]
            for stage in ("vqgan", "transformer"):
                compose_config("train", f"stage={stage}", *overrides)
    elif argv[0] == "python":
        assert argv[1:3] == ["-m", "clipgen"], argv
        with monkeypatch.context() as patch, pytest.raises(ParsedError):
            stop_after_parsing(patch, argv[2:])
            runpy.run_module("clipgen", run_name="__main__")
    elif argv[0] == "pip":
        for extra in re.findall(r"\[(\w+)\]", " ".join(argv)):
            assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), f"pyproject.toml has no extra {extra}"


@pytest.mark.parametrize("block", [*blocks_of_all_pages("bash"), *blocks_of_all_pages("sh")])
def test_commands_parse(block, tmp_path, monkeypatch):
    commands = shell_words(block, tmp_path)
    assert commands or block.startswith("export ")
    for argv in commands:
        check_command(argv, monkeypatch)


def test_sampling_page_lists_every_option():
    module, _ = COMMANDS["clipgen-sample"]
    help_text = importlib.import_module(module).make_parser().format_help()
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text)) - {"--help"}
    page = (ROOT / ".github" / "docs" / "sampling.md").read_text(encoding="utf-8")
    assert options == set(re.findall(r"^\| `(--[\w-]+)", page, re.MULTILINE))


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.fixture(scope="module")
def token_cache(tmp_path_factory) -> Path:
    """Return the token cache that data.md shows how to make from the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("docs")
    module, function = COMMANDS["clipgen-encode"]
    argv = ["clipgen-encode", "vqgan=shapes", f"output={folder / 'encoded'}", "data.train_size=256", "data.val_size=32"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setattr(sys, "argv", argv)
        getattr(importlib.import_module(module), function)()
    assert end.value.code == 0
    return folder / "encoded"


@pytest.mark.parametrize("block", blocks_of_all_pages("python"))
def test_python_examples_run(block, token_cache, tmp_path, monkeypatch):
    shutil.copytree(token_cache, tmp_path / "encoded")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "documentation", "exec"), {})


def run_in_shell(block: str, folder: Path) -> None:
    """Run a bash block with the installed commands."""
    bash, programs = shutil.which("bash"), Path(sys.executable).parent
    if bash is None or not (programs / "clipgen-sample").is_file():
        pytest.skip("needs bash and the installed commands: pip install -e .")
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([bash, "-ec", block], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_quickstart_commands_run(tmp_path):
    blocks = [block for block in fenced_blocks(README, "bash") if block.startswith("clipgen-sample")]
    assert blocks
    for block in blocks:
        run_in_shell(block, tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) > 8


@pytest.mark.slow
def test_sampling_commands_run(tmp_path):
    """The commands of sampling.md in order: some read images that earlier ones wrote."""
    run_in_shell(fenced_blocks(ROOT / ".github" / "docs" / "sampling.md", "bash")[0], tmp_path)


# What makes the commands of the pages small, however large their models are
SMALL_DATA = ["data.image_size=32", "data.batch_size=8", "data.num_workers=0"]
SMALL_STEPS = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.precision=32-true", "clip=shapes"]
SMALL_STAGES = {
    "vqgan": [
        *[argument for argument in TINY_VQGAN if not argument.startswith("stage=")],
        "model.compile=false",
        "model.loss.perceptual_weight=0",
    ],
    "transformer": ["model.n_layer=2", "model.n_head=2", "model.n_embd=32"],
}


def small_training() -> str:
    """Return shell functions that add small sizes to the arguments of the training commands."""
    common = shlex.join([*SMALL_DATA, *SMALL_STEPS])
    cached = shlex.join(["data.batch_size=8", *SMALL_STEPS])
    cases = [f'*stage={stage}*) set -- "$@" {shlex.join(more)};;' for stage, more in SMALL_STAGES.items()]
    return f"""
    clipgen-train() {{
        case "$*" in *data=cached*) set -- "$@" {cached};; *) set -- "$@" {common};; esac
        case "$*" in {" ".join(cases)} esac
        command clipgen-train "$@"
    }}
    clipgen-encode() {{ command clipgen-encode "$@" {shlex.join(SMALL_DATA[:1])} clip=shapes; }}
    """


def write_photos(folder: Path) -> None:
    """Write a folder of forty images."""
    folder.mkdir()
    for i, image in enumerate(to_pil(ShapesDataset(40, seed=5).render(range(40)))):
        image.save(folder / f"{i:02d}.png")


@pytest.mark.slow
def test_training_commands_run(tmp_path):
    """README's commands for a user's own images, and the token cache of data.md, with small models."""
    (train,) = [block for block in fenced_blocks(README, "bash") if "data.root=/photos" in block]
    assert train.splitlines() == [
        line.partition("    #")[0].rstrip()
        for line in fenced_blocks(ROOT / ".github" / "docs" / "training.md", "bash")[0].splitlines()
    ]
    (cache,) = [
        block
        for block in fenced_blocks(ROOT / ".github" / "docs" / "data.md", "bash")
        if block.startswith("clipgen-encode") and "data=cached" in block
    ]
    write_photos(tmp_path / "photos")
    block = (train + cache).replace("/photos", "photos").replace("outputs/vqgan/RUN", "$(echo outputs/vqgan/*)")
    run_in_shell(small_training() + block, tmp_path)
    assert len(list((tmp_path / "outputs" / "transformer").iterdir())) == 2
    assert list((tmp_path / "samples").glob("00_a-city-bus*.png"))


@pytest.mark.slow
def test_shard_commands_run(tmp_path):
    """The commands of data.md that write shards and train on them."""
    (block,) = [
        block
        for block in fenced_blocks(ROOT / ".github" / "docs" / "data.md", "bash")
        if block.startswith("python -m clipgen make_shards /photos")
    ]
    write_photos(tmp_path / "photos")
    run_in_shell(small_training() + block.replace("/photos", "photos"), tmp_path)
    assert len(list((tmp_path / "outputs" / "vqgan").iterdir())) == 1


@pytest.mark.slow
def test_baseline_command_runs(tmp_path):
    """The first baseline of evaluation.md, with two steps."""
    page = ROOT / ".github" / "docs" / "evaluation.md"
    (block,) = [block for block in fenced_blocks(page, "bash") if block.startswith("clipgen-baseline vqgan-clip")]
    run_in_shell(block.splitlines()[0] + " --steps 2 --cutouts 2 --output images", tmp_path)
    assert list((tmp_path / "images").glob("*.png"))


@pytest.mark.slow
def test_demo_command_runs(tmp_path):
    """README's first command, with fewer steps."""
    run_in_shell(" ".join(["clipgen-demo", *TINY_RUN]), tmp_path)
    assert {"grid.png", "report.json"} <= {path.name for path in (tmp_path / "demo").iterdir()}
