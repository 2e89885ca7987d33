"""``clipgen-eval``: the papers' metrics of a model, of anybody's pictures, or of a tokenizer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import guarded, progress_bar
from clipgen.cli.device import default_device, rank_and_world_size
from clipgen.cli.output_dir import output_folder
from clipgen.cli.run_lock import LOCK
from clipgen.cli.sampling_args import add_sampling_options, sampling_options

if TYPE_CHECKING:
    from clipgen.evaluation.feature_store import Source
    from clipgen.evaluation.image_metrics import ImageMetrics

DESCRIPTION = """The papers' metrics of a model, of anybody's pictures, or of a tokenizer.

  clipgen-eval --checkpoint RUN --captions captions_val2014.json --reference val2014
  clipgen-eval --checkpoint RUN --classes classes.json --template "A photo of a {label}." --reference 'val-*.tar'
  clipgen-eval --images THEIRS --captions captions.json --reference val2014 --name "another system"
  clipgen-eval --vqgan RUN --reference val2014
  clipgen-eval --checkpoint shapes --captions shapes --reference shapes --judge --features clip:shapes --clip shapes

Killed and started again it goes on. Under torchrun or in a SLURM array, processes share the work."""


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-eval", run)


def parser() -> argparse.ArgumentParser:
    """The command line. Nothing heavy is imported before it is read."""
    p = argparse.ArgumentParser(
        "clipgen-eval", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_argument_group("what to evaluate").add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="a stage-2 run folder, checkpoint, pipeline folder, hf-hub: name or shapes")
    what.add_argument("--images", type=Path, help="a folder of pictures, of whatever system")
    what.add_argument(
        "--vqgan", help="a stage-1 run folder, checkpoint, model folder, hf-hub: name or shapes: its reconstructions"
    )
    said = p.add_argument_group("sentences")
    said.add_argument(
        "--captions",
        help="text (a sentence a line; FILE<tab>sentence), JSON (list, mapping, COCO), "
        "or 'shapes'; default for --images: what the PNGs or .txt files beside them say",
    )
    said.add_argument("--classes", help="class names instead, in the same formats")
    said.add_argument("--template", default="A photo of a {label}.", help="of the classes (default: %(default)s)")
    said.add_argument("--num-images", type=int, default=30_000, help="drawn (default: %(default)s, the papers')")
    how = p.add_argument_group("protocol")
    how.add_argument(
        "--reference",
        help="real images: a folder, tar shards, or shapes; or a folder of parts that "
        "was measured before; without it no FID, KID, precision, recall",
    )
    how.add_argument(
        "--features",
        default="inception",
        help="space of IS, FID, KID, precision and recall: inception "
        "(torch-fidelity's resize), inception-clean, inception:FILE, clip:MODEL[:TAG], torchvision:MODEL, "
        "timm:MODEL, module:function, none (default: %(default)s)",
    )
    how.add_argument(
        "--blur",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="radii of FID-0, FID-1, FID-2; IS, KID, precision and recall are measured at 0 (default: 0 1 2)",
    )
    how.add_argument(
        "--clip",
        action="append",
        help="MODEL[:TAG] of a CLIP score, several times (default: "
        "ViT-B-32-quickgelu:openai, where there are sentences; none: no score)",
    )
    how.add_argument("--captioner", help="of CapS: blip, blip:NAME_OR_FOLDER, module:function")
    how.add_argument("--judge", action="store_true", help="read the pictures by the rules of the shapes data")
    how.add_argument("--image-size", type=int, help="of --images and the reference (default: as the images)")
    draw = p.add_argument_group("drawing")
    draw.add_argument("--seed", type=int, default=0, help="image i draws from seed + i (default: %(default)s)")
    add_sampling_options(draw)
    draw.add_argument("--rerank-from", type=int, default=1, help="draw so many a sentence, keep the one nearest to it")
    p.add_argument("--output", type=Path, default=Path("evaluation"), help="folder (default: %(default)s)")
    p.add_argument("--name", help="of the table's row")
    p.add_argument("--batch-size", type=int, default=50)
    p.add_argument("--device", help="cpu, cuda, mps (default: the fastest there is)")
    return p


def run() -> None:
    """Check what can be checked, evaluate, print the row."""
    args = parser().parse_args()
    from clipgen.evaluation.report import table
    from clipgen.evaluation.run import METRICS
    from clipgen.files import atomic_write

    check(args)
    rank, _ = rank_and_world_size()
    with output_folder(args.output, keep_pattern="parts/part-*.npz", lock=f"{LOCK}-{rank}"):
        found = reconstructions(args) if args.vqgan else evaluate_images(args)
        if found is None:
            print(f"This part is finished, others are not: {args.output}")
            return
        name = args.name or args.checkpoint or args.vqgan or str(args.images)
        row = table([(name, found)], args.features, args.captioner or "")
        with atomic_write(args.output / "row.md") as partial:
            partial.write_text(row, encoding="utf-8")
    print(f"{row}\nHow it was measured: {args.output / METRICS}")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what no evaluation can do."""
    from clipgen.sampling import SamplingParams

    SamplingParams(**sampling_options(args))
    for name, least in (("num_images", 2), ("batch_size", 1), ("rerank_from", 1), ("image_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if any(radius < 0 for radius in args.blur):
        raise ValueError(f"blur must be radii of at least 0, got {min(args.blur)}")
    if args.checkpoint and not (args.captions or args.classes):
        raise ValueError("a model needs sentences to draw: give --captions or --classes")
    if args.classes and "{label}" not in args.template:
        raise ValueError(f"template must have a place for the class, {{label}}, got {args.template!r}")
    if args.vqgan and not args.reference:
        raise ValueError("a tokenizer needs images to reconstruct: give --reference")
    if args.features != "none" and not args.vqgan and find_spec("torch_fidelity") is None:
        raise ImportError('IS and KID need torch-fidelity: pip install "clipgen[eval]", or give --features none')
    if args.reference and args.features == "none" and not args.vqgan:
        raise ValueError("a reference is compared in a space: give --features other than none, or no --reference")


def evaluate_images(args: argparse.Namespace) -> dict[str, float] | None:
    """Evaluate a model or a folder of pictures."""
    from clipgen.data.shapes import parse
    from clipgen.evaluation.run import METRICS, evaluate, refuse_other

    refuse_other(args.output / METRICS, {"vqgan": None})
    source, size = drawn(args) if args.checkpoint else pictures(args)
    captions = getattr(source, "captions", [])
    for caption in captions if args.judge else ():
        parse(caption)  # fails before the work
    measure = make_measure(args, bool(captions))
    if not measure.anything:
        raise ValueError("there is nothing to measure: give --features, --clip, --captioner or --judge")
    reference = compared(args, size)
    with progress_bar("images", sum(len(piece) for piece in source.pieces)) as advance:
        return evaluate(args.output, source, measure, reference, advance=advance, share=rank_and_world_size())


def compared(args: argparse.Namespace, size: int) -> Any:
    """The reference: measured before, or images; None where none is given."""
    from clipgen.evaluation.feature_store import IDENTITY, FeatureStore
    from clipgen.evaluation.sources import RealImages

    if args.reference is None:
        return None
    folder = Path(args.reference).expanduser()
    if (folder / IDENTITY).is_file():
        return FeatureStore(folder)
    return RealImages(args.reference, size, args.batch_size, args.num_images)


def sentences(args: argparse.Namespace) -> list[Any]:
    """What was asked for: (file or None, sentence)."""
    from clipgen.evaluation.captions import read_captions

    if args.classes:
        return [(file, args.template.replace("{label}", label)) for file, label in read_captions(args.classes)]
    return read_captions(args.captions)


def drawn(args: argparse.Namespace) -> tuple[Source, int]:
    """A model's images, and their size."""
    from clipgen.evaluation.captions import choose
    from clipgen.evaluation.sources import GeneratedImages, drawing
    from clipgen.pipeline import TextToImage

    captions = choose([caption for _, caption in sentences(args)], args.num_images, args.seed)
    pipe = TextToImage.load(args.checkpoint).to(args.device or default_device())
    settings = sampling_options(args) | {"rerank_from": args.rerank_from}
    draw = drawing(pipe, **settings)
    source = GeneratedImages(draw, captions, args.seed, settings | {"model": pipe.fingerprint}, args.batch_size)
    return source, args.image_size or pipe.image_size


def pictures(args: argparse.Namespace) -> tuple[Source, int]:
    """A folder's images, and their size."""
    from clipgen.evaluation.sources import FolderImages

    needed = args.judge or args.captioner or args.clip not in (None, ["none"]) or args.captions or args.classes
    captions: Any = sentences(args) if args.captions or args.classes else None if needed else ()
    source = FolderImages(args.images, args.image_size, captions, args.batch_size)
    return source, source.image_size


def make_measure(args: argparse.Namespace, with_captions: bool) -> ImageMetrics:
    """The networks that measure, on their device."""
    from clipgen import FrozenCLIP
    from clipgen.evaluation.caps import captioner
    from clipgen.evaluation.features import feature_extractor
    from clipgen.evaluation.image_metrics import ImageMetrics

    device = args.device or default_device()
    names = args.clip or (["ViT-B-32-quickgelu:openai"] if with_captions else [])
    clips = {name: FrozenCLIP.from_spec(name).to(device) for name in names if name != "none"}
    features = None if args.features == "none" else feature_extractor(args.features).to(device)
    classes = [caption for _, caption in sentences(args)] if args.classes else []
    if features is None or features.num_classes != len(classes):
        classes = []  # of another classifier
    return ImageMetrics(
        features,
        sorted(set(args.blur)),
        clips,
        captioner(args.captioner) if args.captioner else None,
        args.captioner,
        classes,
        args.judge,
        device,
    )


def reconstructions(args: argparse.Namespace) -> dict[str, float]:
    """Evaluate a tokenizer on the reference: PSNR, SSIM, LPIPS if VGG weights are available, rFID, usage."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from clipgen import VQGAN
    from clipgen.evaluation.reconstruction import ReconstructionMetrics
    from clipgen.evaluation.run import METRICS, refuse_other, write
    from clipgen.evaluation.sources import RealImages
    from clipgen.models.lpips import MissingWeightsError
    from clipgen.precompute import vqgan_identity

    vqgan = VQGAN.load(args.vqgan)
    images = RealImages(args.reference, args.image_size or vqgan.autoencoder_config.resolution)
    features = None if args.features == "none" else args.features
    try:
        metrics = ReconstructionMetrics(lpips=True, fid_features=features)
    except MissingWeightsError:
        print("LPIPS is left out: VGG-16's weights are not available", file=sys.stderr)
        vqgan.loss_config = replace(vqgan.loss_config, perceptual_weight=0.0)  # of its validation's loss too
        metrics = ReconstructionMetrics(lpips=False, fid_features=features)
    device = torch.device(args.device or default_device())
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.index is None else [device.index],
        callbacks=[metrics],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        default_root_dir=args.output,
    )
    protocol = {"vqgan": vqgan_identity(vqgan), "features": metrics.features, "reference": images.identity}
    refuse_other(args.output / METRICS, protocol)
    (logged,) = trainer.validate(vqgan, DataLoader(images.dataset, args.batch_size), verbose=False)
    found = {name.removeprefix("val/"): value for name, value in logged.items()}
    write(args.output / METRICS, found, protocol)
    return found


if __name__ == "__main__":
    main()
