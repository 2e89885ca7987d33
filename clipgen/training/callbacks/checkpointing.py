"""Checkpoints, which are written atomically, at fixed steps and on signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.distributed.tensor import DTensor

from clipgen.optim import parameters_of
from clipgen.storage.files import atomic_write
from clipgen.training.callbacks.validation import ResumeValidation, validation_due

# Steps between two agreements of several processes on whether to stop: each agreement waits for their devices.
STEPS_BETWEEN_AGREEMENTS = 10


def checkpoint_callbacks(folder: str | Path, monitor: str, every_n_steps: int = 1000) -> list[pl.Callback]:
    """Return the callbacks that write ``last.ckpt`` and ``best.ckpt``.

    Args:
        folder: where the checkpoints are written.
        monitor: the metric whose lowest value selects ``best.ckpt``.
        every_n_steps: steps between two writes of ``last.ckpt``.

    Raises:
        ValueError: ``every_n_steps`` is below 1, or higher values of ``monitor`` are better.
    """
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
    last = LastCheckpoint(Path(folder) / "last.ckpt", every_n_steps)
    return [last, ResumeValidation(), ParameterOrder(), BestCheckpoint(folder, monitor)]


# Metrics that cannot select ``best.ckpt``.
HIGHER_IS_BETTER = {"val/psnr", "val/ssim", "val/codebook_usage", "val/perplexity"}


class BestCheckpoint(ModelCheckpoint):
    """Write ``best.ckpt`` whenever ``monitor`` is lower than ever before.

    A checkpoint stores the best score, but no path: the best model is always ``best.ckpt`` in the folder of this run,
    even if the folder was moved, and never a file that a checkpoint from elsewhere names.
    """

    def __init__(self, folder: str | Path, monitor: str):
        if monitor in HIGHER_IS_BETTER:
            raise ValueError(f"monitor must be a metric whose lowest value is the best, got {monitor}")
        super().__init__(
            folder,
            "best",
            monitor,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,  # but after each validation
        )
        self.path = Path(folder) / "best.ckpt"

    @property
    def state_key(self) -> str:
        """The key of Lightning's own class, under which older checkpoints store the score."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        score: Any = state_dict.get("best_model_score")
        valid = isinstance(score, torch.Tensor) and score.numel() == 1 and bool(score.isfinite().all())
        # Without the file, the score is that of a model which this run does not have.
        if not valid or not self.path.is_file():
            return
        path = self.format_checkpoint_name({})
        score = score.reshape(())
        self.best_model_path = path
        self.kth_best_model_path = path
        self.best_model_score = score
        self.kth_value = score
        self.best_k_models = {path: score}


class ParameterOrder(pl.Callback):
    """Number the parameters in optimizer states in the order of the model, which FSDP expects when it loads them.

    An optimizer numbers them in the order of its groups. On one device and under DDP only the position counts.
    """

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            # FSDP has already numbered them so.
            return
        numbers = {id(parameter): number for number, parameter in enumerate(module.parameters())}
        for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"]):
            order = [numbers[id(parameter)] for parameter in parameters_of(optimizer)]
            renumber(state, dict(enumerate(order)))


def renumber(state: dict[str, Any], numbers: Mapping[int, int]) -> None:
    """Replace each parameter number n in the state of an optimizer by ``numbers[n]``."""
    state["state"] = {numbers[old]: moments for old, moments in state["state"].items()}
    groups = []
    for group in state["param_groups"]:
        groups.append({**group, "params": [numbers[old] for old in group["params"]]})
    state["param_groups"] = groups


