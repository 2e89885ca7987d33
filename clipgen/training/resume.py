"""Resume a run: find its checkpoint, check that it fits, and protect the runs in other folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from clipgen.checkpoint.model_folder import check_model
from clipgen.checkpoint.safe_load import check_tensors, read_checkpoint
from clipgen.data.token_cache import MANIFEST
from clipgen.model_kinds import MODEL_FOLDER_NAMES
from clipgen.models.config import dotted_values
from clipgen.runs import checkpoint_path
from clipgen.storage.files import atomic_write
from clipgen.storage.links import file_inside
from clipgen.training.callbacks.checkpointing import has_model_order

# Entries of a checkpoint to resume, with their types.
CHECKPOINT_TYPES = {
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
    "hyper_parameters": dict,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
}


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
    path = checkpoint_path(resume)
    checkpoint = read_training_state(path, type(model).__name__)
    check_same_network(checkpoint, model, path)
    step = checkpoint["global_step"]
    if 0 <= max_steps < step:
        raise ValueError(f"trainer.max_steps must be at least {step}, the step of {path}, got {max_steps}")
    return str(path)


def read_training_state(path: Path, model: str) -> dict[str, Any]:
    """Read a checkpoint to resume.

    Raises:
        ValueError: it is of another model, or its entries are not those of a training run; the message names the file.
    """
    checkpoint = read_checkpoint(path)
    stored = checkpoint.get("clipgen_model")
    check_model(stored if isinstance(stored, str) else None, model, path)
    for key, entry_type in CHECKPOINT_TYPES.items():
        if not isinstance(checkpoint.get(key), entry_type):
            raise ValueError(f"{path} is damaged: its {key} must be of type {entry_type.__name__}")
    if not isinstance(checkpoint["hyper_parameters"].get("optimizer"), dict):
        raise ValueError(f"{path} is damaged: its hyper_parameters must have the settings of the optimizer")
    check_tensors(dict(checkpoint["state_dict"]), path)
    for number, state in enumerate(checkpoint["optimizer_states"]):
        if not isinstance(state, dict) or not fits_optimizer(state):
            raise ValueError(f"{path} is damaged: its optimizer_states[{number}] is not the state of an optimizer")
        check_tensors(moments_of(state), path)
    return checkpoint


def fits_optimizer(state: dict[str, Any]) -> bool:
    """Return whether a dictionary has the layout of an optimizer's state."""
    moments = state.get("state")
    groups = state.get("param_groups")
    if not isinstance(moments, dict) or not isinstance(groups, list):
        return False
    return all(isinstance(values, dict) for values in [*moments.values(), *groups])


def moments_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors in the state of an optimizer, by name."""
    tensors = {}
    for number, moments in state["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{name} of parameter {number}"] = value
    return tensors


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
    # Rank 0 may already have started to write.
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    output = Path(output)
    resumed = Path(resume).expanduser().resolve() if resume else None
    if resumed and output.resolve() in (resumed, *resumed.parents):
        return
    if (output / MANIFEST).is_file():
        raise FileExistsError(f"output must not be a token cache, whose models would be replaced: {output}")
    if contains_run(output):
        raise FileExistsError(
            f"output already contains a run: {output}. Use resume={output} to resume it, or choose another output"
        )


def contains_run(output: Path) -> bool:
    """Return whether a folder contains a model or a checkpoint of a training run."""
    # Stage 2 copies its tokenizer before it trains, with the name of the CLIP next to it.
    copied = {"vqgan"} if (output / "clip.json").is_file() else set()
    has_model = any((output / name).is_dir() for name in {*MODEL_FOLDER_NAMES.values()} - copied)
    return has_model or any(output.glob("checkpoints/*.ckpt"))


def copy_best_checkpoint(checkpoint: str | None, output: Path) -> None:
    """Copy ``best.ckpt`` of a run that is resumed in another folder, to which the best score in its state belongs."""
    if checkpoint is None:
        return
    best = Path(checkpoint).with_name("best.ckpt")
    target = output / "checkpoints" / "best.ckpt"
    if best.parent.name != "checkpoints" or not best.is_file() or target.exists():
        return
    best = file_inside(best.parent, best.name)
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target) as partial:
        shutil.copyfile(best, partial)
