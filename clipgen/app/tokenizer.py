"""Show the codes and the reconstruction of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from clipgen.images import from_pil, psnr, rounded, to_pil
from clipgen.visualization import code_grid

if TYPE_CHECKING:
    from clipgen.vqgan import VQGAN


@dataclass(frozen=True)
class Tokenization:
    """An image, its codes and its reconstruction.

    Args:
        original: central square of the image at the size of the model.
        codes: a cell per code, with its number.
        reconstruction: the image that is decoded from the codes.
        psnr: peak signal-to-noise ratio of the reconstruction in dB.
        num_codes: number of codes of the image.
        num_different: number of different codes among them.
        codebook_size: number of codes of the model.
    """

    original: Image.Image
    codes: Image.Image
    reconstruction: Image.Image
    psnr: float
    num_codes: int
    num_different: int
    codebook_size: int

    @property
    def summary(self) -> str:
        """The numbers in one sentence."""
        return (
            f"PSNR {self.psnr:.2f} dB; {self.num_codes} codes, {self.num_different} of them different, of a codebook "
            f"of {self.codebook_size}."
        )


@torch.no_grad()
def tokenize(vqgan: VQGAN, image: Image.Image, image_size: int) -> Tokenization:
    """Encode the central square of an image and decode it again.

    Args:
        vqgan: the tokenizer.
        image: an image of any size.
        image_size: size that the model was trained for.
    """
    images = from_pil(image, image_size).to(vqgan.device)
    indices = vqgan.encode(images)
    # Measured as an image file stores it, as in training.
    reconstruction = rounded(vqgan.decode(indices))
    return Tokenization(
        original=to_pil(images)[0],
        codes=code_grid(indices[0], vqgan.codebook),
        reconstruction=to_pil(reconstruction)[0],
        psnr=float(psnr(images, reconstruction)[0]),
        num_codes=indices.numel(),
        num_different=indices.unique().numel(),
        codebook_size=vqgan.codebook_size,
    )
