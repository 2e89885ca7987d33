"""Measure how often an independent classifier recognizes the class in images generated for it.

    python -m clipgen recognize --data data/cifar10 --checkpoint outputs/transformer/... --output runs/recognize

The classifier is trained once, on the real images of the shards only, and kept in --classifier. Then images of every
class are generated from the prompt "a photo of a {label}", with the sampling parameters of clipgen-sample.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_clip import labeled_batches, one_cycle

from clipgen import TextToImage
from clipgen.cli.sampling_args import add_sampling_options, sampling_params
from clipgen.data.webdataset import ImageShards
from clipgen.evaluation.sources import make_generate_fn
from clipgen.files import atomic_write, write_json
from clipgen.images import save_png, to_pil
from clipgen.visualization import grid

EVAL_BATCH_SIZE = 250


class Residual(nn.Module):
    """x + f(x), where f is a sequence of layers."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 3 x 3 convolution with batch norm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def make_classifier(num_classes: int) -> nn.Sequential:
    """Return a small residual network for small images (after David Page's cifar10-fast, thinned for a CPU)."""
    return nn.Sequential(
        conv_block(3, 32),
        nn.MaxPool2d(2),
        conv_block(32, 64),
        conv_block(64, 64),
        nn.MaxPool2d(2),
        conv_block(64, 128),
        Residual(conv_block(128, 128), conv_block(128, 128)),
        nn.MaxPool2d(2),
        conv_block(128, 256),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, num_classes),
    )


def train(net: nn.Module, data: Path, image_size: int, steps: int, batch_size: int = 128) -> None:
    """Train a classifier on the real images of the training shards."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = one_cycle(optimizer, 0.2, steps, warmup=0.2)
    batches = labeled_batches(str(data / "train-*.tar"), image_size, batch_size, seed=1)
    for step, (images, labels) in zip(range(1, steps + 1), batches):
        loss = F.cross_entropy(net(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def real_accuracy(net: nn.Module, data: Path, image_size: int) -> float:
    """Return the classifier's accuracy on the real images of the validation shards."""
    shards = ImageShards(str(data / "val-*.tar"), image_size, False, labels=True)
    correct = []
    for batch in torch.utils.data.DataLoader(shards, EVAL_BATCH_SIZE):
        correct.append(net(batch["images"]).argmax(1) == batch["label"])
    return torch.cat(correct).float().mean().item()


def load_or_train(path: Path, data: Path, num_classes: int, image_size: int, steps: int) -> nn.Module:
    """Load the classifier of a file, or train one and write the file; return it in evaluation mode.

    Raises:
        ValueError: the file holds a classifier of other steps, data or size, or does not say of which.
    """
    torch.manual_seed(1)
    net = make_classifier(num_classes)
    settings = {"steps": steps, "image_size": image_size, "classes": num_classes, "data": shard_sizes(data)}
    if path.is_file():
        net.load_state_dict(load_weights(path, settings))
        print(f"classifier: {path}, trained before ({steps} steps)")
        return net.eval()
    train(net, data, image_size, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        torch.save({"trained": settings, "weights": net.state_dict()}, partial)
    return net.eval()


def load_weights(path: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Load the weights of a classifier file; ValueError if it was trained with other settings."""
    saved = torch.load(path, weights_only=True)
    trained = saved.get("trained", {})
    differing = [key for key in settings if trained.get(key) != settings[key]]
    if differing:
        raise ValueError(
            f"{path} must hold a classifier trained with the same {' and '.join(differing)}: delete it, or name "
            "another --classifier"
        )
    return saved["weights"]


def shard_sizes(data: Path) -> list[str]:
    """Return name and size of each training shard, which distinguish one dataset from another."""
    return [f"{shard.name} {shard.stat().st_size}" for shard in sorted(data.glob("train-*.tar"))]


@torch.no_grad()
def recognized(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image (B, 3, H, W) is classified as its label (B,)."""
    return torch.cat([net(batch).argmax(1) for batch in images.split(EVAL_BATCH_SIZE)]) == labels


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder of train-*.tar, val-*.tar, classes.json")
    p.add_argument("--image-size", type=int, default=32, help="size of the shards' images (default: %(default)s)")
    model = p.add_argument_group("generated images")
    model.add_argument("--checkpoint", help="stage-2 run; without it only the classifier is trained")
    model.add_argument("--template", default="a photo of a {label}", help="prompt of a class (default: %(default)s)")
    model.add_argument("--per-class", type=int, default=100, help="images per class (default: %(default)s)")
    model.add_argument("--seed", type=int, default=0, help="seed; image i uses seed + i (default: %(default)s)")
    model.add_argument(
        "--rerank-from",
        type=int,
        default=1,
        help="number of candidates per image, of which the one with the highest CLIP score is kept (default: 1)",
    )
    add_sampling_options(model)
    model.add_argument(
        "--output",
        type=Path,
        default=Path("runs/recognize"),
        help="folder of grid.png and recognized.json (default: %(default)s)",
    )
    classifier = p.add_argument_group("classifier")
    classifier.add_argument(
        "--classifier",
        type=Path,
        default=Path("runs/classifier.pt"),
        help="file that is read, or written after training (default: %(default)s)",
    )
    classifier.add_argument("--steps", type=int, default=2000, help="training steps (default: %(default)s)")
    return p


def main() -> None:
    """Train or load the classifier, then evaluate the model."""
    args = parser().parse_args()
    if args.steps < 1:
        parser().error(f"--steps must be at least 1, got {args.steps}")
    if not (args.data / "classes.json").is_file():
        sys.exit(f"recognize.py: error: no classes.json in {args.data}; scripts/make_shards.py writes it")
    class_names = json.loads((args.data / "classes.json").read_text())
    try:
        net = load_or_train(args.classifier, args.data, len(class_names), args.image_size, args.steps)
    except ValueError as error:
        sys.exit(f"recognize.py: error: {error}")
    print(f"classifier on real validation images: {real_accuracy(net, args.data, args.image_size):.4f}")
    if args.checkpoint:
        evaluate(args, net, class_names)


def evaluate(args: argparse.Namespace, net: nn.Module, class_names: list[str]) -> None:
    """Generate images of every class; write and print the fraction that is recognized, and a grid."""
    params = sampling_params(args)
    generate = make_generate_fn(TextToImage.load(args.checkpoint), params, args.rerank_from)
    labels = torch.arange(len(class_names)).repeat_interleave(args.per_class)
    prompts = [args.template.format(label=class_names[label]) for label in labels]
    images = generate(prompts, [args.seed + i for i in range(len(prompts))])
    correct = recognized(net, images, labels).float()
    results: dict[str, Any] = dict(zip(class_names, correct.view(len(class_names), -1).mean(dim=1).tolist()))
    results["all"] = correct.mean().item()
    results["settings"] = {**asdict(params), "rerank_from": args.rerank_from, "seed": args.seed}
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "recognized.json", results)
    save_png(class_grid(images, class_names), args.output / "grid.png")
    print(json.dumps(results, indent=2))


def class_grid(images: Tensor, class_names: list[str], rows: int = 8) -> Any:
    """Return a grid with one column per class, of the first images of each."""
    per_class = images.view(len(class_names), -1, *images.shape[1:])[:, :rows]
    rows = per_class.shape[1]
    first = per_class.transpose(0, 1).flatten(0, 1)
    return grid(to_pil(first), columns=len(class_names), captions=class_names * rows, cell=96)


if __name__ == "__main__":
    main()
