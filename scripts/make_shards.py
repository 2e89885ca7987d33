"""Turn a folder of images, or a dataset that torchvision knows by name, into webdataset shards.

    python -m clipgen make_shards ~/photos --output data/photos --image-size 288
    python -m clipgen make_shards CIFAR10 --output data/cifar10

writes train-000000.tar, ... and val-000000.tar, ... of JPEG files, in a random order that depends only on the input. A
fraction of a folder is held out for validation, the same images that ``data=folder`` would hold out. A torchvision
dataset has its own test split, and labels: these become ``.cls`` files, and their names classes.json. Unusable files
are skipped with a warning. Shards are moved to the output folder when all of them are complete, and the same input
gives the same bytes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from clipgen.data.color_conversion import to_rgb
from clipgen.data.decoding import UnusableImageError, decode_image
from clipgen.hashing import unit_hash
from clipgen.storage.files import user_path
from clipgen.storage.run_lock import hold_lock

# Modules that import torch, which takes seconds, are imported where they are used: errors in the arguments come first.
if TYPE_CHECKING:
    from clipgen.data.skip_counter import SkipCounter

logger = logging.getLogger("make_shards")

Samples = Iterator[dict[str, bytes]]
BATCH_SIZE = 256  # files encoded at a time
MAX_JPEG_SIDE = 65_500  # pixels, a limit of the format


def main(argv: list[str] | None = None) -> None:
    """Write the shards; exit with an error of one line if that is impossible."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse(argv)
    try:
        require_new(args.output)
        folder = Path(args.source).expanduser()
        if folder.is_dir():
            splits = from_folder(folder, args)
            class_names = None
        else:
            splits, class_names = from_torchvision(args.source, args)
        write(splits, class_names, args.output, args.shard_size)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"make_shards: {error}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of images, or name of a torchvision dataset such as CIFAR10")
    parser.add_argument("--output", type=user_path, required=True, help="folder to write the shards to")
    parser.add_argument("--shard-size", type=int, default=1000, help="images per shard (default: %(default)s)")
    parser.add_argument("--val-fraction", type=float, default=0.02, help="fraction held out (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100 (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="short side to which larger images are resized (default: keep)")
    parser.add_argument(
        "--root", type=user_path, default="data", help="folder for torchvision downloads (default: %(default)s)"
    )
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
    """Encode the usable images of a folder, split as ``data=folder`` does."""
    from clipgen.data.folder import scan_folder, split_files
    from clipgen.data.skip_counter import SkipCounter

    skip_counter = SkipCounter(str(root))
    train, val = split_files(scan_folder(root, skip_counter), args.val_fraction, "--val-fraction")
    to_bytes = partial(to_jpeg, image_size=args.image_size, quality=args.quality)
    encode = partial(encode_file, skip_counter, to_bytes)
    return {"train": encode_files(root, train, encode), "val": encode_files(root, val, encode)}


def encode_files(root: Path, files: Sequence[str], encode: Callable[[Path], bytes | None]) -> Samples:
    """Encode files in threads, in an order that mixes the sub-folders."""
    order = np.fromiter(map(unit_hash, files), float, len(files)).argsort(kind="stable")
    with ThreadPool() as pool:
        # In batches, because results that are not written yet stay in memory.
        for start in range(0, len(files), BATCH_SIZE):
            paths = [root / files[number] for number in order[start : start + BATCH_SIZE]]
            for jpeg in pool.map(encode, paths):
                if jpeg:
                    yield {"jpg": jpeg}


def encode_file(skip_counter: SkipCounter, encode: Callable[[Image.Image], bytes], path: Path) -> bytes | None:
    """Decode and encode one file; return None if it is unusable."""
    try:
        return encode(decode_image(path))
    except UnusableImageError as error:
        skip_counter.skip(str(path), error)
        return None


def to_jpeg(image: Image.Image, image_size: int | None, quality: int) -> bytes:
    """Encode an RGB image without chroma subsampling, resized to the short side ``image_size`` if it is larger."""
    if image_size and min(image.size) > image_size:
        image = ImageOps.cover(image, (image_size, image_size), Image.Resampling.BICUBIC)
    if max(image.size) > MAX_JPEG_SIDE:
        detail = f"{image.width} x {image.height}, but a JPEG has at most {MAX_JPEG_SIDE} pixels per side"
        raise UnusableImageError("too large", detail)
    buffer = BytesIO()
    # Only the pixels are written, without metadata such as location and camera.
    image.save(buffer, "JPEG", quality=quality, subsampling=0, comment=b"")
    return buffer.getvalue()


def from_torchvision(name: str, args: argparse.Namespace) -> tuple[dict[str, Samples], list[str] | None]:
    """Download a dataset and encode its training and test split, with labels."""
    make = find_dataset(name)
    to_bytes = partial(to_jpeg, image_size=args.image_size, quality=args.quality)
    train = load_split(make, args.root, is_train=True)
    val = load_split(make, args.root, is_train=False)
    splits = {"train": encode_split(train, to_bytes)}
    if val is not None:
        splits["val"] = encode_split(val, to_bytes)
    return splits, getattr(train, "classes", None)


def find_dataset(name: str) -> Callable[..., Any]:
    """Return a dataset class of torchvision; raise ValueError if there is none of this name."""
    make = None
    if name.isidentifier() and not name.startswith("_"):
        import torchvision

        make = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(make):
        raise ValueError(f"SOURCE must be an existing folder or the name of a torchvision dataset, got {name}")
    return make


def load_split(make: Callable[..., Any], root: Path, is_train: bool) -> Any:
    """Load the training or test split of a torchvision dataset; return None if it has no test split."""
    parameters = inspect.signature(make).parameters
    options = {name: value for name, value in {"root": root, "download": True}.items() if name in parameters}
    if "train" in parameters:
        return make(train=is_train, **options)
    if is_train:
        # Datasets with a parameter ``split`` have the training images as its default.
        return make(**options)
    if "split" not in parameters:
        return None
    try:
        return make(split="test", **options)
    except ValueError:
        # Some datasets call it "val".
        return make(split="val", **options)


def encode_split(dataset: Any, encode: Callable[[Image.Image], bytes]) -> Samples:
    """Encode (image, label) pairs in random order; labels that are not whole numbers are left out."""
    import torch

    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist():
        image, label = dataset[index][:2]
        if not isinstance(image, Image.Image):
            raise TypeError(f"SOURCE must be a dataset of PIL images, got one of {type(image).__name__}")
        sample = {"jpg": encode(to_rgb(image))}
        with suppress(TypeError):
            sample["cls"] = str(operator.index(label)).encode()
        yield sample


def write(splits: dict[str, Samples], class_names: list[str] | None, output: Path, shard_size: int) -> None:
    """Write all shards to a temporary folder, and move them to the output folder when they are complete."""
    output.mkdir(parents=True, exist_ok=True)
    with hold_lock(output), TemporaryDirectory(dir=output, prefix=".unfinished-") as folder:
        # Another process may have finished its work there.
        require_new(output)
        for split, samples in splits.items():
            num_written = write_shards(samples, f"{folder}/{split}", shard_size)
            if split == "train" and not num_written:
                raise ValueError("SOURCE must contain usable training images, got none")
            logger.info("%s: %d images", split, num_written)
        if class_names is not None:
            Path(folder, "classes.json").write_text(json.dumps(list(class_names)) + "\n")
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, output / path.name)


def write_shards(samples: Samples, prefix: str, shard_size: int) -> int:
    """Write PREFIX-000000.tar and so on, and return the number of samples."""
    import webdataset as wds

    num_written = 0
    # Samples are numbered, and grouped by the number of their shard as they come.
    for shard, numbered_samples in groupby(enumerate(samples), lambda pair: pair[0] // shard_size):
        with wds.TarWriter(f"{prefix}-{shard:06d}.tar", encoder=False, mtime=0) as tar:
            for number, sample in numbered_samples:
                tar.write({"__key__": f"{number:08d}", **sample})
                num_written += 1
    return num_written


if __name__ == "__main__":
    main()
