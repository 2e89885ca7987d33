"""Optimizers, learning-rate schedules and the exponential moving average (EMA) of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from clipgen.models.config import TransformerOptimizerConfig
from clipgen.muon import Muon


def make_lr_scheduler(
    optimizer: Optimizer,
    schedule: str,
    warmup_steps: int,
    total_steps: float,
    start_step: int = 0,
) -> LambdaLR:
    """Return a learning-rate scheduler: linear warm-up, then ``"constant"`` or ``"cosine"`` to zero.

    Ours instead of transformers' because an optimizer may take its first step at ``start_step`` of the training: it
    warms up from there, while the cosine still ends with the training.

    Args:
        optimizer: the optimizer to schedule.
        schedule: ``"constant"`` or ``"cosine"``.
        warmup_steps: steps of linear warm-up.
        total_steps: steps of the whole training. Unknown (-1) is allowed for ``"constant"`` only; with infinitely many
            steps ``"cosine"`` stays at its peak.
        start_step: step of the training at which this optimizer takes its first step.

    Raises:
        ValueError: the schedule needs a number of steps, which is unknown.
    """
    if schedule != "constant" and total_steps < 0:  # Lightning returns -1 for epochs of a stream
        raise ValueError(
            f"schedule={schedule!r} needs a finite number of steps, but the dataset is a stream: set "
            "trainer.max_steps, or trainer.limit_train_batches with trainer.max_epochs"
        )
    return LambdaLR(optimizer, lr_lambda(schedule, warmup_steps, total_steps, start_step))


def lr_lambda(
    schedule: str,
    warmup_steps: int,
    total_steps: float,
    start_step: int = 0,
) -> Callable[[int], float]:
    """Return the function from the optimizer's step to the multiplier of the learning rate."""

    def multiplier(step: int) -> float:
        warmup = min((step + 1) / max(warmup_steps, 1), 1.0)
        if schedule == "constant" or math.isinf(total_steps):
            return warmup
        progress = (start_step + step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return warmup * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))

    return multiplier


def total_optimizer_steps(trainer: Any, grad_accum_steps: int) -> float:
    """Return the total number of optimizer steps under manual gradient accumulation.

    Lightning counts one step per batch. The last step of an epoch may have fewer batches.
    """
    batches = trainer.estimated_stepping_batches  # also sets up the data
    if trainer.max_epochs == -1 or math.isinf(trainer.num_training_batches):
        return batches
    steps = math.ceil(trainer.num_training_batches / grad_accum_steps) * trainer.max_epochs
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


class EMA(AveragedModel):
    """Exponential moving average of a network's weights, initialized by the weights after the first step.

    Ours instead of Lightning's EMAWeightAveraging because it averages one sub-module and works with two optimizers.
    torch's AveragedModel reads its counter at every step, which would synchronize with the GPU; this one does not.
    """

    def __init__(self, network: torch.nn.Module, decay: float):
        super().__init__(network)
        self.requires_grad_(False)
        self.decay = decay
        self._initialized = False

    @property
    def initialized(self) -> bool:
        """Whether the average was updated at least once. The counter on the device is read only until then."""
        self._initialized = self._initialized or bool(self.n_averaged > 0)
        return self._initialized

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Update the average after an optimizer step; the first update copies the weights."""
        weight = 1 - self.decay if self.initialized else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for average, buffer in zip(self.module.buffers(), model.buffers()):
            average.copy_(buffer)
        self.n_averaged += 1


def make_optimizer(
    module: torch.nn.Module,
    muon_module: torch.nn.Module,
    config: TransformerOptimizerConfig,
) -> Optimizer:
    """Return AdamW, or Muon for the matrices of the blocks and AdamW for all other parameters.

    Muon's updates are scaled to the norm of AdamW's (arXiv:2502.16982), so both use the same learning rate.

    Args:
        module: the module to train.
        muon_module: the part of ``module`` whose matrices Muon updates if ``config.name`` is ``"muon"``.
        config: name and settings of the optimizer.
    """
    groups = weight_decay_groups(module, config.weight_decay, config.decay_embeddings)
    fused = has_fused_kernels(module.parameters())
    adamw: dict[str, Any] = dict(lr=config.learning_rate, betas=tuple(config.betas), fused=fused)
    if config.name == "adamw":
        optimizer: Any = torch.optim.AdamW(groups, **adamw)
        # Otherwise Lightning refuses to clip gradients in mixed precision, even in bf16.
        optimizer._step_supports_amp_scaling = False
        return optimizer  # type: ignore[no-any-return]
    matrices = [p for p in muon_module.parameters() if p.ndim == 2 and p.requires_grad]
    matrix_ids = {id(p) for p in matrices}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in matrix_ids]
    muon = Muon(matrices, config.learning_rate, config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return OptimizerList(muon, torch.optim.AdamW(groups, **adamw))


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the parameters of an optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_fused_kernels(parameters: Iterable[torch.Tensor]) -> bool:
    """Return whether torch's optimizers have fused kernels on the devices of all parameters."""
    devices = devices_with_fused_kernels()
    return all(p.device.type in devices and p.is_floating_point() for p in parameters)


def devices_with_fused_kernels() -> set[str]:
    """Return the types of devices on which torch's optimizers have fused kernels, as in "cuda"."""
    try:
        from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
    except ImportError:
        # The function is private, so a later version of torch may lack it: use no fused kernels then.
        return set()
    return set(_get_fused_kernels_supported_devices())


class OptimizerList(Optimizer):
    """Several optimizers of different parameters that act as one, for trainers that accept only one.

    Args:
        parts: the optimizers; their parameter groups must be disjoint.
    """

    def __init__(self, *parts: Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; ``load_state_dict`` calls this last."""
        super().__setstate__(state)
        self._share_state()

    def _share_state(self) -> None:
        """Let the parts use this optimizer's state and their slice of its parameter groups.

        ``load_state_dict`` replaces both, and a learning-rate scheduler changes the groups of this optimizer.
        """
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state = self.state
            part.param_groups = self.param_groups[start:end]
            start = end

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step all parts."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss


def weight_decay_groups(module: torch.nn.Module, weight_decay: float, decay_embeddings: bool = True) -> list[dict]:
    """Return parameter groups with weight decay for matrices only, not for biases and norms (the GPT-2 convention).

    Args:
        module: the module to train.
        weight_decay: weight decay of the matrices.
        decay_embeddings: whether the matrices of embeddings are also decayed.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in embeddings)
            (decayed if is_decayed else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
