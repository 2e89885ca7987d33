"""``clipgen-eval``: the papers' metrics of a model, of a folder of images, or of a tokenizer."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clipgen.bundled import BUNDLED_NAMES
from clipgen.cli.console import print_line, run_command
from clipgen.cli.model_path import check_model_path
from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.data.class_names import NAME_LISTS
from clipgen.data.urls import expand_urls
from clipgen.hardware.device import default_device
from clipgen.hardware.ranks import rank_and_world_size
from clipgen.storage.files import user_path
from clipgen.storage.output_folder import output_folder
from clipgen.storage.run_lock import LOCK

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from clipgen import VQGAN
    from clipgen.evaluation.captions import Caption
    from clipgen.evaluation.feature_store import FeatureStore
    from clipgen.evaluation.image_metrics import ImageMetrics
    from clipgen.evaluation.reconstruction import ReconstructionMetrics
    from clipgen.evaluation.sources import FolderImages, GeneratedImages, RealImages

logger = logging.getLogger(__name__)
CAPTIONS_FILE = "captions.txt"
DEFAULT_CLIP = "ViT-B-32-quickgelu:openai"  # the papers' CLIP
# Options that have no effect in some combinations; None in the parser, so that it is known whether they are given.
DEFAULT_SETTINGS: dict[str, Any] = {
    "num_images": 30_000,
    "seed": 0,
    "template": "A photo of a {label}.",
    "blur": [0, 1, 2],
}
DESCRIPTION = """Compute the papers' metrics of a model, of a folder of images, or of a tokenizer.

  clipgen-eval --checkpoint RUN --captions captions_val2014.json --reference val2014
  clipgen-eval --checkpoint RUN --classes imagenet --template "A photo of a {label}." --reference 'val-*.tar'
  clipgen-eval --images FOLDER --captions captions.json --reference val2014 --name "another system"
  clipgen-eval --vqgan RUN --reference val2014
  clipgen-eval --checkpoint shapes --captions shapes --shapes-eval --features none --clip shapes

An interrupted evaluation resumes when the command is repeated. Under torchrun or in a SLURM array, processes share the
images; --vqgan runs in one process."""


def main() -> None:
    """Run the command."""
    run_command("clipgen-eval", run)


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser. No module that imports torch is imported before the arguments are parsed."""
    parser = argparse.ArgumentParser(
        "clipgen-eval", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser.add_argument_group("what to evaluate, one of"))
    add_captions(parser.add_argument_group("captions"))
    add_sampling(parser.add_argument_group("sampling of --checkpoint"))
    add_protocol(parser.add_argument_group("protocol"))
    add_output(parser.add_argument_group("output and hardware"))
    return parser


def add_subject(group: argparse._ArgumentGroup) -> None:
    """Add the options that name what is evaluated."""
    subject = group.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--checkpoint",
        help="text-to-image model: stage-2 run folder, checkpoint, pipeline folder, hf-hub:OWNER/NAME, "
        f"{BUNDLED_NAMES}",
    )
    subject.add_argument("--images", type=user_path, help="folder of images, of any system")
    subject.add_argument(
        "--vqgan",
        help="tokenizer, whose reconstructions are evaluated: stage-1 run folder, checkpoint, model folder, "
        f"hf-hub:OWNER/NAME, {BUNDLED_NAMES}",
    )


def add_captions(group: argparse._ArgumentGroup) -> None:
    """Add the options that name the captions."""
    group.add_argument(
        "--captions",
        help="file of captions: text (one per line, or FILE<tab>caption), JSON (list, mapping, COCO), JSON lines "
        "(file_name, and text or caption), a folder with a text file per image (CUB-200-2011), or 'shapes' (default "
        "with --images: PNG metadata or .txt files next to the images)",
    )
    group.add_argument("--split", choices=("train", "test", "all"), help="split of CUB-200-2011 (default: test)")
    group.add_argument(
        "--all-captions",
        action="store_true",
        help="score each of --images with all of its captions instead of the first alone; needs --features none",
    )
    group.add_argument(
        "--classes",
        help="class names instead of captions: a file of the same formats, LOC_synset_mapping.txt, imagenet (CLIP's "
        "wording) or imagenet-torchvision",
    )
    group.add_argument("--template", help=f"caption of a class (default: {DEFAULT_SETTINGS['template']})")
    group.add_argument(
        "--num-images",
        type=int,
        help="number of images to generate, one per caption, and to render for --reference shapes; of captions that "
        "name files, one of each of as many files (default: 30000, as in the papers; with --vqgan: 10000)",
    )


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """Add the options of sampling."""
    group.add_argument("--seed", type=int, help="seed; image i uses seed + i (default: 0)")
    add_sampling_options(group)
    group.add_argument(
        "--rerank-from",
        type=int,
        default=1,
        help="number of candidates per caption, of which the one with the highest CLIP score is kept (default: 1)",
    )


