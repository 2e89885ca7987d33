"""Train a small open_clip model on labelled shards, as a stand-in for a pretrained CLIP where none can be had.

    python scripts/train_clip.py --data data/cifar10 --output runs/cifar10-clip

The labels become sentences ("a photo of a cat"); the generator trained later never sees them. The folder that is
written is open_clip's own ("local-dir:"), plus vocabulary.json, and is used as ``clip.model_name=runs/cifar10-clip``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clipgen.clip import VOCABULARY_FILE, FrozenCLIP, WordTokenizer
from clipgen.data.webdataset import ImageShards
from clipgen.files import atomic_write, write_json

CONTEXT_LENGTH = 16
CIFAR_CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32, "patch_size": None},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 128, "heads": 4, "layers": 2},
}


def write_config(
    folder: Path, model_cfg: dict, captions: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Write open_clip_config.json and vocabulary.json for a model that knows the captions' words."""
    words = sorted({word for caption in captions for word in caption.lower().split()})
    text_cfg = {**model_cfg["text_cfg"], "vocab_size": len(words) + 3}
    config = {
        "model_cfg": {**model_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": {"mean": list(mean), "std": list(std)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "open_clip_config.json", config)
    (folder / VOCABULARY_FILE).write_text(json.dumps(words) + "\n")


def contrastive_loss(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE both ways (Eq. 2 of CLIP-GEN) between images (B, E) and all captions (C, E); labels (B,) pair them.

    Captions that have no image in the batch are negatives of every image; several images of one caption are all
    its positives.
    """
    logits = scale * image @ text.T  # (B, C)
    positive = F.one_hot(labels, len(text)).T.float()  # (C, B)
    present = positive.sum(1) > 0
    to_image = (logits.T.log_softmax(dim=1) * positive).sum(1)[present] / positive.sum(1)[present]
    return (F.cross_entropy(logits, labels) - to_image.mean()) / 2


def train(
    folder: Path,
    captions: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    seed: int,
) -> nn.Module:
    """Train the CLIP of ``folder`` on ``steps`` batches of (images in [-1, 1], caption index); weights in fp16."""
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).train()
    tokens = WordTokenizer(json.loads((folder / VOCABULARY_FILE).read_text()), CONTEXT_LENGTH)(captions)
    mean, std = (torch.tensor(getattr(model.visual, f"image_{k}")).view(3, 1, 1) for k in ("mean", "std"))
    size = open_clip.transformer.to_2tuple(model.visual.image_size)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step, (images, labels) in zip(range(1, steps + 1), batches):
        pixels = F.interpolate((images + 1) / 2, size, mode="bicubic", antialias=True)
        image = model.encode_image((pixels - mean) / std, normalize=True)
        loss = contrastive_loss(image, model.encode_text(tokens, normalize=True), labels, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=4.6052)  # CLIP's own bound: a temperature of at least 0.01
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
    save(model, folder)
    return model


def save(model: nn.Module, folder: Path) -> None:
    """Write the weights in half precision."""
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with atomic_write(folder / "open_clip_model.safetensors") as partial:
        save_file(state, partial)


def augmented(images: Tensor, shift: int = 4) -> Tensor:
    """Move each image by up to ``shift`` pixels, its border mirrored."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [shift] * 4, mode="reflect")
    corners = torch.randint(2 * shift + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners)])


def labelled_batches(urls: str, image_size: int, batch_size: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Endless augmented batches of (images, labels) from shards."""
    data = ImageShards(urls, image_size, train=True, shuffle=5000, labels=True, seed=seed)
    for batch in torch.utils.data.DataLoader(data, batch_size=batch_size):
        yield augmented(batch["images"]), batch["label"]


@torch.no_grad()
def zero_shot_accuracy(folder: Path, captions: Sequence[str], urls: str, image_size: int) -> float:
    """Part of the validation images whose own caption is the nearest."""
    clip = FrozenCLIP(str(folder))
    text, right, total = clip.encode_text(captions), 0, 0
    data = ImageShards(urls, image_size, train=False, labels=True)
    for batch in torch.utils.data.DataLoader(data, batch_size=250):
        right += int(((clip.encode_image(batch["images"]) @ text.T).argmax(1) == batch["label"]).sum())
        total += len(batch["label"])
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train-*.tar, val-*.tar, classes.json")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--template", default="a photo of a {label}")
    parser.add_argument("--image-size", type=int, default=32, help="pixels of the shards' images")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    classes = args.data / "classes.json"
    if not classes.is_file():
        sys.exit(f"train_clip.py: error: no {classes}; scripts/make_shards.py writes it for labelled data")
    captions = [args.template.format(label=label) for label in json.loads(classes.read_text())]
    write_config(args.output, CIFAR_CLIP, captions, (0.5,) * 3, (0.25,) * 3)
    batches = labelled_batches(str(args.data / "train-*.tar"), args.image_size, args.batch_size, args.seed)
    train(args.output, captions, batches, args.steps, args.learning_rate, args.seed)
    score = zero_shot_accuracy(args.output, captions, str(args.data / "val-*.tar"), args.image_size)
    print(f"zero-shot accuracy on the validation shards: {score:.4f}")


if __name__ == "__main__":
    main()
