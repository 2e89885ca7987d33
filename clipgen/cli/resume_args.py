"""Which run goes on: with which arguments, from which checkpoint, and in whose folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

ARGUMENTS = "arguments.yaml"  # of the command that made a run folder
OWN = ("resume", "output")  # which each command says for itself


def with_the_runs(arguments: list[str]) -> list[str]:
    """``resume=RUN`` is enough: the arguments of that run, its folder included, stand before those that are given."""
    given = by_key([argument for argument in arguments if "=" in argument])
    resume = given["resume"][1] if "resume" in given else None
    if not isinstance(resume, str) or not (run := run_of(Path(resume).expanduser())):
        return arguments
    before = by_key(read_arguments(run))
    if "stage" in given and before.get("stage", given["stage"])[1] != given["stage"][1]:
        return arguments  # of another model, which is told later
    kept = [text for key, (text, _) in before.items() if key not in given]
    quoted = str(run).replace("\\", "\\\\").replace("'", "\\'")
    return kept + [f"output='{quoted}'"] * ("output" not in given) + arguments


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


def read_arguments(run: Path) -> list[str]:
    """What ``write_arguments`` left in a run folder."""
    import yaml

    path = run / ARGUMENTS
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not isinstance(found, list):
        raise ValueError(f"{path} is damaged: it holds no list")
    return [str(argument) for argument in found]


def write_arguments(run: Path) -> None:
    """Leave the arguments of this command in the run folder, for ``resume``."""
    import yaml
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():  # not where the training is part of another program
        arguments = by_key(list(HydraConfig.get().overrides.task))
        kept = [text for key, (text, _) in arguments.items() if key not in OWN]
        (run / ARGUMENTS).write_text(yaml.safe_dump(kept, allow_unicode=True), encoding="utf-8")


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


def check_network(checkpoint: dict[str, Any], model: pl.LightningModule, path: Path) -> None:
    """Raise ValueError where a checkpoint's network or optimizer is not the model's."""
    arguments, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    saved, configured = (settings["optimizer"].get("name") for settings in (arguments, model.hparams))
    if saved != configured:
        raise ValueError(f"model.optimizer.name must be {saved}, as in the checkpoint {path}, got {configured}")
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        other = [f"model.{k}={v}" for k, v in arguments.items() if model.hparams.get(k) != v]
        raise ValueError(f"resume must name a checkpoint of the same model, got {path} with {', '.join(other)}")