def add_protocol(group: argparse._ArgumentGroup) -> None:
    """Add the options of the metrics."""
    group.add_argument(
        "--reference",
        help="real images: folder, tar shards, shapes, or a folder of parts that was measured before; without it FID, "
        "KID, precision and recall are omitted. If the captions name files of the folder, only the images that they "
        "describe are used: those of the selected captions, or those that --images contains",
    )
    group.add_argument("--whole-reference", action="store_true", help="use all images of the reference in any case")
    group.add_argument(
        "--features",
        default="inception",
        help="feature space of IS, FID, KID, precision and recall: inception (torch-fidelity's resize), "
        "inception-clean, inception:FILE, clip:MODEL[:TAG], classifier:FILE, torchvision:MODEL, timm:MODEL, "
        "module:function (code: name only one that you trust), none (default: %(default)s)",
    )
    group.add_argument(
        "--blur",
        type=int,
        nargs="+",
        help="blur radii of FID-0, FID-1, FID-2; the other metrics use radius 0 (default: 0 1 2)",
    )
    group.add_argument(
        "--clip",
        action="append",
        help=f"MODEL[:TAG] of a CLIP score, may be repeated; none disables it (default: {DEFAULT_CLIP} if there are "
        "captions)",
    )
    group.add_argument("--captioner", help="captioner of CapS: blip, blip:NAME_OR_FOLDER, module:function (code)")
    group.add_argument("--shapes-eval", action="store_true", help="read the images by the rules of the shapes data")
    group.add_argument(
        "--image-size", type=int, help="size of --images and the reference in pixels (default: as the images)"
    )


def add_output(group: argparse._ArgumentGroup) -> None:
    """Add the options of the output."""
    group.add_argument(
        "--output", type=user_path, default=Path("evaluation"), help="output folder (default: %(default)s)"
    )
    group.add_argument("--name", help="name of the system in the table (default: its path)")
    group.add_argument("--batch-size", type=int, default=50, help="images per batch (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda or mps (default: CUDA if available, else MPS, else CPU)")


def run() -> None:
    """Check the arguments, evaluate, print the table."""
    args = make_parser().parse_args()
    check_arguments(args)
    check_paths(args)
    fill_defaults(args)
    from clipgen.evaluation.report import results_table
    from clipgen.evaluation.run import METRICS_FILE
    from clipgen.storage.files import atomic_write

    rank, _ = rank_and_world_size()
    with output_folder(args.output, keep_pattern="parts/part-*.npz", lock=f"{LOCK}-{rank}"):
        results = evaluate_reconstructions(args) if args.vqgan else evaluate_images(args)
        if results is None:
            print_line(f"This process has finished its share; waiting for the others: {args.output}")
            return
        name = args.name or args.checkpoint or args.vqgan or str(args.images)
        row = results_table([(name, results)], args.features, args.captioner or "") + classifier_note(args.features)
        with atomic_write(args.output / "row.md") as partial:
            partial.write_text(row, encoding="utf-8")
    for line in row.splitlines():
        print_line(line)
    print_line(f"Protocol: {args.output / METRICS_FILE}")


