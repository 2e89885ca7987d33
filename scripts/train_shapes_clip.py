"""Train the tiny CLIP that is bundled as "shapes", and measure how often it matches new renders to their captions.

    python -m clipgen train_shapes_clip
    python -m clipgen train_shapes_clip --output runs/second-clip --seed 1       # scores images independently
    python -m clipgen train_shapes_clip --output runs/clip --held-out 0.1        # has not seen some combinations either

Every batch contains each caption once, so no two pairs of a batch are false negatives of each other. --held-out leaves
out the same pairs of a shape and a color as data.held_out of the training runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from train_clip import CONTEXT_LENGTH, checkpoint_of, claim_folder, train, write_config

from clipgen.bundled import BUNDLED
from clipgen.clip import FrozenCLIP
from clipgen.data.shapes import ALL_ATTRIBUTES, Attributes, ShapesDataset, held_out_attributes
from clipgen.storage.files import user_path

SHAPES_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 2},
}
CAPTIONS = [str(attributes) for attributes in ALL_ATTRIBUTES]


def seen_attributes(held_out: float) -> list[Attributes]:
    """Return the attributes without those of the held-out pairs."""
    hidden = set(held_out_attributes(held_out))
    return [attributes for attributes in ALL_ATTRIBUTES if attributes not in hidden]


def batches(attributes: Sequence[Attributes], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: one new render per caption, with a little noise on the pixels, and the labels."""
    labels = torch.arange(len(attributes))
    while True:
        seed += 1
        images = ShapesDataset(len(labels), seed=seed, attributes=attributes).render(labels.tolist())
        yield images + 0.02 * torch.randn(images.shape), labels


@torch.no_grad()
def caption_accuracy(
    folder: Path, images: int, seed: int, attributes: Sequence[Attributes] = ALL_ATTRIBUTES
) -> tuple[float, float]:
    """Return the fraction of new renders whose nearest caption is their own, and the mean cosine of matched pairs.

    This is not a zero-shot accuracy where the model was trained on these captions.
    """
    clip = FrozenCLIP(str(folder))
    data = ShapesDataset(images, seed=seed, attributes=attributes)
    similarity = clip.encode_image(data.render(range(images))) @ clip.encode_text(CAPTIONS).T
    labels = torch.tensor([ALL_ATTRIBUTES.index(a) for a in data.attributes])
    matched = similarity.gather(1, labels[:, None]).mean()
    return (similarity.argmax(1) == labels).float().mean().item(), matched.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=user_path, default=BUNDLED["shapes"] / "clip")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=float, default=0.0, help="fraction of the shape-color pairs left out")
    args = parser.parse_args()
    seen = seen_attributes(args.held_out)
    captions = [str(attributes) for attributes in seen]
    # The vocabulary is that of all captions, so that models of any --held-out can encode them.
    first_seed = args.seed * 1_000_000

    def batches_from(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(seen, first_seed + step)

    with claim_folder(args.output) as folder:
        write_config(folder, SHAPES_CLIP, CAPTIONS, (0.5,) * 3, (0.5,) * 3)
        data = f"renders, held out: {args.held_out}"
        checkpoint = checkpoint_of(args.output)
        train(folder, captions, batches_from, args.steps, args.learning_rate, args.seed, checkpoint, data)
    score, matched = caption_accuracy(args.output, images=2000, seed=12_345)
    print(f"renders whose own caption is the nearest, of 2000: {score:.4f}  matched cosine: {matched:.3f}")
    if args.held_out > 0:
        held_out = held_out_attributes(args.held_out)
        score, matched = caption_accuracy(args.output, images=2000, seed=54_321, attributes=held_out)
        print(f"the same of held-out combinations: {score:.4f}  matched cosine: {matched:.3f}")


if __name__ == "__main__":
    main()
