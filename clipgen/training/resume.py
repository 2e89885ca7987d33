"""Resume a run: find its checkpoint, check that it fits, and protect the runs in other folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

from clipgen.checkpoint.model_folder import FOLDERS, check_model
from clipgen.checkpoint.safe_load import read_checkpoint
from clipgen.files import atomic_write
from clipgen.training.callbacks.checkpointing import has_model_order


def find_checkpoint(resume: str | None, model: pl.LightningModule, max_steps: int) -> str | None:
    """Return the checkpoint to resume, or None for a new run.

    Args:
        resume: a ``.ckpt`` file, or a run folder with ``checkpoints/last.ckpt``.
        model: the model to train.
        max_steps: the step at which training ends; -1 for no limit.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is of another model, or beyond ``max_steps``.
    """
    if resume is None:
        return None
    path = Path(resume).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"resume must name a .ckpt or a run folder with checkpoints/last.ckpt, got {resume}")
    checkpoint = read_checkpoint(path)
    check_model(checkpoint.get("clipgen_model"), type(model).__name__, path)
    check_same_network(checkpoint, model, path)
    step = checkpoint["global_step"]
    if 0 <= max_steps < step:
        raise ValueError(f"trainer.max_steps must be at least {step}, the step of {path}, got {max_steps}")
    return str(path)


def check_same_network(checkpoint: dict[str, Any], model: pl.LightningModule, path: Path) -> None:
    """Raise ValueError unless a checkpoint has the network and the kind of optimizer of a model."""
    settings = checkpoint["hyper_parameters"]
    saved = settings["optimizer"].get("name")
    configured = model.hparams["optimizer"].get("name")
    if saved != configured:
        raise ValueError(f"model.optimizer.name must be {saved}, as in the checkpoint {path}, got {configured}")
    if shapes(checkpoint["state_dict"]) != shapes(model.state_dict()):
        configured_values = dict(dotted_values(model.hparams, "model."))
        saved_values = dotted_values(settings, "model.")
        different = [f"{key}={value}" for key, value in saved_values if configured_values.get(key) != value]
        raise ValueError(f"resume must name a checkpoint of the same model, got {path} with {', '.join(different)}")


def dotted_values(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and the values of nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shapes(state: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of the tensors in a state dict."""
    return {name: tensor.shape for name, tensor in state.items()}


def check_strategy(checkpoint: str | None, model: pl.LightningModule, strategy: Any) -> None:
    """Raise ValueError if FSDP would assign the optimizer's state in a checkpoint to the wrong parameters."""
    if checkpoint is None or strategy != "fsdp":
        return
    states = read_checkpoint(checkpoint)["optimizer_states"]
    if not all(has_model_order(state, model) for state in states):
        raise ValueError(
            f"trainer.strategy must not be fsdp for {checkpoint}, which an older version wrote on one device or under "
            "DDP: resume it once without fsdp, and the new checkpoint can be resumed with any strategy"
        )


def refuse_other_runs(output: str | Path, resume: str | None) -> None:
    """Raise FileExistsError if the run folder contains a run that is not being resumed, and would be overwritten."""
    # the first process may already have started to write
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    output = Path(output)
    resumed = Path(resume).expanduser().resolve() if resume else None
    if resumed and output.resolve() in (resumed, *resumed.parents):
        return
    if contains_run(output):
        raise FileExistsError(
            f"output already contains a run: {output}. Use resume={output} to resume it, or choose another output"
        )


def contains_run(output: Path) -> bool:
    """Return True if a folder contains a model or a checkpoint of a training."""
    # stage 2 copies its tokenizer before it trains, with the name of the CLIP beside it
    copied = {"vqgan"} if (output / "clip.json").is_file() else set()
    has_model = any((output / name).is_dir() for name in {*FOLDERS.values()} - copied)
    return has_model or any(output.glob("checkpoints/*.ckpt"))


def copy_best_checkpoint(checkpoint: str | None, output: Path) -> None:
    """Copy ``best.ckpt`` of a run that is resumed in another folder, to which the best score in its state belongs."""
    if checkpoint is None:
        return
    best = Path(checkpoint).with_name("best.ckpt")
    target = output / "checkpoints" / "best.ckpt"
    if best.parent.name != "checkpoints" or not best.is_file() or target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target) as partial:
        shutil.copyfile(best, partial)
