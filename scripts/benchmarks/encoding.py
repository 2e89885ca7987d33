"""``clipgen-encode`` at the paper's size."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.models import make_clip, paper_tokenizer
from benchmarks.timing import in_new_process, median_seconds, peak_memory, print_table
from clipgen.data.token_cache import record_dtype

IMAGENET_IMAGES = 1_281_167


def run_encode(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the tokenizer and CLIP on images of 256 x 256, and extrapolate to ImageNet."""
    row = in_new_process(measure_encode, args.clip, args.batch, args.steps, args.device)
    print_table(f"256 x 256, {args.clip}, batch {args.batch}", {"tokenizer and CLIP": row}, "images/s")
    views = IMAGENET_IMAGES * args.augmentations
    gigabytes = views * np.dtype(record_dtype(1, 256, 16384, 512)).itemsize / 1e9
    hours = views / row["images/s"] / 3600
    print(f"\nImageNet, {args.augmentations} augmentations: {gigabytes:.1f} GB, {hours:.0f} hours")
    return {"batch": args.batch, "rows": {"encode": row}, "hours": hours}


def measure_encode(clip: str, batch: int, steps: int, device: str) -> dict[str, float]:
    """Return the seconds of the tokenizer and of CLIP, images per second of both, and peak memory."""
    vqgan = paper_tokenizer().to(device)
    encoder = make_clip(clip).to(device)
    images = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1
    with torch.inference_mode():
        tokenizer = median_seconds(lambda: vqgan.encode(images), steps, device)
        embedding = median_seconds(lambda: encoder.encode_image(images), steps, device)
    rate = batch / (tokenizer + embedding)
    return {"tokenizer, s": tokenizer, "CLIP, s": embedding, "images/s": rate, "GiB": peak_memory(device)}
