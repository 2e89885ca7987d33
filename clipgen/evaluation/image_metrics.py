"""The settings and networks of the metrics, applied to batches of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipgen.checkpoint.model_folder import fingerprint
from clipgen.clip import FrozenCLIP
from clipgen.evaluation.caps import Blip, Captioner
from clipgen.evaluation.feature_store import Columns
from clipgen.evaluation.features import Features, source_hash
from clipgen.evaluation.metrics import METRICS, MetricBatch


@dataclass
class ImageMetrics:
    """Compute the columns of all enabled metrics for images (B, 3, H, W) in [-1, 1] and their captions.

    Args:
        features: feature space of FID, KID, precision and recall, and of IS if it is a classifier's. None
            disables these metrics.
        radii: radii of the Gaussian blur before the features; 0 disables it.
        clips: CLIP models of the CLIP scores, by name.
        captioner: captioner of CapS.
        captioner_name: name of the captioner, which identifies it.
        classes: caption of each class of the features' classifier, to count the images that it recognizes.
        shapes: whether the rule-based evaluator of the shapes data reads the images.
        device: device of the networks, to which images are moved. None uses the device of the images.
    """

    features: Features | None = None
    radii: Sequence[int] = (0, 1, 2)
    clips: dict[str, FrozenCLIP] = field(default_factory=dict)
    captioner: Captioner | None = None
    captioner_name: str | None = None
    classes: Sequence[str] = ()
    shapes: bool = False
    device: torch.device | str | None = None

    @property
    def enabled(self) -> bool:
        """Whether any metric is enabled."""
        return bool(self.features or self.clips or self.captioner or self.shapes)

    @property
    def feature_config(self) -> dict[str, Any]:
        """The settings that must be equal on both sides of a comparison."""
        return {"features": self.features.identity if self.features else None, "radii": list(self.radii)}

    def identity(self) -> dict[str, Any]:
        """Return the settings that distinguish these measurements from others; hashes the weights of all networks."""
        identity = self.feature_config
        identity |= {"shapes": self.shapes, "classes": list(self.classes), "captioner": self.captioner_name}
        if isinstance(self.captioner, Blip):
            identity["captioner_weights"] = fingerprint(self.captioner.model.state_dict())
        elif self.captioner:
            identity["captioner_source"] = source_hash(self.captioner)
        for name, clip in self.clips.items():
            identity[f"clip {name}"] = fingerprint(clip.state_dict())
        return identity

    def for_reference(self) -> ImageMetrics:
        """Return the metrics of a reference: its features only."""
        return ImageMetrics(self.features, self.radii, device=self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Columns:
        """Return the columns (B, ...) of all enabled metrics."""
        batch = MetricBatch(images.to(self.device), captions, self)
        columns: dict[str, Tensor] = {}
        for metric in METRICS:
            columns |= metric.columns(batch)
        return {name: values.cpu().numpy() for name, values in columns.items()}
