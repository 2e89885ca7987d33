"""A classifier of small images, trained on real images only, which evaluates generated ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.checkpoint.safe_load import read_checkpoint

WIDTHS = (64, 256, 256)
# Statistics of the pixels in [-1, 1]: CIFAR-10's, which are close enough for other photographs.
MEAN = (-0.017, -0.036, -0.107)
STD = (0.494, 0.487, 0.523)
# Size and number of the filters of the first layer: two signs of each principal component of 2 x 2 patches.
WHITENING_SIZE = 2
WHITENING_FILTERS = 2 * 3 * WHITENING_SIZE**2
# Weights of the views that a prediction averages: centered, and shifted along the diagonal.
SHIFT_WEIGHTS = {0: 0.5, -1: 0.25, 1: 0.25}
BATCH_SIZE = 250
FILE_DESCRIPTION = "a file of `python -m clipgen train_classifier`"


class ImageClassifier(nn.Module):
    """A convolutional network for 32 x 32 images after airbench94 (Jordan 2024, arXiv:2404.00498).

    Args:
        num_classes: number of classes.
        widths: channels of the three blocks; the last one is the number of features.
        image_size: size to which images are resized; None leaves them as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = WIDTHS, image_size: int | None = None):
        super().__init__()
        self.image_size = image_size
        self.whitening = nn.Conv2d(3, WHITENING_FILTERS, WHITENING_SIZE)
        self.whitening.weight.requires_grad_(False)
        channels = (WHITENING_FILTERS, *widths)
        self.blocks = nn.Sequential(*(block(*channels[i : i + 2]) for i in range(3)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, 3, H, W) in [-1, 1]."""
        images = self.resized(images)
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        hidden = self.blocks(F.gelu(self.whitening(images)))
        return hidden.amax(dim=(2, 3))

    def resized(self, images: Tensor) -> Tensor:
        """Return images in the size of the training, which alone the classifier recognizes; antialiased."""
        if self.image_size is None or images.shape[-2:] == (self.image_size, self.image_size):
            return images
        size = (self.image_size, self.image_size)
        return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, 3, H, W) in [-1, 1]."""
        # The factor keeps the initial logits small.
        return self.head(self.features(images)) / 9

    @torch.no_grad()
    def mean_logits(self, images: Tensor) -> Tensor:
        """Return the logits (B, C), averaged over shifted and mirrored views of the images."""
        images = self.resized(images)
        logits = torch.zeros(len(images), self.head.out_features, device=images.device)
        for shift, weight in SHIFT_WEIGHTS.items():
            view = shifted(images, torch.full((len(images), 2), shift))
            logits += weight * (self(view) + self(view.flip(-1))).float()
        return logits

    def predict(self, images: Tensor) -> Tensor:
        """Return the class (B,) of each image, from ``mean_logits``."""
        return torch.cat([self.mean_logits(batch).argmax(dim=1) for batch in images.split(BATCH_SIZE)])

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, F) of images, and the logits (B, C) that ``predict`` uses, for ``Features``."""
        return self.features(images), self.mean_logits(images)


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions that halve height and width."""
    return nn.Sequential(
        convolution(in_channels, out_channels),
        nn.MaxPool2d(2),
        batch_norm(out_channels),
        nn.GELU(),
        convolution(out_channels, out_channels),
        batch_norm(out_channels),
        nn.GELU(),
    )


def convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution whose first output channels are its input channels."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])
    return conv


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with a fixed scale and statistics of the last few batches."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Return images (B, C, H, W), cropped at offsets (B, 2) down and right to their own size; borders are mirrored."""
    margin = int(offsets.abs().max())
    if margin == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, [margin] * 4, mode="reflect")
    result = torch.empty_like(images)
    # All images of one offset at a time.
    for offset in offsets.unique(dim=0):
        top, left = (margin + offset).tolist()
        chosen = (offsets == offset).all(dim=1)
        result[chosen] = padded[chosen, :, top : top + height, left : left + width]
    return result


def accuracy_sentence(about: Mapping[str, Any]) -> str:
    """Return a sentence that states the accuracy of a classifier and its 95 % interval, from ``load_classifier``."""
    accuracy = about["accuracy"]
    low, high = accuracy["interval"]
    return (
        f"The accuracy of the classifier is {accuracy['all']:.1%} ({low:.1%} to {high:.1%}) on {accuracy['images']} "
        "real validation images."
    )


def load_classifier(path: str | Path) -> tuple[ImageClassifier, dict[str, Any]]:
    """Load a file of ``python -m clipgen train_classifier``: the classifier, its training settings and its accuracy.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file contains something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"classifier must be {FILE_DESCRIPTION}, got {path}, which does not exist")
    saved = read_checkpoint(path)
    try:
        about = saved["about"]
        trained = about["trained"]
        classifier = ImageClassifier(
            len(about["accuracy"]["per_class"]), tuple(trained["widths"]), int(trained["image_size"])
        )
        classifier.load_state_dict(saved["weights"])
    # Everything that a file with other content can raise.
    except Exception as error:
        raise ValueError(f"classifier must be {FILE_DESCRIPTION}, got {path} with other content") from error
    return classifier.to(memory_format=torch.channels_last).eval(), about
