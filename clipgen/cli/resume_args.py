"""Which run goes on: with which arguments, from which checkpoint, and in whose folder."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)
ARGUMENTS = "arguments.yaml"  # of the command that made a run folder
LARGEST = 1_000_000  # bytes of it
OWN = ("resume", "output")  # which each command says for itself
AUTO = "auto"  # resume the run in the output folder if there is one, else start it
PLAIN = (str, int, float, bool, type(None))
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def with_the_runs(arguments: list[str]) -> list[str]:
    """Put the arguments of the run that is resumed before those of the command line; ``resume=RUN`` is enough then.

    Raises:
        ValueError: an argument of the run is not one that may be taken over from a file.
    """
    given = by_key([argument for argument in arguments if "=" in argument])
    run = resumed_run(given)
    if run is None:
        return arguments
    before = run_arguments(run, given.keys() - {"stage"})
    stage = by_key([before["stage"]])["stage"][1] if "stage" in before else None
    if "stage" in given and stage not in (None, given["stage"][1]):
        return arguments  # of another model, which is told later
    if "stage" in given:
        before.pop("stage", None)
    if before and not any(int(os.environ.get(name) or 0) for name in RANKS):
        shown = " ".join(text if text.isprintable() else repr(text) for text in before.values())
        logger.info("Resuming %s with its arguments: %s", run, shown)
    quoted = str(run).replace("\\", "\\\\").replace("'", "\\'")
    return list(before.values()) + [f"output='{quoted}'"] * ("output" not in given) + arguments


def resumed_run(given: dict[str, tuple[str, Any]]) -> Path | None:
    """Return the folder of the run that the command line resumes, if it is one."""
    resume, output = (given.get(name, ("", None))[1] for name in ("resume", "output"))
    if resume == AUTO:
        if output is None:
            raise ValueError("resume=auto needs a folder that stays the same: give output=...")
        resume = str(output) if last_checkpoint(str(output)) else None
    return run_of(Path(resume).expanduser()) if isinstance(resume, str) else None


def last_checkpoint(output: str | Path) -> Path | None:
    """Return the checkpoint of a run folder, if there is one."""
    path = Path(output).expanduser() / "checkpoints" / "last.ckpt"
    return path if path.is_file() else None


def settle_resume(config: DictConfig) -> None:
    """Replace ``resume=auto`` by the output folder, if a run in it can be resumed, or by null."""
    if config.resume == AUTO:
        config.resume = str(config.output) if last_checkpoint(str(config.output)) else None


def run_of(resume: Path) -> Path | None:
    """The folder of a run, or the one that a checkpoint lies in."""
    run = resume.parent.parent if resume.parent.name == "checkpoints" else resume
    return run if run.is_dir() else None


def by_key(arguments: list[str]) -> dict[str, tuple[str, Any]]:
    """Key -> argument and value; nothing where Hydra will complain."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(arguments)
    except HydraException:
        return {}
    return {each.key_or_group: (text, each.value()) for text, each in zip(arguments, parsed)}


# ---------------------------------------------------------------------------------------- the arguments of a run folder


