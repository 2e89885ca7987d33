"""Check that models named on a command line exist, without importing torch, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from clipgen.baselines import GENERATOR_FORMS
from clipgen.bundled import BUNDLED
from clipgen.model_kinds import COMMANDS


def check_model_path(name: str | None, model: str, hint: str = "") -> None:
    """Raise FileNotFoundError if a model is a path that does not exist.

    Args:
        name: path, name of a bundled model, or ``"hf-hub:OWNER/NAME"``; None is also accepted.
        model: the class of the model.
        hint: more to do about it, appended to the error.
    """
    if not name or name in BUNDLED or name.startswith("hf-hub:") or Path(name).expanduser().exists():
        return
    raise FileNotFoundError(f"no {model} checkpoint: {name} does not exist; `{COMMANDS[model]}` makes one{hint}")


def check_generator_path(source: str) -> None:
    """Raise FileNotFoundError if a generator is the path of a run, of a GAN or of a file that does not exist.

    A name such as ``module:function`` is accepted.
    """
    kind, colon, gan = source.partition(":")
    if kind in ("biggan", "sagan") and colon:
        if not Path(gan).expanduser().exists():
            raise FileNotFoundError(f"generator must name an existing file, got {source}")
        return
    # The names of BigGAN's published weights are refused later, with what to do instead.
    if colon or source.startswith("biggan-deep-") or Path(source).expanduser().exists():
        return
    if Path(source).suffix in (".pt", ".pth", ".ts"):
        raise FileNotFoundError(f"no TorchScript file {source}")
    raise FileNotFoundError(f"generator must be {GENERATOR_FORMS}, got {source}, which does not exist")
