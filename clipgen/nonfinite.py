"""Skip optimizer steps with non-finite losses or gradients, and stop a training that has too many of them.

The decision to skip is made on the device: reading it at every step would make the host wait for a GPU. The host reads
the number of skipped steps every ``READ_EVERY`` steps, before a checkpoint is written, and at the end of training.

A skipped step changes nothing with fused Adam and AdamW, which take the decision as ``found_inf``, as from a gradient
scaler. Other optimizers (Muon, and sharded weights) get zero gradients instead: their momentum decays, finitely.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

logger = logging.getLogger(__name__)

READ_EVERY = 10  # steps
NEVER = 2**62
HELP = (
    "a lower model.learning_rate, gradient clipping (stage 1: model.gradient_clip, stage 2: model.optimizer.grad_clip) "
    "or trainer.precision=32-true usually helps"
)


class NonFiniteError(ValueError):
    """A training that cannot continue: its losses, gradients or weights are infinite or NaN."""


class StepGuard:
    """Skips the optimizer steps of one module where a loss or a gradient is not finite, on all ranks alike.

    Args:
        max_skipped_steps: number of consecutive skipped steps that stops the training.
    """

    def __init__(self, max_skipped_steps: int):
        if max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {max_skipped_steps}")
        self.max_skipped_steps = max_skipped_steps
        self.reset()

    def reset(self) -> None:
        """Forget everything, before a training."""
        self.losses: dict[str, Tensor] = {}  # sums over the batches of a step
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.skipped: Tensor | None = None  # consecutive steps up to now
        self.most_skipped: Tensor | None = None  # consecutive steps since the last reading
        self.first_steps: dict[tuple[str, ...], Tensor] = {}  # names -> the step at which each was first non-finite

    def watch(self, losses: dict[str, Tensor]) -> None:
        """Take note of the scalar losses of a batch."""
        for name, value in losses.items():
            value = value.detach().float()
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def protect(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that forward passes change in place; a skipped step restores them."""
        self.saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def before_step(self, optimizers: list[Optimizer], step: int) -> None:
        """Decide whether the optimizers skip step number ``step``, once their gradients are complete."""
        gradients = [gradient for optimizer in optimizers for gradient in gradients_of(optimizer)]
        if not gradients:
            return
        values = self.losses | {"gradient": sum_of_norms(gradients)}
        flags = (~torch.isfinite(torch.stack([value.to(gradients[0].device) for value in values.values()]))).float()
        if dist.is_initialized():  # the same decision on every rank
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.losses = {}
        skip = flags.amax()
        self._count(tuple(values), flags, skip, step)
        for tensor, before in self.saved:
            tensor.data.copy_(torch.where(skip > 0, before, tensor.data))
        for optimizer in optimizers:
            skip_step(optimizer, skip)

    def _count(self, names: tuple[str, ...], flags: Tensor, skip: Tensor, step: int) -> None:
        if self.skipped is None or self.most_skipped is None:
            self.skipped, self.most_skipped = torch.zeros_like(skip), torch.zeros_like(skip)
        self.skipped = (self.skipped + 1) * skip
        self.most_skipped = torch.maximum(self.most_skipped, self.skipped)
        first = self.first_steps.get(names)
        if first is None:
            first = torch.full(flags.shape, NEVER, device=flags.device)
        self.first_steps[names] = torch.where(flags > 0, first.clamp(max=step), first)

    def read(self, step: int) -> int:
        """Return the number of consecutive steps that were skipped up to now, and raise if they are too many."""
        if self.skipped is None or self.most_skipped is None:
            return 0
        now, most = map(int, torch.stack([self.skipped, self.most_skipped]).tolist())
        if most >= self.max_skipped_steps:
            raise NonFiniteError(
                f"training stopped at step {step}: {most} consecutive steps were skipped, {self._cause()}; {HELP}"
            )
        if most:
            logger.warning("Step %d: up to %d consecutive steps were skipped, %s.", step, most, self._cause())
        self.most_skipped = self.skipped
        if not now:
            self.first_steps = {}
        return now

    def finish(self, step: int) -> None:
        """Raise if a training ends in skipped steps: nobody knows whether its weights are good."""
        if now := self.read(step):
            raise NonFiniteError(f"training ended with {now} skipped steps at step {step}, {self._cause()}; {HELP}")

    def _cause(self) -> str:
        """Return what was non-finite first, and when."""
        steps: dict[str, int] = {}
        for names, first in self.first_steps.items():
            for name, step in zip(names, first.tolist()):
                steps[name] = min(step, steps.get(name, NEVER))
        earliest = min(steps.values())
        found = [name for name, step in steps.items() if step == earliest]
        terms = [name for name in found if name != "gradient"] or found  # a loss comes before its gradient
        return f"with a non-finite {' and '.join(terms)} from step {earliest} on"


