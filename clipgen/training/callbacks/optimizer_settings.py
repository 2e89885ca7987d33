"""Optimizer settings of a resumed run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer


class OverrideOptimizerSettings(pl.Callback):
    """On resume, apply the configured learning rate, betas and weight decay.

    Lightning restores those of the checkpoint with the optimizers, and would silently ignore the configured ones.
    """

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # The checkpoint is restored after this hook, so the optimizers still have the configured settings.
        self.param_groups = [list(map(dict, optimizer.param_groups)) for optimizer in trainer.optimizers]
        self.base_lrs: list[Any] = [list(config.scheduler.base_lrs) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for optimizer, configured_groups in zip(trainer.optimizers, self.param_groups):
            check_moments(optimizer)
            for group, configured in zip(optimizer.param_groups, configured_groups):
                group.update(configured)
        for config, base_lrs in zip(trainer.lr_scheduler_configs, self.base_lrs):
            set_base_lrs(config.scheduler, base_lrs)


def check_moments(optimizer: Optimizer) -> None:
    """Raise ValueError if the state of an optimizer does not fit its parameters: fused kernels would not notice."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if not isinstance(value, Tensor):
                continue
            fits = value.numel() == 1 if name == "step" else value.shape == parameter.shape
            if not fits:
                raise ValueError(
                    f"the checkpoint must contain {name} of the optimizer as {tuple(parameter.shape)}, got "
                    f"{tuple(value.shape)}: it is damaged, resume an earlier one"
                )


def set_base_lrs(schedule: Any, base_lrs: list[float]) -> None:
    """Replace the base learning rates of a LambdaLR, and set the current rates that follow from them."""
    schedule.base_lrs = base_lrs
    for group, base_lr, multiplier in zip(schedule.optimizer.param_groups, base_lrs, schedule.lr_lambdas):
        group["lr"] = base_lr * multiplier(schedule.last_epoch)
