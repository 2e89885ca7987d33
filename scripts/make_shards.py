"""Turn a folder of images, or a dataset that torchvision knows by name, into webdataset shards.

    python scripts/make_shards.py ~/photos --output data/photos --image-size 288
    python scripts/make_shards.py CIFAR10 --output data/cifar10

writes train-000000.tar, ... and val-000000.tar, ... of JPEG files, in random order that is the same every time. Of a
folder, a share is held out for validation, the same images that `data=folder` would hold out. A torchvision dataset
brings its own test split, and labels: `.cls` files, and their names in classes.json. Unusable files are skipped, with
a warning each. The shards appear when all of them are written; the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
import webdataset as wds
from PIL import Image, ImageOps

from clipgen.data.decoding import UnusableImageError, decode_image, to_rgb
from clipgen.data.folder import scan_folder, split_files
from clipgen.data.skip_counter import SkipCounter
from clipgen.hashing import unit_hash

logger = logging.getLogger("make_shards")

Samples = Iterator[dict[str, bytes]]


def main(argv: list[str] | None = None) -> None:
    """Read the command line, and end with one sentence if it cannot be done."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse(argv)
    try:
        require_new(args.output)
        if Path(args.source).expanduser().is_dir():
            parts, classes = from_folder(Path(args.source).expanduser(), args), None
        else:
            parts, classes = from_torchvision(args.source, args)
        write(parts, classes, args.output, args.shard_size)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"make_shards: {error}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder of images, or the name of a torchvision dataset such as CIFAR10")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=1000, help="images in a shard (default: 1000)")
    parser.add_argument("--val-fraction", type=float, default=0.02, help="share of a folder held out (default: 0.02)")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100 (default: 95)")
    parser.add_argument("--image-size", type=int, help="shrink larger images to this short side (default: keep)")
    parser.add_argument("--root", type=Path, default="data", help="where torchvision downloads to (default: data)")
    args = parser.parse_args(argv)
    if args.shard_size < 1:
        parser.error(f"--shard-size must be at least 1, got {args.shard_size}")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must be in [0, 1), got {args.val_fraction}")
    if not 1 <= args.quality <= 100:
        parser.error(f"--quality must be in [1, 100], got {args.quality}")
    if args.image_size is not None and args.image_size < 1:
        parser.error(f"--image-size must be at least 1, got {args.image_size}")
    return args


def require_new(output: Path) -> None:
    """Raise FileExistsError if there are shards in the output folder."""
    existing = [path for pattern in ("train-*.tar", "val-*.tar", "classes.json") for path in output.glob(pattern)]
    if existing:
        raise FileExistsError(f"--output must be a folder without shards, got {output} with {existing[0].name}")


def from_folder(root: Path, args: argparse.Namespace) -> dict[str, Samples]:
    """Encode the usable images of a folder, split by the hash that `data=folder` splits by."""
    tally = SkipCounter(str(root))
    train, val = split_files(scan_folder(root, tally), args.val_fraction)
    encode = partial(encode_file, tally, partial(to_jpeg, image_size=args.image_size, quality=args.quality))
    return {"train": encode_files(root, train, encode), "val": encode_files(root, val, encode)}


def encode_files(root: Path, files: list[str], encode: Callable[[Path], bytes | None]) -> Samples:
    """Encode files in threads, in an order that mixes the sub-folders."""
    paths = [root / file for file in sorted(files, key=unit_hash)]
    with ThreadPool() as pool:
        for start in range(0, len(paths), 256):  # not all at once, or they would wait in memory for the disk
            for jpeg in pool.map(encode, paths[start : start + 256]):
                if jpeg:
                    yield {"jpg": jpeg}


def encode_file(tally: SkipCounter, encode: Callable[[Image.Image], bytes], path: Path) -> bytes | None:
    """Decode and encode one file; None if it is unusable."""
    try:
        return encode(decode_image(path))
    except UnusableImageError as error:
        tally.skip(str(path), error)
        return None


def to_jpeg(image: Image.Image, image_size: int | None, quality: int) -> bytes:
    """Encode an RGB picture without chroma subsampling, shrunk to the short side `image_size` if it is larger."""
    if image_size and min(image.size) > image_size:
        image = ImageOps.cover(image, (image_size, image_size), Image.Resampling.BICUBIC)
    if max(image.size) > 65_500:
        raise UnusableImageError("too large", f"{image.width} x {image.height}, and JPEG ends at 65500 pixels a side")
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0, comment=b"")  # pixels alone: no place, no camera
    return buffer.getvalue()


def from_torchvision(name: str, args: argparse.Namespace) -> tuple[dict[str, Samples], list[str] | None]:
    """Download a dataset and encode its training and test split, with labels."""
    make = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(make) or name.startswith("_"):
        raise ValueError(f"SOURCE must be an existing folder or the name of a torchvision dataset, got {name}")
    splits = {part: load_split(make, args.root, part) for part in ("train", "val")}
    encode = partial(to_jpeg, image_size=args.image_size, quality=args.quality)
    parts = {part: encode_split(dataset, encode) for part, dataset in splits.items() if dataset is not None}
    return parts, getattr(splits["train"], "classes", None)


def load_split(make: Callable[..., Any], root: Path, part: str) -> Any:
    """Make the training or test split of a torchvision dataset; None if it is not divided and the test is asked for."""
    accepted = inspect.signature(make).parameters
    options = {key: value for key, value in {"root": root, "download": True}.items() if key in accepted}
    if "train" in accepted:
        return make(train=part == "train", **options)
    if part == "train":
        return make(**options)  # where there is a `split`, training is its default
    if "split" not in accepted:
        return None
    try:
        return make(split="test", **options)
    except ValueError:  # some call it so
        return make(split="val", **options)


def encode_split(dataset: Any, encode: Callable[[Image.Image], bytes]) -> Samples:
    """Encode (picture, label) pairs in random order; labels that are no whole numbers are left out."""
    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist():
        image, label = dataset[index][:2]
        if not isinstance(image, Image.Image):
            raise TypeError(f"SOURCE must be a dataset of pictures, got one of {type(image).__name__}")
        sample = {"jpg": encode(to_rgb(image))}
        with suppress(TypeError):
            sample["cls"] = str(operator.index(label)).encode()
        yield sample


def write(parts: dict[str, Samples], classes: list[str] | None, output: Path, shard_size: int) -> None:
    """Write all shards under another name, and move them to the output folder when they are complete."""
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output, prefix=".unfinished-") as folder:
        for part, samples in parts.items():
            written = write_shards(samples, f"{folder}/{part}", shard_size)
            if part == "train" and not written:
                raise ValueError("SOURCE must hold usable training images, got none")
            logger.info("%s: %d images", part, written)
        if classes is not None:
            Path(folder, "classes.json").write_text(json.dumps(list(classes)) + "\n")
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, output / path.name)


def write_shards(samples: Samples, prefix: str, shard_size: int) -> int:
    """Write PREFIX-000000.tar and so on, and return how many samples they hold."""
    written = 0
    for shard, numbered in groupby(enumerate(samples), lambda pair: pair[0] // shard_size):
        with wds.TarWriter(f"{prefix}-{shard:06d}.tar", encoder=False, mtime=0) as tar:
            for number, sample in numbered:
                tar.write({"__key__": f"{number:08d}", **sample})
                written = number + 1
    return written


if __name__ == "__main__":
    main()