def classifier_note(features: str) -> str:
    """Return lines that state the accuracy of the classifier whose features are used; empty for other features."""
    from clipgen.evaluation.classifier import accuracy_sentence, load_classifier

    prefix, _, path = features.partition(":")
    if prefix != "classifier":
        return ""
    _, about = load_classifier(Path(path).expanduser())
    return f"\n{accuracy_sentence(about)}\n"


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError if no evaluation is possible with the arguments."""
    check_numbers(args)
    check_combination(args)
    check_effects(args)
    if args.classes and args.template and "{label}" not in args.template:
        raise ValueError(f"template must contain {{label}}, the place of the class, got {args.template!r}")
    if args.checkpoint and not (args.captions or args.classes):
        raise ValueError("a model needs captions to generate: give --captions or --classes")
    if args.all_captions and not (args.images and args.captions and args.features == "none"):
        raise ValueError(
            "all_captions must be used with --images, --captions and --features none, because it repeats images"
        )
    if args.vqgan and not args.reference:
        raise ValueError("a tokenizer needs images to reconstruct: give --reference")
    if args.features != "none" and not args.vqgan and find_spec("torch_fidelity") is None:
        raise ImportError("IS and KID need torch-fidelity: pip install torch-fidelity, or give --features none")
    if args.reference and args.features == "none" and not args.vqgan:
        raise ValueError(
            "a reference is compared in a feature space: give --features other than none, or no --reference"
        )


def check_combination(args: argparse.Namespace) -> None:
    """Raise ValueError if an option would have no effect together with another one."""
    if args.captions and args.classes:
        raise ValueError("captions and classes exclude each other: give --captions or --classes")
    options = list(sampling_options(args))
    if args.rerank_from > 1:
        options.append("rerank_from")
    if not args.checkpoint and options:
        raise ValueError(f"{options[0]} applies to --checkpoint only: leave out --{options[0].replace('_', '-')}")
    for name in ("captions", "classes", "split", "clip", "captioner", "shapes_eval"):
        if args.vqgan and getattr(args, name) not in (None, False, ["none"]):
            raise ValueError(f"{name} does not apply to reconstructions: leave out --{name.replace('_', '-')}")


def check_effects(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is given that has no effect with what is evaluated."""
    effects = {
        "num_images": (args.checkpoint or args.reference == "shapes", "--checkpoint or --reference shapes"),
        "seed": (args.checkpoint, "--checkpoint"),
        "template": (args.classes, "--classes"),
        "split": (args.captions not in (None, "shapes"), "a folder of text files in --captions"),
        "blur": (args.features != "none" and not args.vqgan, "a feature space of images, not of reconstructions"),
        "whole_reference": (args.reference and not args.vqgan, "--reference of images, not of reconstructions"),
    }
    for name, (has_effect, needed) in effects.items():
        is_given = getattr(args, name) is not None and getattr(args, name) is not False
        if is_given and not has_effect:
            raise ValueError(f"{name} has an effect only with {needed}: leave out --{name.replace('_', '-')}")
    _, world_size = rank_and_world_size()
    if args.vqgan and world_size > 1:
        raise ValueError(f"a tokenizer is evaluated by one process, got {world_size}: start clipgen-eval only once")


