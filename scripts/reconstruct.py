"""Write a grid of photos next to a tokenizer's reconstructions of them, and print their PSNR.

python -m clipgen reconstruct --vqgan outputs/vqgan/RUN --images photos.tar --image-size 256 --output grid.png
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch

from clipgen import VQGAN
from clipgen.bundled import BUNDLED_NAMES
from clipgen.evaluation.sources import open_dataset
from clipgen.images import psnr, save_png, to_pil
from clipgen.storage.files import user_path
from clipgen.visualization import grid


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vqgan", required=True, help=f"tokenizer: stage-1 run, checkpoint or model folder, {BUNDLED_NAMES}"
    )
    parser.add_argument("--images", required=True, help="folder, shards as for data=webdataset, or shapes")
    parser.add_argument(
        "--image-size",
        type=int,
        default=256,
        help="size of the central squares in pixels, divisible by the tokenizer's f (default: %(default)s)",
    )
    parser.add_argument("--count", type=int, default=8, help="number of images (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=4, help="pairs per row (default: %(default)s)")
    parser.add_argument(
        "--output", type=user_path, default=Path("reconstructions.png"), help="PNG file (default: %(default)s)"
    )
    return parser


@torch.no_grad()
def main() -> None:
    """Reconstruct the first images of a dataset."""
    args = make_parser().parse_args()
    vqgan = VQGAN.load(args.vqgan)
    dataset = open_dataset(args.images, args.image_size, args.count, seed=0)
    images = torch.stack([sample["images"] for sample in islice(iter(dataset), args.count)])
    reconstruction = torch.cat([vqgan(image[None]) for image in images]).clamp(-1, 1)
    pairs = torch.stack([images, reconstruction], dim=1).flatten(0, 1)
    print(save_png(grid(to_pil(pairs), columns=2 * args.columns, cell=args.image_size), args.output))
    mean = psnr(images, reconstruction).mean()
    print(f"PSNR {mean:.2f} dB over {len(images)} images of {args.image_size} x {args.image_size}")


if __name__ == "__main__":
    main()
