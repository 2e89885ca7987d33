"""Arguments of a resumed run, which are read from its run folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.hardware.environment import environment_int
from clipgen.storage.files import IS_WINDOWS, check_size, printable, read_yaml

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)
# File in a run folder with the arguments of the command that trained it.
ARGUMENTS = "arguments.yaml"
MAX_BYTES = 1_000_000
# Keys that are never taken from the file.
COMMAND_ONLY = ("resume", "output")
# resume=auto: resume the run in the output folder if there is one, else start it.
AUTO = "auto"
# Options that send data to a host on the network.
NETWORK_OPTIONS = {"wandb"}
# Keys whose values may name a repository on the hub, and a key with a folder to write to.
HUB_KEYS = ("data.dataset", "init_from_gpt2")
REPOSITORY = r"[\w.-]+/[\w.-]+"
FOLDER_KEYS = ("logger.save_dir", "data.cache_dir")
# Keys whose values may be MODULE:FUNCTION, also of a module whose name is that of a drive.
FUNCTION_KEYS = ("metrics.fid_features",)
# Hydra takes a millisecond to parse an argument.
MAX_ARGUMENTS = 1000
MAX_LENGTH = 10_000
SCALARS = (str, int, float, bool, type(None))
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def add_run_arguments(arguments: list[str]) -> list[str]:
    """Insert the arguments of the run to resume before those of the command line, so that ``resume=RUN`` is enough.

    Raises:
        ValueError: an argument of the run must not be taken from a file.
    """
    from clipgen.cli.config import quote

    command_line = parse_by_key([argument for argument in arguments if "=" in argument])
    run = resumed_run(command_line)
    if run is None:
        return arguments
    recorded = run_arguments(run, command_line.keys() - {"stage"})
    recorded_stage = parse_by_key([recorded["stage"]])["stage"][1] if "stage" in recorded else None
    if "stage" in command_line:
        if recorded_stage not in (None, command_line["stage"][1]):
            # The run is of another stage, which is refused when its checkpoint is read.
            return arguments
        recorded.pop("stage", None)
    if (run / "vqgan" / "config.json").is_file():
        # The tokenizer of stage 2 is in the folder, and the one of the command may have been moved or trained again.
        recorded.pop("vqgan", None)
    log_arguments(run, recorded)
    output = [] if "output" in command_line else [f"output={quote(str(run))}"]
    return [*recorded.values(), *output, *arguments]


def log_arguments(run: Path, recorded: dict[str, str]) -> None:
    """Log the arguments that are taken from a run folder, on rank 0 only."""
    is_rank_zero = not any(environment_int(name, 0) for name in RANK_VARIABLES)
    if recorded and is_rank_zero:
        arguments = " ".join(recorded.values())
        logger.info("Resuming %s with its arguments: %s", run, printable(arguments))


def resumed_run(command_line: dict[str, tuple[str, Any]]) -> Path | None:
    """Return the run folder that the command line resumes, or None."""
    resume = command_line["resume"][1] if "resume" in command_line else None
    output = command_line["output"][1] if "output" in command_line else None
    if resume == AUTO:
        if output is None:
            raise ValueError("resume=auto needs a folder that stays the same: give output=...")
        resume = str(output) if last_checkpoint(str(output)) else None
    return find_run(Path(resume).expanduser()) if isinstance(resume, str) else None


def last_checkpoint(output: str | Path) -> Path | None:
    """Return the last checkpoint of a run folder, or None."""
    path = Path(output).expanduser() / "checkpoints" / "last.ckpt"
    return path if path.is_file() else None


def resolve_auto(config: DictConfig) -> None:
    """Replace ``resume=auto`` by the output folder, if it contains a run to resume, or by null."""
    if config.resume == AUTO:
        config.resume = str(config.output) if last_checkpoint(str(config.output)) else None


def find_run(resume: Path) -> Path | None:
    """Return the run folder that a path is, or that a checkpoint lies in; None if there is none."""
    run = resume.parent.parent if resume.parent.name == "checkpoints" else resume
    return run if run.is_dir() else None


def parse_by_key(arguments: list[str]) -> dict[str, tuple[str, Any]]:
    """Return each argument with its parsed value, by key; empty if Hydra cannot parse them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
    except HydraException:
        return {}
    return {override.key_or_group: (text, override.value()) for text, override in zip(arguments, overrides)}


# ---------------------------------------------------------------------------------------- the arguments of a run folder


def run_arguments(run: Path, excluded: Collection[str]) -> dict[str, str]:
    """Return the arguments of a run by key, without the excluded keys.

    A run folder may be untrusted: only keys that ``configs/`` has are accepted, with plain values that
    neither run a command or code of a module, nor name a host on the network or a folder to write to.

    Raises:
        ValueError: the file is damaged, or an argument must not be taken from a file.
    """
    return harmless_arguments(read_arguments(run), run / ARGUMENTS, excluded)


