"""``clipgen-eval``: the papers' metrics of a model, of a folder of images, or of a tokenizer."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clipgen.cli.console import print_line, run_command
from clipgen.cli.evaluate_args import DEFAULT_CLIP, check_arguments, check_paths, complete_arguments, make_parser
from clipgen.cli.sampling_args import sampling_options
from clipgen.hardware.device import default_device
from clipgen.hardware.ranks import rank_and_world_size
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


def main() -> None:
    """Run the command."""
    run_command("clipgen-eval", run)


def run() -> None:
    """Check the arguments, evaluate, print the table."""
    args = make_parser().parse_args()
    check_arguments(args)
    check_paths(args)
    complete_arguments(args)
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
