"""Photographs beside what a tokenizer makes of them.

python scripts/reconstruct.py --checkpoint outputs/vqgan/RUN --images photos.tar --image-size 256 --output grid.png
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch

from clipgen import VQGAN
from clipgen.evaluation.sources import open_dataset
from clipgen.images import save_png, to_pil
from clipgen.visualization import grid


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="stage-1 run, checkpoint or model folder, or shapes")
    p.add_argument("--images", required=True, help="folder, shards as for data=webdataset, or shapes")
    p.add_argument("--image-size", type=int, default=256, help="of the central squares, divisible by the tokenizer's f")
    p.add_argument("--count", type=int, default=8)
    p.add_argument("--columns", type=int, default=4, help="pairs in a row")
    p.add_argument("--output", type=Path, default=Path("reconstructions.png"))
    args = p.parse_args()
    vqgan, photos = VQGAN.load(args.checkpoint), open_dataset(args.images, args.image_size, args.count, seed=0)
    samples = islice(iter(photos), args.count)
    images = torch.stack([sample["images"] for sample in samples])
    reconstruction = torch.cat([vqgan(image[None]) for image in images]).clamp(-1, 1)
    psnr = 10 * (4 / (reconstruction - images).square().mean(dim=(1, 2, 3))).log10()
    pairs = torch.stack([images, reconstruction], dim=1).flatten(0, 1)
    print(save_png(grid(to_pil(pairs), columns=2 * args.columns, cell=args.image_size), args.output))
    print(f"PSNR {psnr.mean():.2f} dB over {len(images)} images of {args.image_size} x {args.image_size}")


if __name__ == "__main__":
    main()
