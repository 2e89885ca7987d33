"""Measure how often a classifier recognizes the class in images generated for it, and their distance from real images.

    python -m clipgen train_classifier --data data/cifar10 --output runs/classifier
    python -m clipgen recognize --data data/cifar10 --checkpoint RUN --output runs/recognize
    python -m clipgen recognize --data data/cifar10 --vqgan RUN --output runs/recognize

Images of every class are generated from the prompt "a photo of a {label}", with the sampling parameters of the model,
or those that are given. With --vqgan, the validation images are reconstructed; "class kept" is the fraction of the
recognized originals whose reconstruction is also recognized. Several runs after --checkpoint or --vqgan are compared in
one table. FID, precision and recall are in the classifier's features, against the validation images. The row "real
images" is their floor: at most as many images of the training shards that were held out of the classifier. A FID is
comparable only with others of the same number of images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_classifier import LabeledImages, load_images, shard_sizes, split_shards

from clipgen import VQGAN, TextToImage
from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.evaluation import functional
from clipgen.evaluation.classifier import BATCH_SIZE, ImageClassifier, accuracy_sentence, load_classifier
from clipgen.evaluation.intervals import wilson_interval
from clipgen.evaluation.sources import make_generate_fn
from clipgen.generation.file_names import underscored
from clipgen.images import psnr, rounded, save_png, to_pil
from clipgen.sampling_params import SamplingParams
from clipgen.storage.files import user_path, write_json
from clipgen.storage.output_folder import free_folder
from clipgen.visualization import grid

PROGRAM = "python -m clipgen recognize"


def recognized(classifier: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image (B, 3, H, W) is classified as its label (B,)."""
    return classifier.predict(images) == labels


@torch.no_grad()
def features_of(classifier: ImageClassifier, images: Tensor) -> Tensor:
    """Return the classifier's features (N, F) of images (N, 3, H, W)."""
    return torch.cat([classifier.features(batch) for batch in images.split(BATCH_SIZE)])


