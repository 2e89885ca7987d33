"""The metrics of a set of generated images.

To add a metric, write a class with the members of ``Metric`` and put an instance into ``METRICS``. A metric stores
columns with one row per image and computes its results from the stored columns, so that an evaluation can be resumed,
distributed, and compared with a reference that was measured before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor

from clipgen.data.shapes import parse
from clipgen.evaluation import functional, shapes_evaluator
from clipgen.evaluation.caps import Captioner
from clipgen.evaluation.feature_store import FeatureStore
from clipgen.images import from_pil, to_pil

if TYPE_CHECKING:
    from clipgen.evaluation.image_metrics import ImageMetrics

logger = logging.getLogger(__name__)
FEATURES = "features_"  # a column per blur radius: features_0, features_1, ...
UNBLURRED = FEATURES + "0"
LOGITS = "logits"
CLIP = "clip "  # a column per CLIP model
Labels = Mapping[str, str]


class Metric(Protocol):
    """A metric of a set of images."""

    labels: ClassVar[Labels]
    """Headings of the results in tables, by the name of the result."""

    network: ClassVar[str]
    """The network that headings name: ``"features"``, ``"captioner"``, or ``""`` for none."""

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return what is stored of each image, (B, ...) per column; {} if the metric is not enabled.

        Metrics that need the same column return it under the same name; ``batch`` computes features once.
        """

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return the results of a set, by name; {} if a column or the reference that the metric needs is missing."""


class MetricBatch:
    """Images (B, 3, H, W) in [-1, 1] with their captions, and the networks that measure them."""

    def __init__(self, images: Tensor, captions: Sequence[str], settings: ImageMetrics):
        self.images = images
        self.captions = captions
        self.settings = settings

    @cached_property
    def outputs(self) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Features (B, F) and, from a classifier, logits (B, C) by blur radius."""
        if self.settings.features is None:
            return {}
        return {radius: self.settings.features.classify(blurred(self.images, radius)) for radius in self.settings.radii}

    def features(self, radius: int) -> dict[str, Tensor]:
        """Return the column of the features at a blur radius; {} if it is not measured."""
        return {f"{FEATURES}{radius}": self.outputs[radius][0]} if radius in self.outputs else {}

    def logits(self) -> Tensor | None:
        """Return the logits (B, C) of the images; None if the features are not a classifier's."""
        return self.outputs[0][1] if 0 in self.outputs else None


def blurred(images: Tensor, radius: int) -> Tensor:
    """Blur images in [-1, 1] with Pillow's Gaussian filter, on 8-bit pixels as in the papers' tables."""
    if radius == 0:
        return images
    blur = ImageFilter.GaussianBlur(radius)
    return torch.cat([from_pil(image.filter(blur)) for image in to_pil(images)]).to(images.device)


class InceptionScore:
    """IS, from the logits of a classifier."""

    labels: ClassVar[Labels] = {"is_mean": "IS ↑"}
    network: ClassVar[str] = "features"

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return the logits (B, C)."""
        logits = batch.logits()
        return {} if logits is None else {LOGITS: logits}

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return mean and standard deviation over splits; {} with a warning if there are too few images."""
        if LOGITS not in images.column_names():
            return {}
        least = 2 * functional.IS_SPLITS
        if len(images) < least:
            logger.warning("IS is omitted: it needs at least %d images, got %d", least, len(images))
            return {}
        logits = torch.from_numpy(images.memmap_column(LOGITS, images.folder))
        mean, std = functional.inception_score(logits)
        return {"is_mean": mean, "is_std": std}


class FrechetDistance:
    """FID, at every blur radius: FID-0, FID-1, FID-2 of CogView and CLIP-GEN."""

    labels: ClassVar[Labels] = {"fid_0": "FID-0 ↓", "fid_1": "FID-1 ↓", "fid_2": "FID-2 ↓"}
    network: ClassVar[str] = "features"

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return the features (B, F) at each radius."""
        columns: dict[str, Tensor] = {}
        for radius in batch.outputs:
            columns |= batch.features(radius)
        return columns

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return the distance at each radius that both sides have."""
        if reference is None:
            return {}
        results = {}
        for name in sorted(images.column_names() & reference.column_names()):
            if name.startswith(FEATURES):
                ours = functional.moments(images.iter_column(name))
                theirs = functional.moments(reference.iter_column(name))
                results[f"fid_{name.removeprefix(FEATURES)}"] = functional.frechet_distance(ours, theirs)
        return results


class FeatureComparison:
    """Base of the metrics that compare the unblurred features of both sides."""

    network: ClassVar[str] = "features"

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return the features (B, F)."""
        return batch.features(0)

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return the comparison of the features, which are memory-mapped."""
        if reference is None or UNBLURRED not in images.column_names():
            return {}
        ours = torch.from_numpy(images.memmap_column(UNBLURRED, images.folder))
        theirs = torch.from_numpy(reference.memmap_column(UNBLURRED, images.folder))
        return self.compare(ours, theirs)

    def compare(self, ours: Tensor, theirs: Tensor) -> dict[str, float]:
        """Return the results for features (N, F), (M, F)."""
        raise NotImplementedError


