"""Speed and memory, as ratios measured in one run.

    python scripts/benchmark.py vqgan --size cifar
    python scripts/benchmark.py vqgan --size paper --device cuda --batch 16 --variants plain bf16 compile bf16+compile

Each variant runs in a process of its own, so that its peak memory is its own. ``a+b`` switches both on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CIFAR = dict(
    codebook_size=1024, codebook_dim=16, quantizer="cosine", ch=96, ch_mult=[1], num_res_blocks=1, attn_resolutions=[],
    resolution=32, z_channels=96, patch_size=4, mid_attention=False, perceptual_weight=0.0, ndf=32, n_layers=2,
)  # fmt: skip
VQGAN_SIZES: dict[str, dict[str, Any]] = {"cifar": CIFAR, "paper": {}}  # an empty one: the published f16, 16384 x 256
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "compile": {"compile": True}, "channels_last": {"channels_last": True},
    "checkpointing": {"checkpointing": True}, "ema": {"ema_decay": 0.999}, "lecam": {"lecam_weight": 0.1},
    "without_discriminator": {"discriminator_weight": 0.0}, "bf16": {"precision": "bf16-mixed"},
}  # fmt: skip


def options(variant: str) -> dict[str, Any]:
    """What a variant such as ``bf16+compile`` switches on."""
    return {key: value for name in variant.split("+") for key, value in OPTIONS[name].items()}


def rate(function: Callable[[], Any], images: int, steps: int, device: str) -> float:
    """Images a second of ``function``, which handles ``images`` of them, after two calls of warm-up."""
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return images / sorted(seconds[2:])[len(seconds[2:]) // 2]  # by the median


def peak_memory(device: str) -> float:
    """GiB that this process needed at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def measure_vqgan(size: str, variant: str, batch: int, steps: int, device: str, perceptual: bool) -> dict[str, float]:
    """Images a second of a training step, of encoding, of decoding; and peak memory."""
    import pytorch_lightning as pl
    from torchmetrics.functional.image.lpips import _LPIPS

    from clipgen import VQGAN, losses

    arguments = {**VQGAN_SIZES[size], "discriminator_start": 0, **options(variant)}
    precision = arguments.pop("precision", "32-true")
    arguments["perceptual_weight"] = float(perceptual)
    vqgan = VQGAN(**arguments)
    if perceptual:  # its speed does not depend on its weights
        vqgan._lpips = (losses.frozen(_LPIPS(net="vgg", pnet_rand=True)),)
    pixels = vqgan.h.resolution
    images = torch.rand(batch, 3, pixels, pixels) * 2 - 1
    clock = Clock(device)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    data = torch.utils.data.DataLoader([{"images": images}] * (steps + 3), batch_size=None)
    trainer = pl.Trainer(accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=1, precision=precision,
                         callbacks=[clock], **quiet)  # fmt: skip
    trainer.fit(vqgan, data)
    found = {"train": batch / sorted(clock.seconds[3:])[steps // 2], "train_gib": peak_memory(device)}
    vqgan, images = vqgan.eval().to(device), images.to(device)
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision != "32-true"):
        indices = vqgan.encode(images)
        found["encode"] = rate(lambda: vqgan.encode(images), batch, steps, device)
        found["decode"] = rate(lambda: vqgan.decode(indices), batch, steps, device)
    return found


def Clock(device: str) -> Any:
    """A callback that takes the time of each training step."""
    import pytorch_lightning as pl

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def vqgan(args: argparse.Namespace) -> dict[str, Any]:
    """The table of stage 1."""
    batch = args.batch or {"cifar": 24, "paper": 2}[args.size]
    rows = {}
    for variant in args.variants:
        rows[variant] = apart(measure_vqgan, args.size, variant, batch, args.steps, args.device, args.perceptual)
        print(f"{variant}: {json.dumps(rows[variant])}", file=sys.stderr)
    first = rows[args.variants[0]]
    print(f"| {args.size}, batch {batch} | train images/s | ratio | train GiB | encode images/s | decode images/s |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        ratio = row["train"] / first["train"]
        print(f"| {name} | {row['train']:.2f} | {ratio:.2f} | {row['train_gib']:.2f} | {row['encode']:.2f} | "
              f"{row['decode']:.2f} |")  # fmt: skip
    return {"batch": batch, "rows": rows}


def machine(device: str) -> str:
    """What it ran on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, help="JSON to write")
    parts = p.add_subparsers(dest="part", required=True)
    v = parts.add_parser("vqgan", help="stage 1: train step, encode, decode")
    v.add_argument("--size", choices=VQGAN_SIZES, default="cifar")
    v.add_argument("--batch", type=int, help="default: 24 for cifar, 2 for paper")
    v.add_argument("--steps", type=int, default=10, help="measured, after three of warm-up")
    v.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    v.add_argument("--perceptual", action="store_true", help="with LPIPS (random weights)")
    v.add_argument("--variants", nargs="+", default=["plain", "channels_last", "checkpointing", "compile"],
                   help=f"of {', '.join(OPTIONS)}, joined by +; ratios are to the first")  # fmt: skip
    args = p.parse_args()
    for name in {part for variant in args.variants for part in variant.split("+")} - set(OPTIONS):
        p.error(f"variants must be of {', '.join(OPTIONS)}, got {name}")
    found = {"part": args.part, "machine": machine(args.device), **{"vqgan": vqgan}[args.part](args)}
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