def run_arguments(run: Path, given: Collection[str]) -> dict[str, str]:
    """Return the arguments of a run by key, but for those whose key is in ``given``.

    A run folder may be a stranger's: only keys that ``configs/`` has are taken over, with plain values that neither
    run a command or code of a module, nor name a place on the network or a folder to write to.

    Raises:
        ValueError: the file is damaged, or an argument cannot be taken over.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    taken = {}
    for text in read_arguments(run):
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ValueError(f"{run / ARGUMENTS} is damaged: {text!r} is not KEY=VALUE") from error
        key = override.key_or_group
        if key in OWN or key in given:
            continue
        if not harmless(override):
            raise ValueError(
                f"{run / ARGUMENTS} must hold plain settings only, got {text!r}, which is not taken over from a "
                "file: give this argument on the command line, too, if you trust it"
            )
        taken[key] = text
    return taken


def harmless(override: Any) -> bool:
    """Return True if an argument of a file is one that may be taken over without asking the user."""
    changes = override.type is not None and override.type.name == "CHANGE"
    if not changes or override.package is not None or override.is_sweep_override():
        return False
    key, value = override.key_or_group, override.value()
    if key in groups():
        return value is None or (isinstance(value, str) and value in groups()[key])
    values = value if isinstance(value, list) else [value]
    return key in known_keys() and all(isinstance(each, PLAIN) and is_plain(key, each) for each in values)


def is_plain(key: str, value: Any) -> bool:
    """Return True if a value has no effect but on how a model is trained, and in the folder of its run."""
    text = str(value)
    if key == "image_logger.prompts":
        return "${" not in text
    if key.startswith("logger."):
        return key != "logger.save_dir" and not re.search(r"[/\\:]|\.\.|\$\{", text)
    # of what has a colon (URLs, commands, names of models and of functions) these two are known
    known = re.fullmatch(r"(clip|torchvision|timm):[\w.-]+(:[\w.-]+)?|https?://[\w./%+=,{}~*@-]+", text)
    return bool(known) or not re.search(r":|\$\{", text)


@cache
def groups() -> dict[str, set[str]]:
    """Return the groups of ``configs/`` with the names of their options."""
    from clipgen.cli.config import config_dir

    folders = [path for path in Path(config_dir()).iterdir() if path.is_dir()]
    return {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in folders}


@cache
def known_keys() -> set[str]:
    """Return the keys, with dots, that the files of ``configs/`` have."""
    import yaml

    from clipgen.cli.config import config_dir

    found: set[str] = set()
    for file in Path(config_dir()).rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        everywhere = "@package _global_" in text or file.parent == Path(config_dir())
        found.update(dotted(yaml.safe_load(text) or {}, "" if everywhere else f"{file.parent.name}."))
    return found


def dotted(values: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the keys of nested dictionaries, but for those that are Hydra's own."""
    for key, value in values.items():
        if key in ("hydra", "defaults", "_target_"):
            continue
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def read_arguments(run: Path) -> list[str]:
    """What ``write_arguments`` left in a run folder."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A reader without aliases, of which a short file can make a long one."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias")
            return super().compose_node(parent, index)

    path = run / ARGUMENTS
    if not path.is_file():
        return []
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is damaged: it must have at most {LARGEST} bytes, got {path.stat().st_size}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{path} is damaged: it must be a list of KEY=VALUE")
    return found


def write_arguments(run: Path) -> None:
    """Leave the arguments of this command in the run folder, for ``resume``."""
    import yaml
    from hydra.core.hydra_config import HydraConfig

    from clipgen.files import atomic_write

    if HydraConfig.initialized():  # not where the training is part of another program
        arguments = by_key(list(HydraConfig.get().overrides.task))
        kept = [text for key, (text, _) in arguments.items() if key not in OWN]
        with atomic_write(run / ARGUMENTS) as partial:
            partial.write_text(yaml.safe_dump(kept, allow_unicode=True), encoding="utf-8")


def refuse_other_runs(config: DictConfig) -> None:
    """Raise FileExistsError where the run folder holds a run that is not resumed: it would be written over."""
    from pytorch_lightning.utilities import rank_zero_only

    from clipgen.checkpoint.model_folder import FOLDERS

    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process may have begun
        return
    output = Path(str(config.output))
    ours = [Path(str(config.resume)).expanduser().resolve()] if config.resume else []
    if any(output.resolve() in (path, *path.parents) for path in ours):
        return
    begun = {"vqgan"} if (output / "clip.json").is_file() else set()  # what stage 2 copies before it trains
    if any((output / name).is_dir() for name in {*FOLDERS.values()} - begun) or any(output.glob("checkpoints/*.ckpt")):
        raise FileExistsError(
            f"output must not hold another run, got {output}: resume={output} goes on with it, another output leaves it"
        )


def find_checkpoint(resume: str | None, model: pl.LightningModule, max_steps: int) -> str | None:
    """The checkpoint to go on from: a file, or last.ckpt of a run folder; refused where it is of another model."""
    if resume is None:
        return None
    from clipgen.checkpoint.model_folder import check_model
    from clipgen.checkpoint.safe_load import read_checkpoint

    path = Path(resume).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"resume must name a .ckpt or a run folder with checkpoints/last.ckpt, got {resume}")
    checkpoint = read_checkpoint(path)
    check_model(checkpoint.get("clipgen_model"), type(model).__name__, path)
    check_network(checkpoint, model, path)
    if 0 <= max_steps < (step := checkpoint["global_step"]):
        raise ValueError(f"trainer.max_steps must be at least {step}, where {path} stands, got {max_steps}")
    return str(path)


def check_strategy(ckpt: str | None, model: pl.LightningModule, strategy: Any) -> None:
    """Raise ValueError where FSDP would give the optimizer's state in a checkpoint to the wrong parameters."""
    from clipgen.checkpoint.safe_load import read_checkpoint
    from clipgen.training.resume import numbered_as_the_model

    if ckpt is None or strategy != "fsdp":
        return
    states = read_checkpoint(ckpt)["optimizer_states"]
    if not all(numbered_as_the_model(state, model) for state in states):
        raise ValueError(
            f"trainer.strategy must not be fsdp for {ckpt}, which an older version wrote on one device or under DDP: "
            "resume it once without fsdp, whose checkpoints can be resumed with any strategy"
        )


def bring_best(ckpt: str | None, output: Path) -> None:
    """Copy the best model of a run that is resumed in another folder: the best score that is remembered is its own."""
    from clipgen.files import atomic_write

    if ckpt is None:
        return
    best, own = Path(ckpt).with_name("best.ckpt"), output / "checkpoints" / "best.ckpt"
    if best.parent.name == "checkpoints" and best.is_file() and not own.exists():
        own.parent.mkdir(exist_ok=True)
        with atomic_write(own) as partial:
            shutil.copyfile(best, partial)


def check_network(checkpoint: dict[str, Any], model: pl.LightningModule, path: Path) -> None:
    """Raise ValueError where a checkpoint's network or optimizer is not the model's."""
    arguments, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    saved, configured = (settings["optimizer"].get("name") for settings in (arguments, model.hparams))
    if saved != configured:
        raise ValueError(f"model.optimizer.name must be {saved}, as in the checkpoint {path}, got {configured}")
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        other = [f"model.{k}={v}" for k, v in arguments.items() if model.hparams.get(k) != v]
        raise ValueError(f"resume must name a checkpoint of the same model, got {path} with {', '.join(other)}")
