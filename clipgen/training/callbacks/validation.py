"""Validations that Lightning would leave out."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def run_validation(trainer: pl.Trainer) -> None:
    """Run a validation now, outside of Lightning's schedule."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def validation_due(trainer: pl.Trainer) -> bool:
    """Return whether Lightning would run a validation at the current step."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


class FinalValidation(pl.Callback):
    """Validate after the last step of a training run, unless a validation was due there anyway.

    Every run then has image grids, and its last steps can become ``best.ckpt``.
    """

    def __init__(self) -> None:
        self.validated_step = -1

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.enable_validation and self.validated_step != trainer.global_step:
            run_validation(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning calls only this hook if a run is resumed at its last step.
        self.on_train_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last validation."""
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last validation."""
        self.validated_step = int(state_dict["validated_step"])


class ResumeValidation(pl.Callback):
    """On resume, run a validation that was due when the checkpoint was written but was interrupted.

    Lightning considers it done, so that ``best.ckpt`` could differ from that of an uninterrupted run.
    """

    def __init__(self) -> None:
        # Number of batches at the last validation.
        self.validated_at = -1
        self.must_validate = False

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated_at = trainer.fit_loop.epoch_loop.total_batch_idx

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        validated = self.validated_at == trainer.fit_loop.epoch_loop.total_batch_idx
        checkpoint["validation_owed"] = validation_due(trainer) and not validated

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.must_validate = checkpoint.get("validation_owed", False)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.must_validate:
            self.must_validate = False
            run_validation(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning calls only this hook if a run is resumed at its last step.
        self.on_train_start(trainer, module)
