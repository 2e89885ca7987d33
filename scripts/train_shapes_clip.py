"""Train the tiny CLIP that is bundled as "shapes", and measure its zero-shot accuracy on new renders.

    python -m clipgen train_shapes_clip

Every batch contains each of the 288 captions once, so no two pairs of a batch are false negatives of each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from train_clip import CONTEXT_LENGTH, train, write_config

from clipgen.clip import BUNDLED_CLIPS, FrozenCLIP
from clipgen.data.shapes import ALL_ATTRIBUTES, ShapesDataset

SHAPES_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 2},
}
CAPTIONS = [str(attributes) for attributes in ALL_ATTRIBUTES]


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: one new render per caption, with a little noise on the pixels, and the labels."""
    labels = torch.arange(len(ALL_ATTRIBUTES))
    while True:
        seed += 1
        images = ShapesDataset(len(labels), seed=seed, attributes=ALL_ATTRIBUTES).render(labels.tolist())
        yield images + 0.02 * torch.randn(images.shape), labels


@torch.no_grad()
def zero_shot_accuracy(folder: Path, images: int, seed: int) -> tuple[float, float]:
    """Return the fraction of new renders whose nearest caption is their own, and the mean cosine of matched pairs."""
    clip = FrozenCLIP(str(folder))
    data = ShapesDataset(images, seed=seed)
    similarity = clip.encode_image(data.render(range(images))) @ clip.encode_text(CAPTIONS).T
    labels = torch.tensor([ALL_ATTRIBUTES.index(a) for a in data.attributes])
    matched = similarity.gather(1, labels[:, None]).mean()
    return (similarity.argmax(1) == labels).float().mean().item(), matched.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BUNDLED_CLIPS["shapes"])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_config(args.output, SHAPES_CLIP, CAPTIONS, (0.5,) * 3, (0.5,) * 3)
    train(args.output, CAPTIONS, batches(args.seed * 1_000_000), args.steps, args.learning_rate, args.seed)
    score, matched = zero_shot_accuracy(args.output, images=2000, seed=12_345)
    print(f"zero-shot accuracy, all attributes, 2000 new renders: {score:.4f}  matched cosine: {matched:.3f}")


if __name__ == "__main__":
    main()
