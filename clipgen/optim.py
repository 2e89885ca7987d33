"""Learning-rate schedules, shared by both stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "cosine")


def schedule(optimizer: Optimizer, kind: str, warmup_steps: int, total_steps: float) -> LambdaLR:
    """Linear warm-up over ``warmup_steps``, then ``"constant"`` or ``"cosine"`` to zero at ``total_steps``."""
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    return LambdaLR(optimizer, factor(kind, warmup_steps, total_steps))


def factor(kind: str, warmup_steps: int, total_steps: float) -> Callable[[int], float]:
    """Step -> what the learning rate is multiplied by."""

    def at(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if kind == "constant" or math.isinf(total_steps):
            return 1.0
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return at


def optimizer_steps(trainer: Any, accumulate: int) -> float:
    """Steps that a training will take where a module accumulates by itself: Lightning counts one a batch."""
    batches = trainer.estimated_stepping_batches
    return batches if batches == trainer.max_steps else math.ceil(batches / accumulate)


@torch.no_grad()
def move_average_(decay: float, averages: list[Tensor], now: list[Tensor], steps: int) -> None:
    """Exponential moving average, as ``AveragedModel`` wants it; torch's own cannot be pickled, which DDP may need."""
    torch._foreach_lerp_(averages, now, 1 - decay)


def decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only; biases, norms and single vectors go without (GPT-2's and nanoGPT's custom)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
