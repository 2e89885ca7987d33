"""Feature spaces that tests can follow, and folders of shapes."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from clipgen.data.shapes import ShapesDataset
from clipgen.evaluation.feature_store import FeatureStore, Source, collect
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.report import compute_results
from clipgen.images import save_png, to_pil


def patch_means(images: Tensor) -> Tensor:
    """Return the means of 8 x 8 patches, 48 numbers."""
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


def sixteen_classes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same features, and logits of 16 classes."""
    features = patch_means(images)
    return features, features[:, :16] * 3


def shapes_folder(folder: Path, count: int, seed: int) -> Path:
    """Write PNGs of shapes with their captions in the metadata."""
    folder.mkdir()
    data = ShapesDataset(count, seed=seed)
    for i, image in enumerate(to_pil(data.render(range(count)))):
        save_png(image, folder / f"{i:03d}.png", {"prompt": str(data.attributes[i])})
    return folder


def results_of(source: Source, metrics: ImageMetrics, folder: Path) -> dict[str, float]:
    """Measure a source and return the results without a reference."""
    collect(folder, source, metrics, metrics.identity())
    return compute_results(FeatureStore(folder))
