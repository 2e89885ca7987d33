"""Train a classifier on real images only, which then evaluates generated ones.

    python -m clipgen train_classifier --data data/cifar10 --output runs/classifier

writes classifier.pt with the weights, the accuracy on the validation images and its 95 % interval. The last training
shard is held out, so that real images besides the validation images exist that the classifier has not seen. An
interrupted run resumes after its last epoch. ``classifier:runs/classifier/classifier.pt`` is a feature space of
clipgen-eval.

The recipe is that of airbench94 (Jordan 2024, arXiv:2404.00498): whitened patches, alternating flips, translation by
two pixels, label smoothing, SGD with a triangular learning rate, an average of the weights, predictions averaged over
views. It runs in bfloat16 on processors that multiply in it, else in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.data.webdataset import ImageShards
from clipgen.evaluation.classifier import WHITENING_SIZE, WIDTHS, ImageClassifier, shifted
from clipgen.evaluation.intervals import wilson_interval
from clipgen.hardware.processor import has_bf16_units
from clipgen.nonfinite import check_loss
from clipgen.storage.files import atomic_write, user_path
from clipgen.storage.run_lock import hold_lock

# At a batch size of 1024; it scales with the batch size.
LEARNING_RATE = 1.5
MOMENTUM = 0.85
WEIGHT_DECAY = 1.33e-3
# Factor of the learning rate of the biases of batch norms, whose decay per step stays the same.
BIAS_SCALE = 64
LABEL_SMOOTHING = 0.2
# Fractions of the peak learning rate at the start and the end, and position of the peak in the training.
START = 0.2
END = 0.07
PEAK = 0.23
# Largest translation of a training image in pixels.
TRANSLATION = 2
# Epochs after which the biases of the first layer are frozen.
WHITENING_EPOCHS = 3
# Steps between two updates of the average of the weights.
AVERAGE_EVERY = 5
# Images whose patches define the first layer.
WHITENING_IMAGES = 5000


@dataclass(frozen=True)
class Settings:
    """Settings that determine the trained weights, up to rounding."""

    epochs: int
    batch_size: int
    held_out: int
    image_size: int
    seed: int
    widths: tuple[int, ...]
    data: tuple[str, ...]


@dataclass
class LabeledImages:
    """Images (N, 3, H, W) as bytes and their labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def floats(self, chosen: Tensor | slice) -> Tensor:
        """Return some of the images, in [-1, 1]."""
        return self.images[chosen].float() / 127.5 - 1


def load_images(shards: list[Path], image_size: int) -> LabeledImages:
    """Decode all images of some shards."""
    dataset = ImageShards([str(shard) for shard in shards], image_size, train=False, labels=True)
    images = []
    labels = []
    for batch in torch.utils.data.DataLoader(dataset, 500):
        images.append(((batch["images"] + 1) * 127.5).round().to(torch.uint8))
        labels.append(batch["label"])
    return LabeledImages(torch.cat(images), torch.cat(labels))


def split_shards(data: Path, held_out: int) -> tuple[list[Path], list[Path]]:
    """Return the training shards that the classifier is trained on, and the last ones, which are held out of it.

    Raises:
        ValueError: too few shards.
    """
    shards = sorted(data.glob("train-*.tar"))
    if len(shards) <= held_out:
        raise ValueError(f"{data} must contain more than {held_out} train-*.tar, got {len(shards)}: use --held-out 0")
    return shards[: len(shards) - held_out], shards[len(shards) - held_out :]


def initialize_whitening(classifier: ImageClassifier, images: Tensor) -> None:
    """Set the first layer to the whitened principal components of the images' patches, with both signs."""
    normalized = (images - classifier.mean) / classifier.std
    patches = F.unfold(normalized, WHITENING_SIZE).transpose(1, 2).flatten(0, 1).double()
    covariance = patches.T @ patches / len(patches)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T.flip(0).view(-1, 3, WHITENING_SIZE, WHITENING_SIZE)
    classifier.whitening.weight.data.copy_(torch.cat([filters, -filters]))


