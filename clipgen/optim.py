"""Learning-rate schedules, shared by both stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")


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


def make_optimizer(module: torch.nn.Module, hidden: torch.nn.Module, kind: str, learning_rate: float,
                   betas: Sequence[float], weight_decay: float) -> Optimizer:  # fmt: skip
    """AdamW for a module; or ``"muon"``: Muon for the matrices of its part ``hidden``, AdamW for the rest.

    Muon (Jordan et al. 2024, torch.optim.Muon) takes its steps along orthogonalised momentum. They are scaled to the
    length of AdamW's (arXiv:2502.16982), so one learning rate serves both.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {kind!r}")
    groups = decay_groups(module, weight_decay)
    adamw: dict[str, Any] = dict(lr=learning_rate, betas=tuple(betas), fused=True)
    if kind == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    matrices = [p for p in hidden.parameters() if p.ndim == 2 and p.requires_grad]
    for group in groups:
        group["params"] = [p for p in group["params"] if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together(muon, torch.optim.AdamW(groups, **adamw))


class Together(Optimizer):
    """Several optimizers of different parameters as one, for trainers that know only one."""

    def __init__(self, *parts: Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:  # what loading ends with
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """One state and one list of groups, seen by the parts as theirs."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each part."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss


def decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only; biases, norms and single vectors go without (GPT-2's and nanoGPT's custom)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
