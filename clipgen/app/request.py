"""The request of a visitor: prompts, number of images and sampling parameters, checked and passed to the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image

from clipgen.app.limits import MAX_CANDIDATES, MAX_IMAGES, MAX_PROMPT_LENGTH, MAX_SWEEP_IMAGES
from clipgen.generation.prompts import Prompt, check_request, texts_of
from clipgen.sampling import per_sample_seeds
from clipgen.sampling_params import SamplingParams

if TYPE_CHECKING:
    from clipgen.generation.options import Preview
    from clipgen.pipeline import TextToImage


@dataclass(frozen=True)
class ImageRequest:
    """The arguments of a call of ``TextToImage``, or of several calls with different sampling parameters.

    Args:
        model: name of the model.
        prompts: one prompt; or two, between which the images lead.
        sweep: sampling parameters; the images are generated with each of them.
        num_images: images per sampling parameters.
        seed: seed of the first image.
        rerank_from: candidates that CLIP chooses from; None disables reranking.
        outpaint: image to complete.
        keep_fraction: fraction of the height of ``outpaint`` that is kept.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sweep: tuple[SamplingParams, ...]
    num_images: int
    seed: int
    rerank_from: int | None = None
    outpaint: Image.Image | None = None
    keep_fraction: float = 0.5

    @property
    def total(self) -> int:
        """Number of images that are generated, including the candidates."""
        return (self.rerank_from or self.num_images) * len(self.sweep)

    def check(self) -> None:
        """Raise ValueError or TypeError if the request is invalid or beyond the limits of the page."""
        for prompt in self.prompts:
            check_request(prompt, self.num_images, self.rerank_from)
            check_length(prompt)
        per_sample_seeds(self.seed, self.rerank_from or self.num_images)
        if self.num_images > MAX_IMAGES:
            raise ValueError(f"the number of images must be at most {MAX_IMAGES}, got {self.num_images}")
        if (self.rerank_from or 0) > MAX_CANDIDATES:
            raise ValueError(f"the number of candidates must be at most {MAX_CANDIDATES}, got {self.rerank_from}")
        check_sweep(len(self.sweep), self.total)

    def generate(self, pipe: TextToImage, preview: Preview) -> list[Image.Image]:
        """Generate the images, parameter by parameter."""
        images = []
        for params in self.sweep:
            images += self._generate(pipe, params, preview)
        return images

    def _generate(self, pipe: TextToImage, params: SamplingParams, preview: Preview) -> list[Image.Image]:
        """Generate the images with one set of sampling parameters."""
        if len(self.prompts) == 2:
            first, second = self.prompts
            return pipe.interpolate(first, second, self.num_images, params, seed=self.seed, preview=preview)
        return pipe(
            self.prompts[0],
            self.num_images,
            params,
            rerank_from=self.rerank_from,
            seed=self.seed,
            outpaint=self.outpaint,
            keep_fraction=self.keep_fraction,
            preview=preview,
        )

    def regenerate(self, position: int, seed: int) -> ImageRequest:
        """Return the request of a single image of this request; of all of them for an interpolation.

        Args:
            position: number of the image in the results.
            seed: seed of the image.
        """
        params = self.sweep[position // self.num_images]
        if len(self.prompts) == 2:
            return replace(self, sweep=(params,))
        return replace(self, sweep=(params,), num_images=1, rerank_from=None, seed=seed)

    def generate_more(self, position: int, num_images: int) -> ImageRequest:
        """Return a request for images like one of this request: the same prompt and settings, and a new seed.

        Args:
            position: number of the image in the results.
            num_images: number of images. If there were fewer candidates, they become as many as the images.
        """
        params = self.sweep[position // self.num_images]
        number = self.num_images if len(self.prompts) == 2 else num_images
        candidates = None if self.rerank_from is None else max(self.rerank_from, number)
        return replace(self, sweep=(params,), num_images=number, rerank_from=candidates, seed=random_seed())

    def variations(self, position: int, image: Image.Image, num_images: int) -> ImageRequest:
        """Return a request for variations of an image: the image is the prompt."""
        params = self.sweep[position // self.num_images]
        return ImageRequest(self.model, (image,), (params,), num_images, random_seed())


def random_seed() -> int:
    """Return a random seed."""
    return per_sample_seeds(None, 1)[0]


def check_length(prompt: Prompt) -> None:
    """Raise ValueError if a text, or a text of a mixture, is too long."""
    for text in texts_of(prompt):
        if len(text) > MAX_PROMPT_LENGTH:
            raise ValueError(f"a prompt must have at most {MAX_PROMPT_LENGTH} characters, got {len(text)}")


def check_sweep(combinations: int, total: int) -> None:
    """Raise ValueError if a sweep has too many images.

    Args:
        combinations: number of sets of sampling parameters; the limit applies to two and more.
        total: number of images of all of them.
    """
    if combinations > 1 and total > MAX_SWEEP_IMAGES:
        raise ValueError(f"a sweep must have at most {MAX_SWEEP_IMAGES} images, got {total}")
