"""Arguments that Hydra's grammar does not accept, and ``~`` in paths."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import pytest
from commands import SHAPES, VQGAN
from omegaconf import OmegaConf

import clipgen
from clipgen.__main__ import scripts_dir
from clipgen.cli import evaluate_args
from clipgen.cli.config import compose_config, expand_home, quote, quote_argument, quote_arguments
from clipgen.storage.files import user_path

UNREADABLE = [
    "it's",
    "a#b",
    "set [a]",
    "Müller/Fotos",
    "a=b",
    "photos (1)",
    'say "hi"',
    'it\'s "both"',
    "back\\",
    "a'\\",
]


@pytest.mark.parametrize("value", UNREADABLE)
def test_the_suggested_quoting_is_read_as_the_value(value):
    """The message contains a word of the shell that works as printed."""
    argument = f"output={value}"
    try:
        suggestion = quote_argument(argument)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{argument} cannot be read: put quotes around the value, ")
        (suggestion,) = shlex.split(message.removeprefix(f"{argument} cannot be read: put quotes around the value, "))
    assert compose_config("stage=vqgan", suggestion).output == value


@pytest.mark.parametrize("argument", ["stage", "output", "a b", "[x]"])
def test_arguments_without_a_key_or_a_value_are_refused(argument):
    with pytest.raises(ValueError, match="arguments must be KEY=VALUE"):
        compose_config("stage=vqgan", argument)


def test_readable_arguments_are_left_alone():
    arguments = [
        "--cfg",
        "job",
        "--multirun",
        "stage=vqgan",
        "~metrics",
        "seed=1,2",
        "data.train_urls='a-{0..1}.tar'",
        "output=",
    ]
    assert quote_arguments(arguments) == arguments


@pytest.mark.parametrize("value", ["~/photos", "~/it's here", "~"])
def test_the_home_directory_needs_no_quotes(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = compose_config("stage=vqgan", "data=folder", f"data.root={value}")
    expand_home(config)
    assert config.data.root == str(Path("/home/me", value[2:]))


def test_the_home_directory_is_expanded_wherever_a_path_is_asked_for(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = OmegaConf.create({"output": "~/run", "data": {"train_urls": ["~/a.tar", "b~.tar"]}, "prompt": "a ~/b"})
    expand_home(config)
    assert config == {
        "output": "/home/me/run",
        "data": {"train_urls": ["/home/me/a.tar", "b~.tar"]},
        "prompt": "a ~/b",
    }


@pytest.mark.parametrize("command", ["clipgen-train", "clipgen-encode"])
def test_commands_read_images_below_the_home_directory(call, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = {"clipgen-train": ["stage=vqgan"], "clipgen-encode": ["vqgan=shapes", "output=cache"]}[command]
    result = call(command, *arguments, "data=folder", "data.root=~/none")
    assert result.code == 1
    assert f"error: data.root must be an existing folder of images, got {tmp_path}/none" in result.stderr


def test_a_run_is_written_and_resumed_below_the_home_directory(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train = partial(call, "clipgen-train")
    assert train(*VQGAN, *SHAPES, "output=~/run", "trainer.max_steps=2", "logger=none").code == 0
    assert (tmp_path / "home" / "run" / "vqgan").is_dir() and not (tmp_path / "~").exists()
    result = train("resume=~/run", "trainer.max_steps=3")
    assert result.code == 0, result.stderr


PROGRAMS = [*Path(clipgen.__file__).parent.rglob("*.py"), *scripts_dir().glob("*.py")]


@pytest.mark.parametrize(
    "program", [path for path in PROGRAMS if "add_argument(" in path.read_text()], ids=lambda path: path.name
)
def test_every_option_with_a_path_expands_the_home_directory(program):
    """Shells leave the tilde of ``--output=~/photos`` alone, and a folder of that name would be made."""
    assert "type=Path" not in program.read_text()


def test_home_directory_in_options(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = evaluate_args.make_parser().parse_args(["--images=~/images", "--output=~"])
    assert (args.images, args.output) == (tmp_path / "images", tmp_path)
    # no user has this name, but a folder may
    assert user_path("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")


def test_text_with_commas_needs_quotes():
    with pytest.raises(ValueError, match=r"""write a list as \[a,b\], a text as 'output="a,b"', or use --multirun"""):
        compose_config("stage=vqgan", "output=a,b")
    assert compose_config("stage=vqgan", 'output="a,b"').output == "a,b"


def test_quotes_are_escaped():
    assert quote("plain") == '"plain"'
    assert quote('say "hi"') == "'say \"hi\"'"