def harmless_arguments(arguments: list[str], path: Path, excluded: Collection[str] = ()) -> dict[str, str]:
    """Return the arguments of a file by key, without the excluded keys, see ``run_arguments``.

    Args:
        arguments: the arguments.
        path: the file, for messages.
        excluded: keys that are left out.

    Raises:
        ValueError: an argument is damaged, or must not be taken from a file.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if len(arguments) > MAX_ARGUMENTS or any(len(argument) > MAX_LENGTH for argument in arguments):
        raise ValueError(
            f"{path} is damaged: it must have at most {MAX_ARGUMENTS} arguments of at most {MAX_LENGTH} letters"
        )
    accepted = {}
    for text in arguments:
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {text!r:.200} is not KEY=VALUE") from error
        key = override.key_or_group
        if key in COMMAND_ONLY or key in excluded:
            continue
        if not is_safe_argument(override):
            raise ValueError(
                f"{path} must contain plain settings only, got {text!r:.500}, which is not accepted from a "
                "file: give this argument also on the command line if you trust it"
            )
        accepted[key] = text
    return accepted


def is_safe_argument(override: Any) -> bool:
    """Return whether an argument may be accepted from a file without asking the user."""
    changes_value = override.type is not None and override.type.name == "CHANGE"
    if not changes_value or override.package is not None or override.is_sweep_override():
        return False
    key = override.key_or_group
    value = override.value()
    if key in config_groups():
        return value is None or (isinstance(value, str) and value in config_groups()[key] - NETWORK_OPTIONS)
    values = value if isinstance(value, list) else [value]
    return key in known_keys() and all(
        isinstance(item, SCALARS) and has_no_outside_effect(key, item) for item in values
    )


def has_no_outside_effect(key: str, value: Any) -> bool:
    """Return whether a value has no effect outside of the run folder and the training."""
    text = str(value)
    if key in FOLDER_KEYS:
        return value is None
    if key in HUB_KEYS and re.fullmatch(REPOSITORY, text) and not Path(text).exists():
        return False
    if key == "image_logger.prompts":
        return "${" not in text
    if key.startswith("logger."):
        return not re.search(r"[/\\:]|\.\.|\$\{", text)
    if IS_WINDOWS and key not in FUNCTION_KEYS:
        text = re.sub(r"^[A-Za-z]:(?=[\\/])", "", text)
    # Values with a colon may be URLs, commands, models or functions; this kind is harmless.
    is_known = re.fullmatch(r"(clip|torchvision|timm):[\w.-]+(:[\w.-]+)?", text)
    # Two slashes begin the name of another host on Windows.
    return bool(is_known) or not re.search(r":|\$\{|^[/\\]{2}", text)


@cache
def config_groups() -> dict[str, set[str]]:
    """Return the groups of ``configs/`` with the names of their options."""
    from clipgen.cli.config import config_dir

    options: dict[str, set[str]] = {}
    for file in Path(config_dir()).glob("*/*.yaml"):
        options.setdefault(file.parent.name, set()).add(file.stem)
    return options


@cache
def known_keys() -> set[str]:
    """Return the dotted keys in the files of ``configs/``."""
    import yaml

    from clipgen.cli.config import config_dir

    keys: set[str] = set()
    for file in Path(config_dir()).rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        is_global = "@package _global_" in text or file.parent == Path(config_dir())
        keys.update(config_keys(yaml.safe_load(text) or {}, "" if is_global else f"{file.parent.name}."))
    return keys


def config_keys(values: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the dotted keys of nested dictionaries, without those that belong to Hydra."""
    for key, value in values.items():
        if key in ("hydra", "defaults", "_target_"):
            continue
        if isinstance(value, dict):
            yield from config_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def read_arguments(run: Path) -> list[str]:
    """Return the arguments in a run folder; empty if it has none."""
    path = run / ARGUMENTS
    if not path.is_file():
        return []
    check_size(path, MAX_BYTES)
    arguments = read_yaml(path)
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise ValueError(f"{path} is damaged: it must be a list of KEY=VALUE")
    return arguments


def command_arguments() -> dict[str, str]:
    """Return the file of the run folder from which ``resume=RUN`` reads the arguments of this command, by name.

    It is left out if the training is part of another program, such as the demo.
    """
    import yaml
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return {}
    arguments = parse_by_key(list(HydraConfig.get().overrides.task))
    kept = [text for key, (text, _) in arguments.items() if key not in COMMAND_ONLY]
    return {ARGUMENTS: yaml.safe_dump(kept, allow_unicode=True)}
