"""Skip optimizer steps with non-finite losses or gradients, and stop a training run that has too many of them.

The decision to skip is made on the device: reading it at every step would make the host wait for a GPU. The host reads
the number of skipped steps every ``READ_EVERY`` steps, before a checkpoint is written, and at the end of training.

A skipped step changes nothing with fused Adam, fused AdamW and Muon, which receive the decision as ``found_inf``, as
they would from a gradient scaler. Other optimizers, among them Adam on sharded weights, get zero gradients instead:
their moments decay, but stay finite.

The Lightning callback is in this file rather than in ``training/``, because both stages return it from
``configure_callbacks``: a user's own Trainer is then also protected.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from clipgen.muon import Muon, local_rows

logger = logging.getLogger(__name__)

READ_EVERY = 10  # steps
NEVER = 2**62  # later than any step
ADVICE = (
    "a lower model.optimizer.learning_rate, gradient clipping (model.optimizer.grad_clip) or "
    "trainer.precision=32-true usually helps"
)


class NonFiniteError(ValueError):
    """Training cannot continue, because losses, gradients or weights are infinite or NaN."""


class StepGuard:
    """Guard that skips the optimizer steps of a module if a loss or gradient is not finite on any rank.

    Args:
        max_skipped_steps: number of consecutive skipped steps that stops the training.
    """

    def __init__(self, max_skipped_steps: int):
        if max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {max_skipped_steps}")
        self.max_skipped_steps = max_skipped_steps
        self.reset()

    def reset(self) -> None:
        """Reset all state before training."""
        self.losses: dict[str, Tensor] = {}  # sums over the batches of a step
        self.saved: list[tuple[Tensor, Tensor]] = []  # (protected tensor, its value before the step)
        self.skipped: Tensor | None = None  # number of consecutive skipped steps up to now
        self.most_skipped: Tensor | None = None  # maximum of that number since it was last read
        # Names of loss terms -> the step at which each was first non-finite.
        self.first_steps: dict[tuple[str, ...], Tensor] = {}

    def record(self, losses: dict[str, Tensor]) -> None:
        """Record the scalar losses of a batch."""
        for name, value in losses.items():
            value = value.detach().float()
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def protect(self, tensors: Iterable[Tensor]) -> None:
        """Save tensors that the forward pass changes in place; a skipped step restores them."""
        self.saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def before_step(self, optimizers: list[Optimizer], step: int) -> None:
        """Decide whether the optimizers skip step number ``step``, once their gradients are complete."""
        gradients = list(chain.from_iterable(map(gradients_of, optimizers)))
        if not gradients:
            return
        values = self.losses | {"gradient": sum_of_norms(gradients)}
        stacked = torch.stack([value.to(gradients[0].device) for value in values.values()])
        flags = (~torch.isfinite(stacked)).float()
        if dist.is_initialized():
            # All ranks take the same decision.
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.losses = {}
        skip = flags.amax()
        self._update_counts(tuple(values), flags, skip, step)
        for tensor, before in self.saved:
            tensor.data.copy_(torch.where(skip > 0, before, tensor.data))
        for optimizer in optimizers:
            skip_step(optimizer, skip)

    def _update_counts(self, names: tuple[str, ...], flags: Tensor, skip: Tensor, step: int) -> None:
        if self.skipped is None or self.most_skipped is None:
            self.skipped = torch.zeros_like(skip)
            self.most_skipped = torch.zeros_like(skip)
        self.skipped = (self.skipped + 1) * skip
        self.most_skipped = torch.maximum(self.most_skipped, self.skipped)
        first = self.first_steps.get(names)
        if first is None:
            first = torch.full(flags.shape, NEVER, device=flags.device)
        self.first_steps[names] = torch.where(flags > 0, first.clamp(max=step), first)

    def read(self, step: int) -> int:
        """Return the number of consecutive skipped steps up to now; raise NonFiniteError if there were too many."""
        if self.skipped is None or self.most_skipped is None:
            return 0
        current, most = map(int, torch.stack([self.skipped, self.most_skipped]).tolist())
        if most >= self.max_skipped_steps:
            raise NonFiniteError(
                f"training stopped at step {step}: {most} consecutive steps were skipped, {self._cause()}; {ADVICE}"
            )
        if most:
            logger.warning("Step %d: up to %d consecutive steps were skipped, %s.", step, most, self._cause())
        self.most_skipped = self.skipped
        if not current:
            self.first_steps = {}
        return current

    def finish(self, step: int) -> None:
        """Raise NonFiniteError if the last steps were skipped: the weights may already be unusable."""
        skipped = self.read(step)
        if skipped:
            raise NonFiniteError(
                f"training ended with {skipped} skipped steps at step {step}, {self._cause()}; {ADVICE}"
            )

    def _cause(self) -> str:
        """Return a phrase that names the terms that were non-finite first, and the step."""
        steps: dict[str, int] = {}
        for names, first in self.first_steps.items():
            for name, step in zip(names, first.tolist()):
                steps[name] = min(step, steps.get(name, NEVER))
        earliest = min(steps.values())
        first_terms = [name for name, step in steps.items() if step == earliest]
        # A non-finite loss makes its gradient non-finite.
        losses = [name for name in first_terms if name != "gradient"]
        terms = losses or first_terms
        return f"with a non-finite {' and '.join(terms)} from step {earliest} on"


class StopOnNonFinite(pl.Callback):
    """Stop training after too many skipped steps, and do not write checkpoints after a skipped step.

    Args:
        guard: the guard of the module that is trained.
    """

    def __init__(self, guard: StepGuard):
        self.guard = guard
        self.last_read = -1

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.guard.reset()
        self.save = trainer.save_checkpoint

        # All checkpoint callbacks save through the trainer, so one replacement covers them.
        def save_if_finite(filepath: Any, *args: Any, **kwargs: Any) -> None:
            if self.guard.read(trainer.global_step):
                logger.warning(
                    "%s was not written at step %d, because that step was skipped.", filepath, trainer.global_step
                )
            else:
                self.save(filepath, *args, **kwargs)

        trainer.save_checkpoint = save_if_finite  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.save_checkpoint = self.save  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % READ_EVERY == 0 and step != self.last_read:
            self.last_read = step
            self.guard.read(step)
            check_weights(module, step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.guard.finish(trainer.global_step)
        check_weights(module, trainer.global_step)


def check_loss(loss: float, step: int) -> None:
    """Raise NonFiniteError if the loss of a training run without a guard is not finite."""
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"training stopped at step {step} with a loss of {loss}; a lower learning rate usually helps"
        )


def check_losses(losses: dict[str, float], step: int) -> None:
    """Raise NonFiniteError if a validation loss, which must be equal on all ranks, is not finite."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"validation at step {step} has a non-finite {' and '.join(bad)}; {ADVICE}")