def make_optimizer(classifier: ImageClassifier, batch_size: int) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum, whose batch norm biases have a rate and decay of their own."""
    biases = [norm.bias for norm in classifier.modules() if isinstance(norm, nn.BatchNorm2d)]
    numbers = {id(bias) for bias in biases}
    others = [p for p in classifier.parameters() if p.requires_grad and id(p) not in numbers]
    rate = LEARNING_RATE * batch_size / 1024
    groups = [
        {"params": others, "lr": rate, "weight_decay": WEIGHT_DECAY},
        {"params": biases, "lr": rate * BIAS_SCALE, "weight_decay": WEIGHT_DECAY / BIAS_SCALE},
    ]
    return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)


def triangle(progress: float) -> float:
    """Return the fraction of the peak learning rate at a position in the training, in [0, 1]."""
    if progress < PEAK:
        return START + (1 - START) * progress / PEAK
    return 1 + (END - 1) * (progress - PEAK) / (1 - PEAK)


def average_decay(progress: float) -> float:
    """Return the decay of the average of the weights, which grows along the training."""
    return 0.95**AVERAGE_EVERY * progress**3


class Training:
    """The state of a training run, which is saved after each epoch."""

    def __init__(self, settings: Settings, num_classes: int, output: Path):
        self.settings = settings
        self.output = output
        torch.manual_seed(settings.seed)
        widths: Any = settings.widths
        self.classifier = ImageClassifier(num_classes, widths).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.classifier, settings.batch_size)
        self.average: dict[str, Tensor] = {}
        self.epoch = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    @property
    def checkpoint(self) -> Path:
        """The file of the last complete epoch."""
        return self.output / "checkpoint.pt"

    def start(self, data: LabeledImages) -> None:
        """Resume from the checkpoint of the same settings, or initialize the first layer from the images."""
        if self.checkpoint.is_file():
            saved = torch.load(self.checkpoint, weights_only=True)
            if saved["settings"] != asdict(self.settings):
                raise ValueError(f"{self.checkpoint} must be of the same settings: delete it, or use another --output")
            self.classifier.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average = saved["average"]
            self.epoch = saved["epoch"]
            self.seconds = saved["seconds"]
            self.cpu_seconds = saved["cpu_seconds"]
            return
        initialize_whitening(self.classifier, data.floats(slice(WHITENING_IMAGES)))
        self.average = {name: value.clone() for name, value in self.classifier.state_dict().items()}

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "settings": asdict(self.settings),
            "weights": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        with atomic_write(self.checkpoint) as partial:
            torch.save(state, partial)

    def train_epoch(self, data: LabeledImages) -> float:
        """Train for one epoch; return the mean loss."""
        self.classifier.train()
        steps_per_epoch = len(data) // self.settings.batch_size
        total = self.settings.epochs * steps_per_epoch
        losses = []
        for number, (images, labels) in enumerate(self.batches(data)):
            step = self.epoch * steps_per_epoch + number
            losses.append(self.train_step(images, labels, step / total))
            check_loss(losses[-1], step)
            if (step + 1) % AVERAGE_EVERY == 0:
                self.update_average(average_decay((step + 1) / total))
        self.epoch += 1
        return sum(losses) / len(losses)

    def train_step(self, images: Tensor, labels: Tensor, progress: float) -> float:
        """Take one step at a position in the training; return the loss."""
        rate = LEARNING_RATE * self.settings.batch_size / 1024 * triangle(progress)
        for group, scale in zip(self.optimizer.param_groups, (1, BIAS_SCALE)):
            group["lr"] = rate * scale
        # A parameter without gradient is not stepped, nor decayed.
        self.classifier.whitening.bias.requires_grad_(self.epoch < WHITENING_EPOCHS)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_units()):
            logits = self.classifier(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def batches(self, data: LabeledImages) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, in an order and with translations that depend on seed and epoch alone."""
        generator = torch.Generator().manual_seed(self.settings.seed * 10_000 + self.epoch)
        # Each image is mirrored in every second epoch.
        first = torch.rand(len(data), generator=torch.Generator().manual_seed(self.settings.seed)) < 0.5
        mirrored = first ^ bool(self.epoch % 2)
        order = torch.randperm(len(data), generator=generator)
        size = self.settings.batch_size
        for start in range(0, len(data) // size * size, size):
            chosen = order[start : start + size]
            images = data.floats(chosen)
            images = torch.where(mirrored[chosen].view(-1, 1, 1, 1), images.flip(-1), images)
            yield translated(images, generator), data.labels[chosen]

    def update_average(self, decay: float) -> None:
        """Move the average towards the weights, then set the weights to it (Lookahead, arXiv:1907.08610)."""
        for name, value in self.classifier.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
                value.copy_(self.average[name])

    def finish(self) -> ImageClassifier:
        """Return the classifier with the average of the weights, in evaluation mode."""
        self.update_average(1.0)
        return self.classifier.eval()


def translated(images: Tensor, generator: torch.Generator) -> Tensor:
    """Translate each image at random; the border is mirrored."""
    positions = 2 * TRANSLATION + 1
    corners = torch.randint(positions**2, (len(images),), generator=generator)
    return shifted(images, torch.stack([corners // positions, corners % positions], dim=1) - TRANSLATION)


def measure(classifier: ImageClassifier, data: LabeledImages, num_classes: int) -> dict[str, Any]:
    """Return the accuracy on real images, its 95 % interval, and the accuracy on each class."""
    batches = [slice(start, start + 500) for start in range(0, len(data), 500)]
    predictions = torch.cat([classifier.predict(data.floats(batch)) for batch in batches])
    correct = predictions == data.labels
    low, high = wilson_interval(int(correct.sum()), len(correct))
    per_class = [correct[data.labels == number].float().mean().item() for number in range(num_classes)]
    return {
        "all": correct.float().mean().item(),
        "images": len(correct),
        "interval": [low, high],
        "per_class": per_class,
    }


def train(settings: Settings, data: Path, num_classes: int, output: Path) -> dict[str, Any]:
    """Train the classifier of a folder, write classifier.pt, and return its settings and accuracy."""
    output.mkdir(parents=True, exist_ok=True)
    shards, held_out = split_shards(data, settings.held_out)
    images = load_images(shards, settings.image_size)
    if len(images) < settings.batch_size:
        raise ValueError(f"--batch-size must be at most the {len(images)} training images, got {settings.batch_size}")
    if images.labels.max() >= num_classes:
        raise ValueError(f"classes.json must name every class, got {num_classes} and label {images.labels.max()}")
    training = Training(settings, num_classes, output)
    training.start(images)
    while training.epoch < settings.epochs:
        train_timed_epoch(training, images)
    classifier = training.finish()
    validation = load_images(sorted(data.glob("val-*.tar")), settings.image_size)
    about = {
        "trained": {**asdict(settings), "held_out_shards": [shard.name for shard in held_out]},
        "accuracy": measure(classifier, validation, num_classes),
        "seconds": training.seconds,
        "cpu_seconds": training.cpu_seconds,
        "precision": "bfloat16" if has_bf16_units() else "float32",
    }
    with atomic_write(output / "classifier.pt") as partial:
        torch.save({"about": about, "weights": classifier.state_dict()}, partial)
    return about


def train_timed_epoch(training: Training, images: LabeledImages) -> None:
    """Train for one epoch, write the checkpoint, and print the loss and the time."""
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    loss = training.train_epoch(images)
    training.seconds += time.perf_counter() - wall_start
    training.cpu_seconds += time.process_time() - cpu_start
    training.save()
    print(
        f"epoch {training.epoch}/{training.settings.epochs}  loss {loss:.4f}  "
        f"{training.seconds:.0f} s, {training.cpu_seconds:.0f} s of CPU time",
        flush=True,
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, required=True, help="folder of train-*.tar, val-*.tar, classes.json")
    parser.add_argument("--output", type=user_path, required=True, help="folder of classifier.pt and checkpoint.pt")
    parser.add_argument("--image-size", type=int, default=32, help="size of the shards' images (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=16, help="epochs (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="images per step (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=int, default=1, help="training shards that are held out (default: %(default)s)"
    )
    parser.add_argument(
        "--widths", type=int, nargs=3, default=WIDTHS, help="channels of the blocks (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of initialization and data (default: %(default)s)")
    return parser


def shard_sizes(data: Path) -> tuple[str, ...]:
    """Return name and size of all training shards, which distinguish one dataset from another."""
    return tuple(f"{shard.name} {shard.stat().st_size}" for shard in sorted(data.glob("train-*.tar")))


def main() -> None:
    """Train the classifier and print its accuracy."""
    args = make_parser().parse_args()
    if args.epochs < 1 or args.batch_size < 1 or args.held_out < 0:
        make_parser().error("--epochs and --batch-size must be at least 1, and --held-out at least 0")
    classes = args.data / "classes.json"
    if not classes.is_file():
        sys.exit(
            f"python -m clipgen train_classifier: error: no {classes}; python -m clipgen make_shards writes it for "
            "labeled data"
        )
    settings = Settings(
        args.epochs,
        args.batch_size,
        args.held_out,
        args.image_size,
        args.seed,
        tuple(args.widths),
        shard_sizes(args.data),
    )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with hold_lock(args.output):
            about = train(settings, args.data, len(json.loads(classes.read_text())), args.output)
    except (FileExistsError, ValueError) as error:
        sys.exit(f"python -m clipgen train_classifier: error: {error}")
    low, high = about["accuracy"]["interval"]
    print(
        f"accuracy on {about['accuracy']['images']} real validation images: {about['accuracy']['all']:.4f} "
        f"(95 % interval {low:.4f} to {high:.4f}), after {about['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
