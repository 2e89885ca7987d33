"""Optimizer settings of a resumed run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class OverrideOptimizerSettings(pl.Callback):
    """On resume, apply the configured learning rate, betas and weight decay.

    Lightning restores those of the checkpoint with the optimizers, and would silently ignore the configured ones.
    """

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # the checkpoint is restored after this hook, so the optimizers still have the configured settings
        self.param_groups = [list(map(dict, optimizer.param_groups)) for optimizer in trainer.optimizers]
        self.base_lrs: list[Any] = [list(config.scheduler.base_lrs) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for optimizer, configured_groups in zip(trainer.optimizers, self.param_groups):
            for group, configured in zip(optimizer.param_groups, configured_groups):
                group.update(configured)
        for config, base_lrs in zip(trainer.lr_scheduler_configs, self.base_lrs):
            set_base_lrs(config.scheduler, base_lrs)


def set_base_lrs(schedule: Any, base_lrs: list[float]) -> None:
    """Replace the base learning rates of a LambdaLR, and set the current rates that follow from them."""
    schedule.base_lrs = base_lrs
    for group, base_lr, multiplier in zip(schedule.optimizer.param_groups, base_lrs, schedule.lr_lambdas):
        group["lr"] = base_lr * multiplier(schedule.last_epoch)