def has_model_order(state: dict[str, Any], module: pl.LightningModule) -> bool:
    """Return whether an optimizer state is numbered in the order of the model, judging by the shapes of its moments."""
    shapes = [parameter.shape for parameter in module.parameters()]
    for number, moments in state["state"].items():
        if not isinstance(number, int) or number >= len(shapes):
            return False
        tensors = [moment for moment in moments.values() if isinstance(moment, torch.Tensor)]
        if any(tensor.shape not in (shapes[number], torch.Size()) for tensor in tensors):
            return False
    return True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, in the folder where they belong.

    Lightning writes them to the temporary folder first. If that is on another disk, the last step is a copy, which
    can be interrupted.

    Args:
        folder: the only folder in which checkpoints may be removed; None for no folder.
    """

    def __init__(self, folder: Path | None = None):
        super().__init__()
        self.folder = folder

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a regular ``.ckpt`` file directly in ``folder``; ignore any other path."""
        path = Path(path)
        inside = self.folder is not None and path.parent.resolve() == self.folder.resolve()
        if inside and path.suffix == ".ckpt" and path.is_file() and not path.is_symlink():
            path.unlink()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Such files remain if a process was killed while it was writing.
        for leftover in path.parent.glob(f".{path.name}.*.partial"):
            leftover.unlink(missing_ok=True)
        with atomic_write(path) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's error hides the reason of the operating system.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class LastCheckpoint(pl.Callback):
    """Write ``last.ckpt`` every n steps, before each validation, and when a signal asks training to stop.

    While ``handle_signals`` is active, Ctrl-C, SIGTERM and SIGHUP (a closed terminal) save a checkpoint and stop
    training after the current step, or within a validation; several processes stop within ten steps. A second Ctrl-C
    or SIGTERM stops at once. Under SLURM, SIGUSR1 (``--signal=SIGUSR1@120``) does the same and sets ``requeue``.

    Args:
        path: the file to write.
        every_n_steps: steps between two writes.
    """

    def __init__(self, path: Path, every_n_steps: int):
        self.path = path
        self.every_n_steps = every_n_steps
        self.stop_requested = False
        self.requeue = False
        # Optimizer steps at the start of the current batch.
        self.steps_before_batch = -1

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Install the signal handlers while training, and restore the previous ones afterwards."""
        previous = {number: signal.signal(number, self.on_signal) for number in stopping_signals()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask training to stop after the current step."""
        # A closed terminal may send SIGHUP twice, which must not stop at once.
        if self.stop_requested and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        self.stop_requested = True
        self.requeue = self.requeue or number == getattr(signal, "SIGUSR1", None)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning has installed a handler of its own, which stops several processes without a checkpoint.
        if signal.getsignal(signal.SIGINT) == self.on_signal:
            signal.signal(signal.SIGTERM, self.on_signal)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps_before_batch = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps_before_batch:
            # Gradients are being accumulated, and would be missing from the checkpoint.
            return
        due = trainer.global_step % self.every_n_steps == 0 or validation_due(trainer)
        stop = self.agree_to_stop(trainer, due)
        if stop:
            # Lightning logs the metrics of the step after this hook, which is not reached.
            trainer._logger_connector.update_train_step_metrics()
        if stop or due:
            trainer.save_checkpoint(self.path, weights_only=False)
        if stop:
            raise KeyboardInterrupt

    def agree_to_stop(self, trainer: pl.Trainer, due: bool) -> bool:
        """Return whether a signal asked any process to stop, so that all processes stop at the same step.

        Args:
            trainer: the trainer.
            due: a checkpoint or a validation follows, for which the processes wait for each other anyway.
        """
        if trainer.world_size > 1 and not due and trainer.global_step % STEPS_BETWEEN_AGREEMENTS:
            return False
        self.stop_requested = trainer.strategy.reduce_boolean_decision(self.stop_requested, all=False)
        return self.stop_requested

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.steps_before_batch and self.stop_requested:
            raise KeyboardInterrupt


def stopping_signals() -> list[signal.Signals]:
    """Return the signals on which training saves a checkpoint and stops."""
    signals = [signal.SIGINT, signal.SIGTERM]
    # Windows has no SIGHUP; nohup sets it to be ignored, and then it stays ignored.
    hangup = getattr(signal, "SIGHUP", None)
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        signals.append(hangup)
    if "SLURM_JOB_ID" in os.environ and hasattr(signal, "SIGUSR1"):
        signals.append(signal.SIGUSR1)
    return signals
