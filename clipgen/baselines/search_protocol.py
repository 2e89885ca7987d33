"""The search of "CLIP-guided Zero-Shot Text-to-Image Generation" as its authors ran it, where their text is silent.

The constants are those of the public code of the paper (a project of the course CSC2516). ``deviations`` lists where a
run departs from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from clipgen.baselines.biggan import BigGANDeep
from clipgen.baselines.search import PAPER_SEEDS, PAPER_TEMPLATE
from clipgen.clip import FrozenCLIP
from clipgen.data.class_names import name_list
from clipgen.hashing import hashed_seed

TRUNCATION = 0.4  # for BigGAN-deep; SAGAN's noise is not truncated
THRESHOLD = 0.2841796875  # mean score of real training images and captions, in the published scale
NUM_IMAGES = 100
RANKING_SEED = 42
MAX_CAPTION_LETTERS = 70
CLIP_INPUTS = ("published", "normalized")
ALWAYS = (
    "random numbers come from a stream per image instead of global generators",
    "all images are used (the last incomplete batch is left out there), and each has its own list of classes "
    "(the first of each batch of 64 there searches all)",
    "CLIP computes in single precision",
    "the prompts are those given (the 2778 test images of C-CUB there)",
)


class PublishedCLIPInput:
    """A CLIP that is given images as in the public code: in [-1, 1] without CLIP's mean and standard deviation.

    They are resized bilinearly without antialiasing.

    Args:
        clip: the CLIP model.
    """

    def __init__(self, clip: FrozenCLIP):
        self.clip = clip
        self.device = clip.device
        self.tokenizer = clip.tokenizer

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: -> (B, E), unit norm."""
        return self.clip.encode_text(texts)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) in [-1, 1]: -> (B, E), unit norm."""
        size = self.clip.image_size
        images = TF.resize(images.clamp(-1, 1), [size], InterpolationMode.BILINEAR, antialias=False)
        embeddings = self.clip.model.encode_image(TF.center_crop(images, [size, size]))
        return F.normalize(embeddings.float(), dim=-1)


@dataclass
class SearchProtocol:
    """The settings of a run.

    Args:
        truncation: truncation of the noise; None disables it.
        template: text of a class.
        num_images: images per prompt.
        seeds: seeds to average over.
        threshold: score that "images needed" counts to; None does not count images.
        clip_input: ``"published"``, see ``PublishedCLIPInput``, or ``"normalized"``, as CLIP was trained.
        one_caption: score all images of a prompt against the caption that ranks the classes, instead of each against
            a random caption of the same image.
        own_class_names: the class names are not those of ``keras_names``.
    """

    truncation: float | None
    template: str = PAPER_TEMPLATE
    num_images: int = NUM_IMAGES
    seeds: Sequence[int] = PAPER_SEEDS
    threshold: float | None = THRESHOLD
    clip_input: str = "published"
    one_caption: bool = False
    own_class_names: bool = False

    def deviations(self, generator: Any, has_several_captions: bool) -> list[str]:
        """Return the deviations of a run from the public code, one phrase each.

        Args:
            generator: the generator that is searched.
            has_several_captions: whether the images have several captions each.
        """
        phrases = list(ALWAYS)
        published = SearchProtocol(published_truncation(generator))
        for name in ("truncation", "template", "num_images", "threshold"):
            value = getattr(self, name)
            wanted = getattr(published, name)
            if value != wanted:
                phrases.append(f"{name} is {value} instead of {wanted}")
        if list(self.seeds) != list(PAPER_SEEDS):
            phrases.append(f"seeds are {list(self.seeds)} instead of {list(PAPER_SEEDS)}")
        if self.clip_input != "published":
            phrases.append("images are normalized and resized as CLIP expects, so scores are on another scale")
        if self.one_caption or not has_several_captions:
            phrases.append("one caption per image ranks the classes and scores all images")
        if self.own_class_names:
            phrases.append("class names are given")
        else:
            phrases.append("class names are torchvision's with underscores (Keras's differ in 'crane' and 'maillot')")
        return phrases


def published_truncation(generator: Any) -> float | None:
    """Return the truncation of the paper for a generator: 0.4 for BigGAN-deep, else none."""
    return TRUNCATION if isinstance(getattr(generator, "model", None), BigGANDeep) else None


def keras_names() -> list[str]:
    """Return ImageNet's class names as in Keras's ``imagenet_class_index.json``, such as ``great_white_shark``."""
    return [name.replace(" ", "_") for name in name_list("imagenet-torchvision")]


def prepare_caption(caption: str) -> str:
    """Return a caption as the public code gives it to CLIP: in lower case and cut to 70 characters."""
    return caption.strip().lower()[:MAX_CAPTION_LETTERS]


def ranking_caption(captions: Sequence[str], number: int) -> str:
    """Return the random caption of an image that ranks the classes, the same for all seeds.

    Args:
        captions: captions of the image.
        number: number of the image.
    """
    generator = torch.Generator().manual_seed(hashed_seed(f"ranking {RANKING_SEED} {number}"))
    return captions[int(torch.randint(len(captions), (), generator=generator))]