def describe(classifier: ImageClassifier, images: Tensor, labels: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return the number of labeled images that are recognized, and their distance from reference features (M, F)."""
    correct = recognized(classifier, images, labels)
    features = features_of(classifier, images)
    fid = functional.frechet_distance(functional.moments([features.numpy()]), functional.moments([reference.numpy()]))
    precision, recall = functional.precision_recall(features, reference)
    return {
        "images": len(images),
        "recognized": correct.float().mean().item(),
        "interval": list(wilson_interval(int(correct.sum()), len(correct))),
        "fid": fid,
        "precision": precision,
        "recall": recall,
    }


@torch.no_grad()
def reconstructions(vqgan: VQGAN, images: LabeledImages) -> Tensor:
    """Return the reconstructions of images, rounded to 8 bits: (N, 3, H, W) in [-1, 1]."""
    batches = [slice(start, start + BATCH_SIZE) for start in range(0, len(images), BATCH_SIZE)]
    return torch.cat([rounded(vqgan(images.floats(batch))) for batch in batches])


def class_kept(classifier: ImageClassifier, images: Tensor, reconstructed: Tensor, labels: Tensor) -> float:
    """Return the fraction of the recognized images whose reconstruction is also recognized."""
    originals = recognized(classifier, images, labels)
    return recognized(classifier, reconstructed, labels)[originals].float().mean().item()


def held_out_images(data: Path, image_size: int, count: int, about: dict[str, Any]) -> LabeledImages | None:
    """Return real images that the classifier was not trained on, evenly spaced; None if there are none.

    There are none if no shard was held out, or if the data is divided into other shards than those of the training.
    """
    _, shards = split_shards(data, about["trained"]["held_out"])
    if not shards or list(about["trained"]["data"]) != list(shard_sizes(data)):
        reason = "it was trained on other shards" if shards else "no shard was held out of its training"
        print(f'There is no row "real images": {reason}', file=sys.stderr)
        return None
    images = load_images(shards, image_size)
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
    return LabeledImages(images.images[chosen], images.labels[chosen])


def table(rows: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    """Return a Markdown table whose heading states the classifier's accuracy."""
    lines = [
        f"{accuracy_sentence(about)} In parentheses: 95 % intervals.",
        "",
        "| | images | recognized | FID | precision | recall | class kept | PSNR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        name += sampling_label(row.get("settings", {}))
        low, high = row["interval"]
        recognition = f"{row['recognized']:.1%} ({low:.1%} to {high:.1%})"
        kept = f"{row['class_kept']:.1%}" if "class_kept" in row else "-"
        decibels = f"{row['psnr']:.2f} dB" if "psnr" in row else "-"
        lines.append(
            f"| {name} | {row['images']} | {recognition} | {row['fid']:.4f} | {row['precision']:.3f} "
            f"| {row['recall']:.3f} | {kept} | {decibels} |"
        )
    return "\n".join(lines) + "\n"


def sampling_label(settings: dict[str, Any]) -> str:
    """Return the sampling parameters of a row that are not the paper's, in parentheses; empty if there are none."""
    defaults = vars(SamplingParams())
    differing = [f"{name} {value:g}" for name, value in settings.items() if value != defaults.get(name, value)]
    return f" ({', '.join(differing)})" if differing else ""


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, required=True, help="folder of train-*.tar, val-*.tar, classes.json")
    parser.add_argument(
        "--classifier",
        type=user_path,
        default=Path("runs/classifier/classifier.pt"),
        help="file of python -m clipgen train_classifier (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], help="stage-2 runs or pipelines whose images are evaluated"
    )
    parser.add_argument("--vqgan", nargs="+", default=[], help="stage-1 runs whose reconstructions are evaluated")
    parser.add_argument("--template", default="a photo of a {label}", help="prompt of a class (default: %(default)s)")
    parser.add_argument("--per-class", type=int, default=100, help="images per class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed; image i uses seed + i (default: %(default)s)")
    parser.add_argument(
        "--rerank-from",
        type=int,
        default=1,
        help="number of candidates per image, of which the one with the highest CLIP score is kept (default: 1)",
    )
    add_sampling_options(parser)
    parser.add_argument(
        "--output",
        type=user_path,
        default=Path("runs/recognize"),
        help="folder of the grids, recognized.json and recognized.md, numbered if they exist (default: %(default)s)",
    )
    return parser


def main() -> None:
    """Load the classifier, and evaluate the model."""
    args = make_parser().parse_args()
    if not (args.data / "classes.json").is_file():
        sys.exit(f"{PROGRAM}: error: no classes.json in {args.data}; python -m clipgen make_shards writes it")
    if "{label}" not in args.template:
        sys.exit(f"{PROGRAM}: error: --template must contain {{label}}, got {args.template!r}")
    class_names = json.loads((args.data / "classes.json").read_text())
    try:
        classifier, about = load_classifier(args.classifier)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{PROGRAM}: error: {error}")
    args.output = free_folder(args.output, "recognized.*", "grid_*.png")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, row in evaluate(args, classifier, about, class_names):
        rows[name] = row
        write_json(args.output / "recognized.json", {"rows": rows, "classifier": about})
        (args.output / "recognized.md").write_text(table(rows, about))
    print(table(rows, about))
    print(f"Results: {args.output}", file=sys.stderr)


def evaluate(
    args: argparse.Namespace, classifier: ImageClassifier, about: dict[str, Any], class_names: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of the table: real images, and generated images and reconstructions of each run."""
    image_size = about["trained"]["image_size"]
    validation = load_images(sorted(args.data.glob("val-*.tar")), image_size)
    reference = features_of(classifier, validation.floats(slice(None)))
    real = held_out_images(args.data, image_size, args.per_class * len(class_names), about)
    if real is not None:
        yield "real images", describe(classifier, real.floats(slice(None)), real.labels, reference)
    for run in args.checkpoint:
        yield run, evaluate_generated(run, args, classifier, class_names, reference)
    for run in args.vqgan:
        yield f"{run}: reconstructions", evaluate_reconstructions(run, classifier, validation, reference)


def evaluate_generated(
    run: str, args: argparse.Namespace, classifier: ImageClassifier, class_names: list[str], reference: Tensor
) -> dict[str, Any]:
    """Generate images of all classes, write a grid of the first ones, and return the row of the table."""
    labels = torch.arange(len(class_names)).repeat_interleave(args.per_class)
    pipe = TextToImage.load(run)
    params = replace(pipe.params, **sampling_options(args))
    images = generated_images(pipe, params, args, [class_names[label] for label in labels])
    save_png(class_grid(images, class_names), args.output / f"grid_{underscored(run).strip('_')}.png")
    correct = recognized(classifier, images, labels).float().view(len(class_names), -1).mean(dim=1)
    return describe(classifier, images, labels, reference) | {
        "per_class": dict(zip(class_names, correct.tolist())),
        "template": args.template,
        "settings": {**asdict(params), "rerank_from": args.rerank_from, "seed": args.seed},
    }


def evaluate_reconstructions(
    run: str, classifier: ImageClassifier, validation: LabeledImages, reference: Tensor
) -> dict[str, Any]:
    """Reconstruct the validation images, and return the row of the table."""
    originals = validation.floats(slice(None))
    reconstructed = reconstructions(VQGAN.load(run), validation)
    return describe(classifier, reconstructed, validation.labels, reference) | {
        "class_kept": class_kept(classifier, originals, reconstructed, validation.labels),
        "psnr": psnr(originals, reconstructed).mean().item(),
    }


def generated_images(pipe: TextToImage, params: SamplingParams, args: argparse.Namespace, labels: list[str]) -> Tensor:
    """Return an image of each label."""
    generate = make_generate_fn(pipe, params, args.rerank_from)
    prompts = [args.template.replace("{label}", label) for label in labels]
    images = generate(prompts, [args.seed + i for i in range(len(prompts))])
    return rounded(images)


def class_grid(images: Tensor, class_names: list[str], rows: int = 8) -> Any:
    """Return a grid with one column per class, of the first images of each."""
    per_class = images.view(len(class_names), -1, *images.shape[1:])[:, :rows]
    rows = per_class.shape[1]
    first = per_class.transpose(0, 1).flatten(0, 1)
    return grid(to_pil(first), columns=len(class_names), captions=class_names * rows, cell=96)


if __name__ == "__main__":
    main()
