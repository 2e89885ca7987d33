"""Optimizers, learning-rate schedules and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")


def schedule(optimizer: Optimizer, kind: str, warmup_steps: int, total_steps: float, start: int = 0) -> LambdaLR:
    """Linear warm-up over ``warmup_steps``, then ``"constant"`` or ``"cosine"`` to zero at ``total_steps``; for an
    optimizer that takes its first step at step ``start`` of the training, where it warms up and the cosine goes on."""
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if kind != "constant" and total_steps < 0:  # -1 is Lightning's word for epochs of a stream
        raise ValueError(
            f"schedule must be 'constant' where an epoch has no end, got {kind!r}: give trainer.max_steps, or "
            "trainer.limit_train_batches with trainer.max_epochs"
        )
    return LambdaLR(optimizer, factor(kind, warmup_steps, total_steps, start))


def factor(kind: str, warmup_steps: int, total_steps: float, start: int = 0) -> Callable[[int], float]:
    """Step of the optimizer -> what the learning rate is multiplied by."""

    def at(step: int) -> float:
        warm = min((step + 1) / max(warmup_steps, 1), 1.0)
        if kind == "constant" or math.isinf(total_steps):
            return warm
        done = (start + step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return warm * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))

    return at


def optimizer_steps(trainer: Any, accumulate: int) -> float:
    """Steps that a training will take where a module accumulates by itself: Lightning counts one a batch. The last step
    of an epoch may have fewer batches."""
    batches = trainer.estimated_stepping_batches  # sets up the data, too
    if trainer.max_epochs == -1 or math.isinf(trainer.num_training_batches):
        return batches
    steps = math.ceil(trainer.num_training_batches / accumulate) * trainer.max_epochs
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


class EMA(AveragedModel):
    """Exponential moving average of a network's weights, from those after the first step on.

    torch's own reads its counter at every step, which would synchronise with the GPU.
    """

    def __init__(self, network: torch.nn.Module, decay: float):
        super().__init__(network)
        self.requires_grad_(False)
        self.decay, self.begun = decay, False

    @property
    def started(self) -> bool:
        """Whether there is an average yet."""
        self.begun = self.begun or bool(self.n_averaged > 0)
        return self.begun

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Take in the weights after a step."""
        weight = 1 - self.decay if self.started else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for ours, theirs in zip(self.module.buffers(), model.buffers()):
            ours.copy_(theirs)
        self.n_averaged += 1


def make_optimizer(
    module: torch.nn.Module,
    hidden: torch.nn.Module,
    kind: str,
    learning_rate: float,
    betas: Sequence[float],
    weight_decay: float,
) -> Optimizer:
    """AdamW for a module; or ``"muon"``: Muon for the matrices of its part ``hidden``, AdamW for the rest.

    Muon (Jordan et al. 2024, torch.optim.Muon) takes its steps along orthogonalised momentum. They are scaled to the
    length of AdamW's (arXiv:2502.16982), so one learning rate serves both.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {kind!r}")
    groups = weight_decay_groups(module, weight_decay)
    adamw: dict[str, Any] = dict(lr=learning_rate, betas=tuple(betas), fused=True)
    if kind == "adamw":
        optimizer: Any = torch.optim.AdamW(groups, **adamw)
        optimizer._step_supports_amp_scaling = False  # else Lightning refuses to clip gradients, in bf16 too
        return optimizer  # type: ignore[no-any-return]
    matrices = [p for p in hidden.parameters() if p.ndim == 2 and p.requires_grad]
    for group in groups:
        group["params"] = [p for p in group["params"] if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    return OptimizerList(muon, torch.optim.AdamW(groups, **adamw))


class OptimizerList(Optimizer):
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


def weight_decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only; biases, norms and single vectors go without (GPT-2's and nanoGPT's custom)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
