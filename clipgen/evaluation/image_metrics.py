"""What is measured of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import ImageFilter
from torch import Tensor

from clipgen.checkpoint.model_folder import fingerprint
from clipgen.clip import FrozenCLIP
from clipgen.data.shapes import parse
from clipgen.evaluation import functional, shapes_evaluator
from clipgen.evaluation.caps import Blip, Captioner
from clipgen.evaluation.feature_store import Columns
from clipgen.evaluation.features import Features, source_hash
from clipgen.images import from_pil, to_pil


@dataclass
class ImageMetrics:
    """Images (B, 3, H, W) in [-1, 1] and their captions -> numbers, a row an image.

    Args:
        features: the space of FID, KID, precision and recall; of IS too, where it is a classifier's.
        radii: of the Gaussian blur before the features, 0 is none: FID-0, FID-1, FID-2 of CogView and CLIP-GEN.
        clips: by name, for the CLIP scores. captioner, captioner_name: for CapS.
        classes: the sentence of each class, where the features are a classifier's: how many it recognises.
        shapes: whether the rule-based judge of the shapes data reads the images.
        device: where the networks are; None: images are measured where they come.
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
    def identity(self) -> dict[str, Any]:
        """What tells these numbers from others."""
        found = self.space | {"shapes": self.shapes, "classes": list(self.classes), "captioner": self.captioner_name}
        if isinstance(self.captioner, Blip):
            found["captioner_weights"] = fingerprint(self.captioner.model.state_dict())
        elif self.captioner:
            found["captioner_source"] = source_hash(self.captioner)
        return found | {f"clip {name}": fingerprint(clip.state_dict()) for name, clip in self.clips.items()}

    @property
    def space(self) -> dict[str, Any]:
        """What must be the same where two sets of images are compared."""
        return {"features": self.features.identity if self.features else None, "radii": list(self.radii)}

    @property
    def anything(self) -> bool:
        """Whether there is a number that comes of it."""
        return bool(self.features or self.clips or self.captioner or self.shapes)

    def for_reference(self) -> ImageMetrics:
        """What is measured of the images that others are compared with."""
        return ImageMetrics(self.features, self.radii, device=self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Columns:
        images, columns = images.to(self.device), dict[str, Tensor]()
        if self.features:
            for radius in self.radii:
                columns[f"features_{radius}"], logits = self.features.classify(blurred(images, radius))
                if radius == 0 and logits is not None:
                    columns["logits"] = logits
                    if self.classes:
                        found = [self.classes[i] for i in logits.argmax(dim=1).tolist()]  # some classes share a name
                        columns["accuracy"] = torch.tensor([a == b for a, b in zip(found, captions)]).float()
        for name, clip in self.clips.items():
            columns[f"clip {name}"] = (clip.encode_image(images) * clip.encode_text(captions)).sum(1)
        if self.captioner:
            columns["caps"] = torch.tensor(caption_scores(self.captioner, images, captions), dtype=torch.float64)
        if self.shapes:
            columns["judge"] = shapes_evaluator.matches(images, [parse(caption) for caption in captions])
        return {name: values.cpu().numpy() for name, values in columns.items()}


def caption_scores(captioner: Captioner, images: Tensor, captions: Sequence[str]) -> list[float]:
    """CapS of each image and its caption; an error names the caption."""
    scores = []
    for words, caption in zip(captioner(images, captions), captions, strict=True):
        try:
            scores.append(functional.caption_score(words))
        except ValueError as error:
            raise ValueError(f"{error} in {caption!r}") from error
    return scores


def blurred(images: Tensor, radius: int) -> Tensor:
    """Pillow's Gaussian blur of images in [-1, 1], on 8-bit pixels as in the papers' tables."""
    if radius == 0:
        return images
    blur = ImageFilter.GaussianBlur(radius)
    return torch.cat([from_pil(picture.filter(blur)) for picture in to_pil(images)]).to(images.device)
