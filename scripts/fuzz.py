"""Feed mutated files to every reader of foreign files: each must be read, or refused by one sentence.

    python -m clipgen fuzz --minutes 10
    python -m clipgen fuzz --target png --seed 7 --inputs 1      # repeat one input

Each input follows from its target and its seed alone. A finding is any exception other than ValueError and OSError, a
message of several lines, more than ``--seconds`` of processor time or ``--memory`` MiB of additional memory. Findings
are written to ``--output``; those that were fixed stay in scripts/fuzz_seeds.json and are replayed first.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import random
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import clipgen
from clipgen import VQGAN, ConditionalTransformer, FrozenCLIP
from clipgen.bundled import BUNDLED
from clipgen.checkpoint.safe_load import read_checkpoint
from clipgen.storage.files import read_json, read_mapping, user_path

SHAPES = BUNDLED["shapes"]
SEEDS = Path(__file__).with_name("fuzz_seeds.json")
EXPECTED = (ValueError, OSError)  # what a reader may raise for a malformed file

# Values that have broken parsers before: limits of integers, non-finite numbers, other types, deep nesting.
JSON_VALUES = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 1000,
    "\x1b[31m",
    "../..",
    [],
    [1] * 1000,
    [[[[]]]],
    {},
    {"trust_remote_code": True},
    {"_target_": "os.system"},
]
YAML_SNIPPETS = [
    "&a [*a]",
    "!!python/object/apply:os.system [true]",
    "[[[[[[",
    "- - - -",
    "{a: b",
    "\t",
    "? ",
    "1e999",
    "\x00",
]
BYTES = [b"\x00", b"\xff", b"\n", b"{", b"}", b"[", b"]", b'"', b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff"]


@dataclass(frozen=True)
class Target:
    """A reader of files and how its inputs are made.

    Args:
        make: writes a mutated file into a folder and returns the path to read.
        read: reads it; raises one of ``EXPECTED`` to refuse it.
    """

    make: Callable[[random.Random, Path], Path]
    read: Callable[[Path], object]


# ------------------------------------------------------------------------------------------------------------ mutations


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip, insert, delete, repeat or cut some bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        position = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if position < len(data):
                data[position] = rng.randrange(256)
            case 1:
                data[position:position] = rng.choice(BYTES)
            case 2:
                del data[position : position + rng.choice([1, 4, 64])]
            case 3:
                data[position:position] = data[position : position + rng.choice([1, 16, 256])]
            case 4 if rng.random() < 0.2:
                del data[position:]
    return bytes(data)


def mutate_json(rng: random.Random, value: object) -> object:
    """Replace, remove or add a value somewhere in a JSON document."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = dict(value)
        match rng.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(["x", "", "\x1b]0;x\x07", "__class__"])] = rng.choice(JSON_VALUES)
            case _:
                changed[key] = mutate_json(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.5:
        position = rng.randrange(len(value))
        return [*value[:position], mutate_json(rng, value[position]), *value[position + 1 :]]
    return rng.choice(JSON_VALUES)


def mutated_json_text(rng: random.Random, document: object) -> bytes:
    """Return a document with some values replaced, sometimes with broken syntax as well."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        document = mutate_json(rng, document)
    text = json.dumps(document).encode()
    if rng.random() < 0.05:
        text = b"[" * rng.choice([10, 100_000]) + text
    return mutate_bytes(rng, text) if rng.random() < 0.3 else text


# -------------------------------------------------------------------------------------------------------------- targets


def link_folder(source: Path, folder: Path, skip: str) -> None:
    """Copy the files of a folder, except the one that will be mutated."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name != skip:
            (folder / path.name).write_bytes(path.read_bytes())


def json_maker(source: Path, name: str) -> Callable[[random.Random, Path], Path]:
    """Return a function that copies a folder with a mutated JSON file."""
    document = json.loads((source / name).read_text("utf-8"))

    def make(rng: random.Random, folder: Path) -> Path:
        link_folder(source, folder, name)
        (folder / name).write_bytes(mutated_json_text(rng, document))
        return folder

    return make


def safetensors_maker(source: Path, name: str) -> Callable[[random.Random, Path], Path]:
    """Return a function that copies a folder with a mutated safetensors header."""
    content = (source / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensors = content[8 + length :]

    def make(rng: random.Random, folder: Path) -> Path:
        link_folder(source, folder, name)
        text = mutated_json_text(rng, header)
        claimed = len(text) if rng.random() < 0.8 else rng.choice([0, 1, 2**40, 2**63 - 1])
        kept = tensors if rng.random() < 0.8 else tensors[: rng.randrange(len(tensors))]
        (folder / name).write_bytes(struct.pack("<Q", claimed) + text + kept)
        return folder

    return make


def make_png(rng: random.Random, folder: Path) -> Path:
    """Write an image of clipgen-sample with mutated metadata or bytes."""
    metadata = {
        "prompt": "a red ring",
        "seed": 3,
        "temperature": 1.0,
        "top_k": 300,
        "top_p": 1.0,
        "guidance_scale": 1.0,
        "guidance_power": 0.0,
        "clipgen": clipgen.__version__,
        "model": "0" * 16,
    }
    if rng.random() < 0.3:
        metadata |= {"interpolate": ["a red ring", {"a blue ring": 0.5}], "steps": 8}
    info = PngInfo()
    for key, value in metadata.items():
        changed = rng.choice(JSON_VALUES) if rng.random() < 0.2 else value
        text = changed if isinstance(changed, str) else json.dumps(changed)
        if rng.random() < 0.95:
            info.add_itxt(key, text, zip=rng.random() < 0.2)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG", pnginfo=info)
    content = buffer.getvalue()
    path = folder / "image.png"
    path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.5 else content)
    return path


def make_tar(rng: random.Random, folder: Path) -> Path:
    """Write a shard with odd members and mutated bytes."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(image, rng.choice(["PNG", "JPEG", "WEBP"]))
    names = [
        "a.png",
        "b.jpg",
        "c.0001.png",
        "a.cls",
        "a.txt",
        "../d.png",
        "/e.png",
        "\x1b[31m.png",
        "a.png",
        "dir/f.webp",
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for name in rng.sample(names, rng.randrange(1, len(names))):
            member = tarfile.TarInfo(name)
            data = (
                image.getvalue() if name.endswith(("png", "jpg", "webp")) else rng.choice([b"3", b"-1", b"9" * 30, b""])
            )
            member.size = len(data)
            member.type = rng.choice([tarfile.REGTYPE] * 9 + [tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, tarfile.DIRTYPE])
            member.linkname = "/etc/passwd" if member.type == tarfile.SYMTYPE else ""
            tar.addfile(member, io.BytesIO(data))
    path = folder / "shard.tar"
    path.write_bytes(mutate_bytes(rng, buffer.getvalue()) if rng.random() < 0.8 else buffer.getvalue())
    return path


def make_checkpoint(rng: random.Random, folder: Path) -> Path:
    """Write a file of torch.save with a mutated pickle, or with mutated bytes."""
    content = {
        "state_dict": {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(3).half()},
        "hyper_parameters": {"sizes": [1, 2, 3], "rate": 1e-3, "bytes": b"abc"},
        "counter": Counter({3: 1}),
    }
    path = folder / "last.ckpt"
    if rng.random() < 0.5:
        torch.save(content, path, _use_new_zipfile_serialization=False)
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return path
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    calls = [
        b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR",
        b"c_codecs\nencode\n",
        b"(X\x03\x00\x00\x00hex",
        b"h\x00",
        b"tR",
    ]
    data = mutate_bytes(rng, records[pickled])
    for _ in range(rng.choice([0, 1, 3])):
        position = rng.randrange(len(data) + 1)
        data = data[:position] + rng.choice(calls) + data[position:]
    with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, record in records.items():
            archive.writestr(name, data if name == pickled else record)
    return path


def make_image(rng: random.Random, folder: Path) -> Path:
    """Write an image file of some format with mutated bytes."""
    kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    path = folder / f"image.{rng.choice(['png', 'jpg', 'webp', 'tif'])}"
    path.write_bytes(mutate_bytes(rng, buffer.getvalue()))
    return path


def make_taming(rng: random.Random, folder: Path) -> Path:
    """Write a mutated configuration of taming-transformers next to a file that is not a checkpoint."""
    text = (
        "model:\n  target: taming.models.vqgan.VQModel\n  params:\n    n_embed: 16\n    embed_dim: 8\n    ddconfig:\n"
        "      ch: 32\n      ch_mult: [1, 2]\n      num_res_blocks: 1\n      attn_resolutions: []\n"
        "      resolution: 32\n      z_channels: 8\n      double_z: false\n"
        "    lossconfig:\n      params:\n        disc_loss: hinge\n"
    )
    lines = text.splitlines()
    for _ in range(rng.choice([1, 2, 3])):
        position = rng.randrange(len(lines))
        key = lines[position].partition(":")[0]
        lines[position] = f"{key}: {rng.choice(YAML_SNIPPETS)}"
    path = folder / "model.yaml"
    content = "\n".join(lines).encode()
    path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.3 else content)
    return path


def read_taming(path: Path) -> object:
    """Read a configuration of taming-transformers."""
    from clipgen.checkpoint import taming

    return taming.convert_config(read_mapping(path))


def make_arguments(rng: random.Random, folder: Path) -> Path:
    """Write a run folder with a mutated arguments.yaml."""
    lines = ["- stage=vqgan", "- data.train_size=64", "- model.quantizer.codebook_size=16", "- trainer.max_steps=4"]
    for _ in range(rng.choice([1, 2, 4])):
        odd = ["- hydra.run.dir=/x", "- +a={_target_:os.system}", "- data.train_urls='pipe:true'", "- x", "a: b"]
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(odd + YAML_SNIPPETS))
    content = "\n".join(lines).encode()
    (folder / "arguments.yaml").write_bytes(mutate_bytes(rng, content) if rng.random() < 0.5 else content)
    return folder


def read_arguments_of(folder: Path) -> object:
    """Read the arguments that ``resume=RUN`` takes over."""
    from clipgen.cli.resume_args import add_run_arguments

    return add_run_arguments([f"resume={folder}"])


def read_png(path: Path) -> object:
    """Read the metadata of ``clipgen-sample --reproduce``."""
    from clipgen.cli.image_metadata import read_metadata

    return read_metadata(path)


def read_image(path: Path) -> object:
    """Decode an image as training does."""
    from clipgen.data.decoding import UnusableImageError, decode_image

    try:
        return decode_image(path)
    except UnusableImageError as error:
        raise ValueError(str(error)) from error


def read_shard(path: Path) -> object:
    """Read all images of a shard as a validation does."""
    from clipgen.data.webdataset import ImageShards

    return list(ImageShards(str(path), 8, train=False, labels=True))


def targets() -> dict[str, Target]:
    """Return all readers of foreign files, by name."""
    vqgan = SHAPES / "vqgan"
    transformer = SHAPES / "transformer"
    clip = SHAPES / "clip"

    def load_clip(folder: Path) -> FrozenCLIP:
        return FrozenCLIP(str(folder))

    return {
        "checkpoint": Target(make_checkpoint, read_checkpoint),
        "vqgan-config": Target(json_maker(vqgan, "config.json"), VQGAN.load),
        "vqgan-weights": Target(safetensors_maker(vqgan, "model.safetensors"), VQGAN.load),
        "transformer-config": Target(json_maker(transformer, "config.json"), ConditionalTransformer.load),
        "transformer-weights": Target(safetensors_maker(transformer, "model.safetensors"), ConditionalTransformer.load),
        "clip-config": Target(json_maker(clip, "open_clip_config.json"), load_clip),
        "clip-vocabulary": Target(json_maker(clip, "vocabulary.json"), load_clip),
        "clip-weights": Target(safetensors_maker(clip, "open_clip_model.safetensors"), load_clip),
        "json": Target(json_maker(SHAPES, "clip.json"), lambda folder: read_json(folder / "clip.json")),
        "png": Target(make_png, read_png),
        "tar": Target(make_tar, read_shard),
        "image": Target(make_image, read_image),
        "taming-yaml": Target(make_taming, read_taming),
        "arguments-yaml": Target(make_arguments, read_arguments_of),
    }


# --------------------------------------------------------------------------------------------------------------- runner


@dataclass(frozen=True)
class Limits:
    """Limits of one input: processor seconds, and MiB beyond the memory used before."""

    seconds: float
    memory: float


def run_input(name: str, target: Target, seed: int, limits: Limits) -> str | None:
    """Return the problem with the handling of an input, or None."""
    with tempfile.TemporaryDirectory(prefix="clipgen-fuzz-") as folder:
        path = target.make(random.Random(f"{name} {seed}"), Path(folder))
        start = time.process_time()
        memory = peak_memory()
        try:
            target.read(path)
        except MemoryError:
            return "MemoryError: it takes several times the allowed memory"
        except EXPECTED as error:
            if ran_out_of_memory(error):
                return f"an allocation failed: {error!s:.300}"
            if "\n" in str(error).strip() or not str(error).strip():
                return f"{type(error).__name__} is not one sentence: {str(error)[:300]!r}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {error!s:.300}\n{traceback.format_exc(limit=-6)}"
        used = time.process_time() - start
        grown = peak_memory() - memory
    if used > limits.seconds:
        return f"took {used:.1f} s"
    return f"took {grown:.0f} MiB" if grown > limits.memory else None


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error was caused by a failed allocation."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def peak_memory() -> float:
    """Return the largest memory use of this process so far, in MiB; NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def limit_address_space(memory: float) -> None:
    """Make allocations fail that would take several times the allowed memory, instead of filling the machine's."""
    import resource

    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    limit = pages * resource.getpagesize() + int(4 * memory * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def inputs(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield (target, seed): the kept ones, then new ones in turn until the time or the number is used up."""
    names = [args.target] if args.target else list(targets())
    if args.seed is None:
        for name, seed in json.loads(SEEDS.read_text("utf-8")):
            if name in names:
                yield name, seed
    deadline = time.monotonic() + 60 * args.minutes
    first = args.seed if args.seed is not None else args.start
    for i in range(args.inputs or sys.maxsize):
        if time.monotonic() > deadline:
            return
        for name in names:
            yield name, first + i


def main() -> None:
    """Run the inputs and report the findings."""
    args = make_parser().parse_args()
    if sys.platform != "linux":
        raise SystemExit(f"fuzz must run on Linux, where it limits its own memory, got {sys.platform}")
    limit_address_space(args.memory)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    all_targets = targets()
    limits = Limits(args.seconds, args.memory)
    counts: dict[str, int] = {}
    findings: list[tuple[str, int]] = []
    for name, seed in inputs(args):
        counts[name] = counts.get(name, 0) + 1
        problem = run_input(name, all_targets[name], seed, limits)
        if problem:
            findings.append((name, seed))
            print(f"{name} --seed {seed}: {problem}", flush=True)
            args.output.write_text(json.dumps(findings), "utf-8")
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"{sum(counts.values())} inputs, {len(findings)} findings")
    sys.exit(1 if findings else 0)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(targets()), help="fuzz one reader (default: all in turn)")
    parser.add_argument("--minutes", type=float, default=1.0, help="time for new inputs (default: %(default)s)")
    parser.add_argument("--inputs", type=int, help="number of new inputs per target (default: until the time is over)")
    parser.add_argument("--seed", type=int, help="repeat inputs from this seed on; skips the kept ones")
    parser.add_argument("--start", type=int, default=0, help="seed of the first new input (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="processor time per input (default: %(default)s)")
    parser.add_argument(
        "--memory", type=float, default=600.0, help="additional memory per input, MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=user_path, default=Path("fuzz_findings.json"), help="findings (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    main()
