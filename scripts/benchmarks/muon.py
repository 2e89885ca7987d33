"""A step of Muon compared with AdamW and with the products of its iteration; loss curves in float32 and bfloat16."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.models import TRANSFORMER_SIZES
from benchmarks.timing import alternating_medians, print_table
from clipgen import ConditionalTransformer, muon
from clipgen.cli.config import compose_config
from clipgen.data.shapes import ShapesDataset
from clipgen.models.conditioning import add_condition_noise
from clipgen.optim import make_lr_scheduler, make_optimizer
from clipgen.training.config import TrainingConfig
from clipgen.training.model_builder import build

BATCH_SIZE = 32
RATE_SIZE = 2048  # rows and columns of the product that measures the matrix rate
RATE_COPIES = 4
ITERATIONS = 5  # Muon's default


def run_muon(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the step, or compare the loss curves."""
    if args.curves:
        return compare_curves(args)
    row = measure_step(args)
    print_table(f"Muon, {args.size}", {"a step": row}, "AdamW step, s")
    return {"rows": {"a step": row}}


def measure_step(args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of a step of AdamW and of Muon, and what the products of the iteration alone take.

    The last is the number of floating-point operations of the plain iteration at the rate of a large product in the
    same dtype.
    """
    transformer = ConditionalTransformer(**TRANSFORMER_SIZES[args.size]).to(args.device)
    for parameter in transformer.parameters():
        parameter.grad = torch.randn_like(parameter)
    blocks = transformer.gpt.transformer.h
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    dtype = muon.native_dtype(matrices[0].device)
    operands = torch.randn(RATE_COPIES, RATE_SIZE, RATE_SIZE, dtype=dtype, device=args.device)
    config = transformer.optimizer_config
    adamw = make_optimizer(transformer, blocks, config)
    both = make_optimizer(transformer, blocks, config.__class__(**{**vars(config), "name": "muon"}))
    seconds = alternating_medians(
        {"adamw": adamw.step, "muon": both.step, "rate": lambda: torch.bmm(operands, operands)},
        args.steps,
        args.device,
    )
    rate = 2 * RATE_COPIES * RATE_SIZE**3 / seconds["rate"]
    products = sum(plain_flops(matrix) for matrix in matrices) / rate
    return {
        "AdamW step, s": seconds["adamw"],
        "Muon step, s": seconds["muon"],
        "products of the iteration, s": products,
        "Muon step / products": seconds["muon"] / products,
        "GFLOP/s": rate / 1e9,
    }


def plain_flops(matrix: Tensor) -> int:
    """Return the floating-point operations of the plain iteration of a matrix of m rows and n >= m columns."""
    rows, columns = sorted(matrix.shape)
    return ITERATIONS * (4 * rows**2 * columns + 2 * rows**3)


def compare_curves(args: argparse.Namespace) -> dict[str, Any]:
    """Train the demo's stage 2 with both dtypes of the iteration, and print both curves of the loss.

    All else is equal: weights, images and their order. The loss is averaged over tenths of the training.
    """
    curves = {}
    for dtype in (torch.float32, torch.bfloat16):
        with iteration_dtype(dtype):
            curves[str(dtype).removeprefix("torch.")] = loss_curve(args)
    rows = {}
    for number, (first, second) in enumerate(zip(*curves.values())):
        rows[f"{number + 1}/{len(curves['float32'])}"] = {
            "float32": first,
            "bfloat16": second,
            "difference": second - first,
        }
    print_table(f"cross-entropy, {args.steps} steps", rows, "float32")
    return {"steps": args.steps, "curves": curves}


@contextmanager
def iteration_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let Muon iterate in a dtype, regardless of the device."""
    native = muon.native_dtype
    muon.native_dtype = lambda device: dtype
    try:
        yield
    finally:
        muon.native_dtype = native


def loss_curve(args: argparse.Namespace) -> list[float]:
    """Return the mean cross-entropy in each tenth of a run with the demo's recipe and the bundled tokenizer."""
    torch.manual_seed(0)
    config = compose_config("stage=transformer", "experiment=shapes", "vqgan=shapes", f"trainer.max_steps={args.steps}")
    transformer: Any = build(TrainingConfig.from_dict(OmegaConf.to_container(config, resolve=True)))
    settings = transformer.optimizer_config
    optimizer = make_optimizer(transformer, transformer.gpt.transformer.h, settings)
    scheduler = make_lr_scheduler(optimizer, settings.schedule, settings.warmup_steps, args.steps)
    losses = []
    for batch in DataLoader(ShapesDataset(BATCH_SIZE * args.steps, seed=1), BATCH_SIZE):
        indices, condition = transformer.prepare_batch(batch)
        condition = add_condition_noise(condition, transformer.conditioning_config.noise_cosine)
        loss, _ = transformer.gpt(indices, condition, with_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return [part.mean().item() for part in torch.stack(losses).chunk(10)]
