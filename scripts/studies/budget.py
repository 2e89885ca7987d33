"""The cost of a training step in floating-point operations, counted and not timed."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clipgen.cli.train import to_training_config
from clipgen.optim import make_optimizer
from clipgen.training import build
from clipgen.training.instantiate import instantiate


def flops_per_step(config: DictConfig) -> int:
    """Return the floating-point operations of one training step: forward and backward pass, CLIP loss, optimizer.

    Matrix products and convolutions count. Attention is computed by matrix products here, so that it also counts.
    """
    training_config = to_training_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = instantiate(training_config.data, "data")
        model: Any = build(training_config).train()
        batch = next(iter(data.train_dataloader()))
        model.log = lambda *args, **kwargs: None
        optimizer = make_optimizer(model, model.gpt.transformer.h, model.optimizer_config)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.training_step(batch, 0).backward()
            optimizer.step()
    return int(counter.get_total_flops())


def equal_flops_steps(steps: int, reference: int, cost: int) -> int:
    """Return the number of steps of a given cost with the operations of ``steps`` of the reference, at least 1."""
    return max(round(steps * reference / cost), 1)