class StopOnNonFinite(pl.Callback):
    """Reads a ``StepGuard`` now and then, and keeps checkpoints from being replaced where its last step was skipped."""

    def __init__(self, guard: StepGuard):
        self.guard, self.read_at = guard, -1

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.guard.reset()
        self.save = trainer.save_checkpoint

        def save_if_finite(filepath: Any, *arguments: Any, **named: Any) -> None:
            if self.guard.read(trainer.global_step):
                logger.warning("%s is not written at step %d, which was skipped.", filepath, trainer.global_step)
            else:
                self.save(filepath, *arguments, **named)

        trainer.save_checkpoint = save_if_finite  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.save_checkpoint = self.save  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % READ_EVERY == 0 and step != self.read_at:
            self.read_at = step
            self.guard.read(step)
            check_weights(module, step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.guard.finish(trainer.global_step)
        check_weights(module, trainer.global_step)


def check_losses(losses: dict[str, float], step: int) -> None:
    """Raise NonFiniteError if a validation loss is not finite, the same on every rank."""
    bad = [name for name, value in losses.items() if not abs(value) < float("inf")]
    if bad:
        raise NonFiniteError(f"validation at step {step} has a non-finite {' and '.join(bad)}; {HELP}")


@torch.no_grad()
def check_weights(module: nn.Module, step: int | None = None) -> None:
    """Raise NonFiniteError if a weight of a module is not finite, reading the device.

    With a step all ranks must call this, and all raise if one finds something.
    """
    weights = {name: local(tensor) for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    bad = (~torch.isfinite(sum_of_norms(list(weights.values())))).float()
    if step is not None and dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    if not bad:
        return
    names = [name for name, tensor in weights.items() if not torch.isfinite(tensor.norm())]
    where = "" if step is None else f" at step {step}"
    raise NonFiniteError(
        f"the weights of {type(module).__name__} must be finite, got {len(names)} of {len(weights)} that are not"
        f"{where}: {', '.join(names[:1]) or 'those of another rank'}, ...; {HELP}"
    )


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank holds; any other tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def sum_of_norms(tensors: list[Tensor]) -> Tensor:
    """Return a scalar that is finite if and only if all tensors are, and their squares can be added up in fp32."""
    return torch.stack(torch._foreach_norm(tensors)).float().sum()


def gradients_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the gradients that an optimizer will use, as this rank holds them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield local(parameter.grad)


def skip_step(optimizer: Optimizer, skip: Tensor) -> None:
    """Let the next step of an optimizer do nothing where ``skip`` is 1, without reading it; see the module."""
    parts: list[Any] = list(getattr(optimizer, "parts", [optimizer]))
    exact = [part for part in parts if takes_found_inf(part)]
    for part in exact:
        part.found_inf = skip
    if len(exact) < len(parts):
        for gradient in gradients_of(optimizer):
            gradient.masked_fill_(skip > 0, 0.0)


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether an optimizer skips its step by itself where its ``found_inf`` is 1."""
    if not isinstance(optimizer, Adam) or not optimizer.defaults.get("fused"):
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return all(local(p) is p and p.device.type in ("cpu", "cuda") for p in parameters)