@torch.no_grad()
def check_weights(module: nn.Module, step: int | None = None) -> None:
    """Raise NonFiniteError if a weight of a module is not finite. Synchronizes with the device.

    Args:
        module: the module to check.
        step: step to name in the message. If given, all ranks must call this, and all raise if one of them must.
    """
    weights = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            weights[name] = local_rows(tensor)
    bad = (~torch.isfinite(sum_of_norms(list(weights.values())))).float()
    if step is not None and dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    if not bad:
        return
    names = [name for name, tensor in weights.items() if not torch.isfinite(tensor.norm())]
    where = "" if step is None else f" at step {step}"
    raise NonFiniteError(
        f"the weights of {type(module).__name__} must be finite, got {len(names)} of {len(weights)} that are not"
        f"{where}: {', '.join(names[:1]) or 'those of another rank'}, ...; {ADVICE}"
    )


def sum_of_norms(tensors: list[Tensor]) -> Tensor:
    """Return a scalar that is finite only if all tensors are. (It also overflows if their norms do.)"""
    return torch.stack(torch._foreach_norm(tensors)).float().sum()


def gradients_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the gradients that an optimizer will use; of sharded ones, the part on this rank."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield local_rows(parameter.grad)


def skip_step(optimizer: Optimizer, skip: Tensor) -> None:
    """Make the next step of an optimizer have no effect if ``skip`` is 1, without reading it; see the module."""
    parts: list[Any] = list(getattr(optimizer, "parts", [optimizer]))
    exact = [part for part in parts if takes_found_inf(part)]
    for part in exact:
        part.found_inf = skip
    if len(exact) < len(parts):
        # All gradients, because clipping by their common norm would spread a NaN of one part to the others.
        for gradient in gradients_of(optimizer):
            gradient.masked_fill_(skip > 0, 0.0)


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Return whether an optimizer skips its step exactly when its ``found_inf`` is 1."""
    if isinstance(optimizer, Muon):
        return True
    if not isinstance(optimizer, Adam) or not optimizer.defaults.get("fused"):
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return all(local_rows(p) is p and p.device.type in ("cpu", "cuda") for p in parameters)
