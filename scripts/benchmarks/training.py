"""Training steps of both stages, from images and from a token cache."""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.models import CIFAR_VQGAN, TRANSFORMER_SIZES, VQGAN_SIZES, make_clip, merge, settings_of
from benchmarks.timing import (
    WARM_UP_STEPS,
    StepTimer,
    in_new_process,
    median_seconds,
    peak_memory,
    print_table,
    seconds,
)
from clipgen import VQGAN, ConditionalTransformer
from clipgen.data.shapes import ShapesDataset
from clipgen.data.token_cache import BatchedDataset, TokenCacheDataset, no_collate, record_dtype
from clipgen.models.lpips import build_lpips

PEAK_FLOPS = 989e12  # dense bf16 peak of H100 SXM and H200
CACHE_SHARDS = 20
CACHE_SHARD_SIZE = 10_000
CACHE_READS = 100_000


def measure_training(
    module: pl.LightningModule, data: DataLoader[Any], device: str, precision: str, period: int = 1
) -> dict[str, float]:
    """Return seconds per training step and peak memory; ``period`` as in ``StepTimer``."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as clipgen-train does
    timer = StepTimer(device, period)
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        precision=precision,
        callbacks=[timer],
        benchmark=True,  # cuDNN's, as in configs/trainer
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return {"seconds": timer.seconds_per_step, "GiB": peak_memory(device)}


def make_loader(*arguments: Any, **options: Any) -> DataLoader[Any]:
    """Return a loader that pins memory if there is a GPU, as in training."""
    return DataLoader(*arguments, pin_memory=torch.cuda.is_available(), **options)


# ------------------------------------------------------------------------------------------------------------- stage 1


def run_vqgan(args: argparse.Namespace) -> dict[str, Any]:
    """Measure training, encoding and decoding of stage 1."""
    batch = args.batch or {"cifar": 24, "paper": 1}[args.size]
    rows = {}
    for variant in args.variants:
        rows[variant] = in_new_process(
            measure_vqgan, args.size, variant, batch, args.steps, args.device, args.perceptual
        )
    print_table(f"VQ-GAN, {args.size}, batch {batch}", rows, "train images/s")
    return {"batch": batch, "rows": rows}


def measure_vqgan(size: str, variant: str, batch: int, steps: int, device: str, perceptual: bool) -> dict[str, float]:
    """Return images per second of training, encoding and decoding, and the peak memory of training."""
    settings, precision = settings_of("vqgan", VQGAN_SIZES[size], variant)
    vqgan = VQGAN(**merge(settings, {"loss": {"perceptual_weight": float(perceptual)}, "gan": {"start_step": 0}}))
    if perceptual:  # the speed does not depend on the weights
        vqgan._lpips = (build_lpips(),)
    resolution = vqgan.autoencoder_config.resolution
    images = torch.rand(batch, 3, resolution, resolution) * 2 - 1
    batches = make_loader([{"images": images}] * (steps + WARM_UP_STEPS), batch_size=None)
    step = measure_training(vqgan, batches, device, precision)
    vqgan = vqgan.eval().to(device)
    images = images.to(device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision != "32-true"):
        indices = vqgan.encode(images)
        encode = median_seconds(lambda: vqgan.encode(images), steps, device)
        decode = median_seconds(lambda: vqgan.decode(indices), steps, device)
    return {
        "train images/s": batch / step["seconds"],
        "encode images/s": batch / encode,
        "decode images/s": batch / decode,
        "train GiB": step["GiB"],
    }


# ------------------------------------------------------------------------------------------------------------- stage 2


def run_transformer(args: argparse.Namespace) -> dict[str, Any]:
    """Measure training of stage 2, from images and from a token cache, and reading of the cache."""
    batch = args.batch or {"demo": 32, "cifar": 32, "medium": 1}[args.size]
    rows = {}
    for source in ["cache"] if args.size == "medium" else ["images", "cache"]:
        for variant in args.variants:
            rows[f"from {source}, {variant}"] = in_new_process(
                measure_transformer, args.size, source, variant, batch, args.steps, args.device, args.clip
            )
    print_table(f"GPT-2, {args.size}, batch {batch}", rows, "images/s")
    rate = reading_rate()
    print(f"\nReading a cache of 200 000 images in 20 shards, batches of 256 in random order: {rate:.0f} images/s")
    return {"batch": batch, "rows": rows, "reading": rate}


def measure_transformer(
    size: str, source: str, variant: str, batch: int, steps: int, device: str, clip: str
) -> dict[str, float]:
    """Return images and tokens per second of training and the peak memory; on a GPU also the MFU."""
    settings, precision = settings_of("transformer", TRANSFORMER_SIZES[size], variant)
    if clip != "shapes":
        settings["clip_dim"] = open_clip.get_model_config(clip)["embed_dim"]
    transformer = ConditionalTransformer(**settings)
    clip_loss = transformer.clip_loss_config
    if source == "images" or clip_loss.weight > 0:
        transformer.attach_encoders(VQGAN(**CIFAR_VQGAN).eval(), make_clip(clip))
    number = (steps + WARM_UP_STEPS) * batch
    with tempfile.TemporaryDirectory() as folder:
        if source == "images":
            data = make_loader(ShapesDataset(number), batch)
        else:
            data = random_cache_loader(Path(folder), transformer, number, batch)
        step = measure_training(transformer, data, device, precision, clip_loss.interval)
    images = batch / step["seconds"]
    row = {"images/s": images, "tokens/s": images * transformer.num_tokens, "GiB": step["GiB"]}
    if device == "cuda":
        row["MFU"] = training_flops(transformer) * row["tokens/s"] / PEAK_FLOPS
    return row


def random_cache_loader(folder: Path, transformer: ConditionalTransformer, number: int, batch: int) -> DataLoader[Any]:
    """Write a cache of random records, and return a loader that reads it in random order.

    The records must differ: a GPU multiplies equal numbers faster.
    """
    record = record_dtype(1, transformer.num_tokens, transformer.codebook_size, transformer.clip_dim)
    records = np.empty(number, record)
    records["indices"] = torch.randint(transformer.codebook_size, records["indices"].shape).numpy()
    records["embedding"] = torch.randn(records["embedding"].shape).numpy()
    np.save(folder / "shard-000000.npy", records)
    return cache_loader(folder, batch, number)


def cache_loader(folder: Path, batch: int, number: int) -> DataLoader[Any]:
    """Return a loader of ``number`` records of a cache in random order."""
    data: Any = BatchedDataset(TokenCacheDataset(folder))
    order: Any = torch.randperm(len(data)).tolist()[:number]
    return make_loader(data, batch, sampler=order, collate_fn=no_collate)


def training_flops(transformer: ConditionalTransformer) -> float:
    """Return the floating-point operations per token of training: 6 N + 12 L C T (PaLM, arXiv:2204.02311, App. B).

    N counts the weights of the blocks and of the head, not the embeddings, which are only looked up. Attention counts
    as if every position saw all T: causal attention needs half of the second term. Not counted are the optimizer
    (Muon's Newton-Schulz iterations are also matrix products), recomputation by checkpointing, and the CLIP loss; so
    MFU falls if they are used.
    """
    config = transformer.gpt_config
    blocks = sum(parameter.numel() for parameter in transformer.gpt.transformer.h.parameters())
    parameters = blocks + transformer.gpt.head.weight.numel()
    return 6 * parameters + 12 * config.n_layer * config.n_embd * config.num_tokens


def reading_rate() -> float:
    """Return the images per second that one process reads from a cache of the paper's size."""
    record = record_dtype(1, 256, 16384, 512)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(CACHE_SHARDS):
            np.save(Path(folder) / f"shard-{shard:06d}.npy", np.ones(CACHE_SHARD_SIZE, record))
        batches = cache_loader(Path(folder), 256, CACHE_READS)

        def read() -> int:
            return sum(len(batch["indices"]) for batch in batches)

        number = read()  # the first time brings the files into memory
        return number / seconds(read, "cpu")