class KernelDistance(FeatureComparison):
    """KID: mean and standard deviation over subsets."""

    labels: ClassVar[Labels] = {"kid_mean": "KID ↓"}

    def compare(self, ours: Tensor, theirs: Tensor) -> dict[str, float]:
        """Return the distance."""
        mean, std = functional.kernel_distance(ours, theirs)
        return {"kid_mean": mean, "kid_std": std}


class PrecisionRecall(FeatureComparison):
    """Improved precision and recall."""

    labels: ClassVar[Labels] = {"precision": "precision ↑", "recall": "recall ↑"}

    def compare(self, ours: Tensor, theirs: Tensor) -> dict[str, float]:
        """Return both."""
        precision, recall = functional.precision_recall(ours, theirs)
        return {"precision": precision, "recall": recall}


class ClipScore:
    """Cosine similarity of image and caption times 100, for each CLIP model."""

    labels: ClassVar[Labels] = {}
    network: ClassVar[str] = ""

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return the cosine (B,) for each model."""
        columns = {}
        for name, clip in batch.settings.clips.items():
            cosines = clip.encode_image(batch.images) * clip.encode_text(batch.captions)
            columns[CLIP + name] = cosines.sum(dim=1)
        return columns

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return the mean for each model."""
        names = sorted(name for name in images.column_names() if name.startswith(CLIP))
        return {f"clip_score {name.removeprefix(CLIP)}": 100 * column_mean(images, name) for name in names}


class ClassAccuracy:
    """Fraction of the images that a classifier assigns to the class of their caption."""

    labels: ClassVar[Labels] = {"accuracy": "recognized ↑"}
    network: ClassVar[str] = ""

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return whether each image is recognized, (B,). Captions are compared because some classes share a name."""
        classes = batch.settings.classes
        logits = batch.logits()
        if logits is None or not classes:
            return {}
        recognized = [classes[i] for i in logits.argmax(dim=1).tolist()]
        return {"accuracy": torch.tensor([a == b for a, b in zip(recognized, batch.captions)]).float()}

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return the mean."""
        return {"accuracy": column_mean(images, "accuracy")} if "accuracy" in images.column_names() else {}


class CaptionScore:
    """CapS, by a captioner."""

    labels: ClassVar[Labels] = {"caps": "CapS ↑"}
    network: ClassVar[str] = "captioner"

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return the score of each image and its caption, (B,)."""
        captioner = batch.settings.captioner
        if captioner is None:
            return {}
        scores = caption_scores(captioner, batch.images, batch.captions)
        return {"caps": torch.tensor(scores, dtype=torch.float64)}

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return the mean."""
        return {"caps": column_mean(images, "caps")} if "caps" in images.column_names() else {}


def caption_scores(captioner: Captioner, images: Tensor, captions: Sequence[str]) -> list[float]:
    """Return the CapS of each image and its caption; errors name the caption."""
    scores = []
    for log_probabilities, caption in zip(captioner(images, captions), captions, strict=True):
        try:
            scores.append(functional.caption_score(log_probabilities))
        except ValueError as error:
            raise ValueError(f"{error} in {caption!r}") from error
    return scores


class ShapesAccuracy:
    """Fraction of the images of shapes in which the rule-based evaluator recognizes the requested attributes."""

    names = ("all", *shapes_evaluator.ATTRIBUTES)
    labels: ClassVar[Labels] = {f"shapes_{name}": f"shapes: {name} ↑" for name in names}
    network: ClassVar[str] = ""

    def columns(self, batch: MetricBatch) -> dict[str, Tensor]:
        """Return whether all attributes, and each alone, are correct, (B, 5)."""
        if not batch.settings.shapes:
            return {}
        expected = [parse(caption) for caption in batch.captions]
        return {"shapes": shapes_evaluator.matches(batch.images, expected)}

    def reduce(self, images: FeatureStore, reference: FeatureStore | None) -> dict[str, float]:
        """Return the fraction for all attributes together, and for each."""
        if "shapes" not in images.column_names():
            return {}
        return {f"shapes_{name}": mean for name, mean in zip(self.names, images.column("shapes").mean(axis=0))}


def column_mean(images: FeatureStore, name: str) -> float:
    """Return the mean of a column of one number per image."""
    return float(images.column(name).astype(np.float64).mean())


# In the order of the columns of a table.
METRICS: tuple[Metric, ...] = (
    InceptionScore(),
    FrechetDistance(),
    KernelDistance(),
    PrecisionRecall(),
    ClipScore(),
    ClassAccuracy(),
    CaptionScore(),
    ShapesAccuracy(),
)
