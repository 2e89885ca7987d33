"""Randomness that does not depend on where a run was interrupted."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from clipgen.hashing import hashed_seed


class PerStepSeed(pl.Callback):
    """Seed each step from the seed of the run, the number of the batch and the rank.

    Dropout and noise are then the same in a resumed run as in an uninterrupted one.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        batch_number = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(hashed_seed(f"{self.seed} {batch_number} {trainer.global_rank}"))
