"""Make the logger of a run; a resumed run continues its log instead of starting a second one."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from clipgen.storage.files import read_json, write_json
from clipgen.storage.links import contained
from clipgen.training.config import TrainingConfig
from clipgen.training.csv_logger import CSVLogger
from clipgen.training.instantiate import instantiate

# File in a run folder with the id of its run at Weights & Biases.
WANDB_RUN = "wandb_run.json"
MAX_ID_LENGTH = 128
# Key of a checkpoint: the step under which the next metrics are logged.
NEXT_STEP = "next_logged_step"
WANDB = "pytorch_lightning.loggers.WandbLogger"


def make_logger(config: TrainingConfig) -> Any:
    """Return the logger of a configuration, or False for none.

    Raises:
        ValueError: the file with the id of a resumed Weights & Biases run is damaged.
    """
    section = config.logger
    if "_target_" not in section:
        return False
    if section["_target_"] == WANDB and section.get("id") is None:
        # An id of our own is known before the first step, so that it can be stored with the run.
        run_id = stored_run_id(Path(config.output)) if config.resume else None
        section = section | {"id": run_id or secrets.token_hex(4)}
    return instantiate(section, "logger")


def stored_run_id(output: Path) -> str | None:
    """Return the Weights & Biases id of the run in a folder, or None."""
    path = output / WANDB_RUN
    if not path.is_file():
        return None
    run_id = read_json(path, "id")["id"]
    is_id = isinstance(run_id, str) and run_id.replace("-", "").replace("_", "").isalnum()
    if not is_id or len(run_id) > MAX_ID_LENGTH:
        raise ValueError(f"{path} must contain the id of a run, got {run_id!r:.60}; delete it to start a new run")
    return str(run_id)


def store_run_id(trainer: pl.Trainer, output: Path) -> None:
    """Write the id of a Weights & Biases run to its run folder."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            write_json(output / WANDB_RUN, {"id": logger.version})


def remove_log_links(output: Path) -> None:
    """Remove the links to its log in the user's cache that wandb leaves in a run folder, which no run needs.

    ``refuse_links`` would refuse to resume the run, because they lead out of the folder.
    """
    for path in output.glob("wandb/*/logs/*.log"):
        if path.is_symlink() and contained(path.parent, output):
            path.unlink(missing_ok=True)


def forget_old_log(trainer: pl.Trainer, output: Path) -> None:
    """Delete the ``metrics.csv`` in a run folder whose run ended before its first checkpoint."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and contained(logger.path.parent, output):
            logger.forget_rows()


def close_log(trainer: pl.Trainer) -> None:
    """End the Weights & Biases run of this process, which the next run of a sweep would otherwise continue."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()


class ContinueLog(pl.Callback):
    """Number the logged metrics by optimizer steps, and log each step once, also in a resumed run.

    With manual optimization Lightning counts batches. When it resumes, it adds 1 to the step, which is correct only for
    checkpoints that are written during training. TensorBoard hides what a stopped run has logged after the checkpoint.
    """

    def __init__(self) -> None:
        # This is not 0 in a log of an older version, which counted batches.
        self.offset = 0
        self.steps_before_batch = -1

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        connector: Any = trainer._logger_connector
        log = connector.update_train_step_metrics

        def log_complete_step() -> None:
            if trainer.global_step != self.steps_before_batch:
                log()

        connector.update_train_step_metrics = log_complete_step

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[NEXT_STEP] = trainer.global_step + self.offset

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if NEXT_STEP not in checkpoint:
            return
        self.offset = checkpoint[NEXT_STEP] - checkpoint["global_step"]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                restart = SessionLog(status=SessionLog.START)
                logger.experiment._get_file_writer().add_event(Event(step=checkpoint[NEXT_STEP], session_log=restart))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps_before_batch = trainer.global_step
        self._set_step(trainer, trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Use the number of the last step, also for validations outside of Lightning's schedule.
        self._set_step(trainer, max(trainer.global_step - 1, 0))

    def _set_step(self, trainer: pl.Trainer, step: int) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = step + self.offset