def fill_defaults(args: argparse.Namespace) -> None:
    """Set the options that are not given to their defaults."""
    args.num_reconstructed = 10_000 if args.num_images is None else args.num_images
    for name, default in DEFAULT_SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def check_paths(args: argparse.Namespace) -> None:
    """Raise FileNotFoundError if a file or a folder on the command line does not exist."""
    check_model_path(args.checkpoint, "ConditionalTransformer")
    check_model_path(args.vqgan, "VQGAN")
    if args.images and not args.images.exists():
        raise FileNotFoundError(f"root must be an existing folder of images, got {args.images}")
    if args.captions not in (None, "shapes") and not Path(args.captions).expanduser().exists():
        raise FileNotFoundError(f"captions must be 'shapes', an existing file or a folder, got {args.captions}")
    if args.classes not in (None, "shapes", *NAME_LISTS) and not Path(args.classes).expanduser().is_file():
        names = ", ".join(map(repr, NAME_LISTS))
        raise FileNotFoundError(f"classes must be {names} or an existing file, got {args.classes}")
    if args.reference in (None, "shapes") or Path(args.reference).expanduser().exists():
        return
    try:
        expand_urls(args.reference)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(f"reference must be a folder of images, shards or shapes: {error}") from error


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError if a number is out of range."""
    for name, least in (("num_images", 2), ("batch_size", 1), ("rerank_from", 1), ("image_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if any(radius < 0 for radius in args.blur or []):
        raise ValueError(f"blur must be radii of at least 0, got {min(args.blur)}")


# -------------------------------------------------------------------------------------------------------------- images


def evaluate_images(args: argparse.Namespace) -> dict[str, float] | None:
    """Evaluate a model or a folder of images; None if other processes have not finished."""
    from clipgen.cli.progress_bar import progress_bar
    from clipgen.data.shapes import parse_caption
    from clipgen.evaluation.captions import select_captions, write_captions
    from clipgen.evaluation.run import METRICS_FILE, evaluate, require_same_protocol

    require_same_protocol(args.output / METRICS_FILE, {"vqgan": None})
    captions = captions_from(args) if args.captions or args.classes else []
    source: GeneratedImages | FolderImages
    if args.checkpoint:
        captions = select_captions(captions, args.num_images, args.seed)
        source, image_size = generated_source(args, captions)
    else:
        source, image_size = folder_source(args, captions)
    if args.shapes_eval:
        # Fails now on a caption that the evaluator cannot read, not after the work.
        for caption in source.captions:
            parse_caption(caption)
    metrics = make_metrics(args, bool(source.captions))
    if not metrics.enabled:
        raise ValueError("there is nothing to measure: give --features, --clip, --captioner or --shapes-eval")
    number = sum(len(chunk) for chunk in source.chunks)
    reference = reference_source(args, image_size, captions)
    print_sizes(number, reference)
    rank, world_size = rank_and_world_size()
    with progress_bar("images", number) as advance:
        results = evaluate(args.output, source, metrics, reference, advance=advance, rank=rank, world_size=world_size)
    if args.checkpoint and results is not None:
        write_captions(args.output / CAPTIONS_FILE, captions)
    return results


def print_sizes(number: int, reference: RealImages | FeatureStore | None) -> None:
    """Print how many images are compared with how many of the reference."""
    from clipgen.evaluation.sources import RealImages

    if reference is None:
        return
    count = reference.dataset.count_images() if isinstance(reference, RealImages) else len(reference)
    print_line(f"Images: {number}, reference: {'unknown number of' if count is None else count} images")


def captions_from(args: argparse.Namespace) -> list[Caption]:
    """Read the captions, or make them from the classes."""
    from clipgen.evaluation.captions import Caption, read_captions, read_classes

    if args.classes:
        return [Caption(file, args.template.replace("{label}", name)) for file, name in read_classes(args.classes)]
    return read_captions(args.captions, args.split)


def generated_source(args: argparse.Namespace, captions: Sequence[Caption]) -> tuple[GeneratedImages, int]:
    """Return the images that a model generates, and their size."""
    from clipgen.evaluation.sources import GeneratedImages, make_generate_fn
    from clipgen.pipeline import TextToImage

    pipe = TextToImage.load(args.checkpoint).to(args.device or default_device())
    params = replace(pipe.params, **sampling_options(args))
    source = GeneratedImages(
        make_generate_fn(pipe, params, args.rerank_from),
        [text for _, text in captions],
        args.seed,
        {**asdict(params), "rerank_from": args.rerank_from, "model": pipe.fingerprint},
        args.batch_size,
    )
    return source, args.image_size or pipe.image_size


def folder_source(args: argparse.Namespace, captions: Sequence[Caption]) -> tuple[FolderImages, int]:
    """Return the images of a folder, and their size."""
    from clipgen.evaluation.sources import FolderImages

    needs_captions = args.shapes_eval or args.captioner or args.clip not in (None, ["none"])
    file_captions: Any = captions or ("embedded" if needs_captions else None)
    source = FolderImages(args.images, args.image_size, file_captions, args.batch_size, all_captions=args.all_captions)
    return source, source.image_size


def reference_source(
    args: argparse.Namespace, image_size: int, captions: Sequence[Caption]
) -> RealImages | FeatureStore | None:
    """Return the reference: images, or a store that was measured before; None if there is none."""
    from clipgen.evaluation.feature_store import IDENTITY_FILE, FeatureStore
    from clipgen.evaluation.sources import RealImages

    if args.reference is None:
        return None
    folder = Path(args.reference).expanduser()
    if (folder / IDENTITY_FILE).is_file():
        return FeatureStore(folder)
    files = None
    if folder.is_dir() and not args.whole_reference:
        files = captioned_files(captions)
        if args.images and files:
            files = evaluated_files(args.images, folder, files)
    return RealImages(args.reference, image_size, args.batch_size, args.num_images, files=files)


def captioned_files(captions: Sequence[Caption]) -> set[str] | None:
    """Return the images that captions describe; None if there are no captions, or one does not name its image."""
    files = set()
    for file, _ in captions:
        if file is None:
            return None
        files.add(file)
    return files or None


def evaluated_files(images: Path, reference: Path, files: set[str]) -> set[str] | None:
    """Return the captioned files of a folder of generated images; None if the reference has other file names."""
    evaluated = {file for file in files if (images / file).is_file()}
    if any((reference / file).is_file() for file in evaluated):
        return evaluated
    logger.warning(
        "The captions name no image of the reference %s: all of its images are used instead of those that the captions "
        "describe.",
        reference,
    )
    return None


def make_metrics(args: argparse.Namespace, with_captions: bool) -> ImageMetrics:
    """Load the networks of the metrics to their device."""
    from clipgen import FrozenCLIP
    from clipgen.evaluation.caps import load_captioner
    from clipgen.evaluation.features import feature_extractor
    from clipgen.evaluation.image_metrics import ImageMetrics

    device = args.device or default_device()
    clip_names = args.clip or ([DEFAULT_CLIP] if with_captions else [])
    features = None if args.features == "none" else feature_extractor(args.features).to(device)
    classes = [text for _, text in captions_from(args)] if args.classes else []
    # With another number of classes, the features' classifier has other classes.
    if features is None or features.num_classes != len(classes):
        warn_of_other_classes(args.features, features.num_classes if features else 0, len(classes))
        classes = []
    return ImageMetrics(
        features=features,
        radii=sorted(set(args.blur)),
        clips={name: FrozenCLIP.from_spec(name).to(device) for name in clip_names if name != "none"},
        captioner=load_captioner(args.captioner) if args.captioner else None,
        captioner_name=args.captioner,
        classes=classes,
        shapes=args.shapes_eval,
        device=device,
    )


def warn_of_other_classes(features: str, num_classes: int, num_names: int) -> None:
    """Log why the images are not classified, if the features are those of a classifier of other classes."""
    # Inception's outputs are not the classes of any list.
    if num_classes and num_names and not features.startswith("inception"):
        logger.warning(
            'The column "recognized" is omitted: --classes has %d names, %s %d classes',
            num_names,
            features,
            num_classes,
        )


# ----------------------------------------------------------------------------------------------------- reconstructions


def evaluate_reconstructions(args: argparse.Namespace) -> dict[str, float]:
    """Evaluate a tokenizer on the reference: PSNR, SSIM, LPIPS if VGG weights are available, rFID, codebook usage."""
    from torch.utils.data import DataLoader

    from clipgen import VQGAN
    from clipgen.cli.progress_bar import progress_bar
    from clipgen.evaluation.run import METRICS_FILE, require_same_protocol, write_results
    from clipgen.evaluation.sources import RealImages
    from clipgen.tokenizer_identity import vqgan_identity
    from clipgen.training.callbacks import ValidationProgress

    vqgan = VQGAN.load(args.vqgan)
    image_size = args.image_size or vqgan.autoencoder_config.resolution
    source = RealImages(args.reference, image_size, count=args.num_reconstructed)
    metrics = make_reconstruction_metrics(vqgan, None if args.features == "none" else args.features)
    protocol = {
        "vqgan": vqgan_identity(vqgan),
        "features": metrics.feature_identity,
        "reference": source.identity,
    }
    require_same_protocol(args.output / METRICS_FILE, protocol)
    loader = DataLoader(cast(Any, source.dataset), args.batch_size)
    number = source.dataset.count_images()
    with progress_bar("images", number.images if number else None) as advance:
        trainer = make_trainer(args, [metrics, ValidationProgress(advance)])
        (logged,) = trainer.validate(vqgan, loader, verbose=False)
    results = {name.removeprefix("val/"): value for name, value in logged.items()}
    write_results(args.output / METRICS_FILE, results, protocol)
    return results


def make_reconstruction_metrics(vqgan: VQGAN, features: str | None) -> ReconstructionMetrics:
    """Return the metrics; without VGG-16's weights LPIPS is omitted, also from the VQ-GAN's validation loss."""
    from clipgen.checkpoint.vgg import MissingWeightsError
    from clipgen.evaluation.reconstruction import ReconstructionMetrics

    try:
        return ReconstructionMetrics(lpips=True, fid_features=features)
    except MissingWeightsError:
        print("LPIPS is omitted: VGG-16's weights are not available", file=sys.stderr)
        vqgan.loss_config = replace(vqgan.loss_config, perceptual_weight=0.0)
        return ReconstructionMetrics(lpips=False, fid_features=features)


def make_trainer(args: argparse.Namespace, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Return a trainer that only validates."""
    import pytorch_lightning as pl
    import torch

    device = torch.device(args.device or default_device())
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.index is None else [device.index],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=args.output,
    )


if __name__ == "__main__":
    main()
