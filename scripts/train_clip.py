"""Train a small open_clip model on labeled shards, in place of a pretrained CLIP if none is available.

    python -m clipgen train_clip --data data/cifar10 --output runs/cifar10-clip

The labels become captions ("a photo of a cat"); the text-to-image model that is trained later does not see them. The
folder has open_clip's layout ("local-dir:") plus vocabulary.json. Use it as ``clip.model_name=runs/cifar10-clip``.
The same command resumes an interrupted training; the remaining steps see the images in another order.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from train_classifier import shard_sizes

from clipgen.clip import VOCABULARY_FILE, FrozenCLIP, WordTokenizer
from clipgen.data.webdataset import ImageShards
from clipgen.evaluation.classifier import shifted
from clipgen.nonfinite import check_loss, check_weights
from clipgen.storage.atomic_folder import replace_folder
from clipgen.storage.files import atomic_write, user_path, write_json
from clipgen.storage.output_folder import output_folder

WEIGHTS = "open_clip_model.safetensors"
FILES = ("open_clip_config.json", VOCABULARY_FILE, WEIGHTS)
CONTEXT_LENGTH = 16
MAX_LOGIT_SCALE = 4.6052  # CLIP's bound: a temperature of at least 0.01
CHECKPOINT_EVERY = 200  # steps
CIFAR_CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32, "patch_size": None},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 128, "heads": 4, "layers": 2},
}


def write_config(
    folder: Path,
    model_cfg: dict[str, Any],
    captions: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write open_clip_config.json and vocabulary.json.

    Args:
        folder: folder of the model.
        model_cfg: architecture in open_clip's layout.
        captions: texts whose words the model knows.
        mean: mean of the pixels, for normalization.
        std: standard deviation of the pixels.
    """
    words = sorted({word for caption in captions for word in caption.lower().split()})
    # The tokenizer adds three special tokens.
    text_cfg = {**model_cfg["text_cfg"], "vocab_size": len(words) + 3}
    config = {
        "model_cfg": {**model_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": {"mean": list(mean), "std": list(std)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "open_clip_config.json", config)
    (folder / VOCABULARY_FILE).write_text(json.dumps(words) + "\n")


def contrastive_loss(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return the InfoNCE loss in both directions (Eq. 2 of CLIP-GEN) of images (B, E) and all captions (C, E).

    Captions without an image in the batch are negatives of every image; all images of a caption are its positives.

    Args:
        image: image embeddings, (B, E).
        text: caption embeddings, (C, E).
        labels: caption of each image, (B,).
        scale: inverse temperature.
    """
    logits = scale * image @ text.T  # (B, C)
    positive = F.one_hot(labels, len(text)).T.float()  # (C, B)
    present = positive.sum(1) > 0
    text_to_image = (logits.T.log_softmax(dim=1) * positive).sum(1)[present] / positive.sum(1)[present]
    return (F.cross_entropy(logits, labels) - text_to_image.mean()) / 2


def train(
    folder: Path,
    captions: Sequence[str],
    batches_from: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    steps: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    data: str,
) -> nn.Module:
    """Train the CLIP of a folder and write its weights there, in fp16.

    Args:
        folder: folder with the files of ``write_config``.
        captions: all captions.
        batches_from: returns endless batches of (images in [-1, 1], caption indices), from a step on.
        steps: number of steps.
        learning_rate: peak learning rate.
        seed: seed of the initialization.
        checkpoint: file that an interrupted training is resumed from.
        data: description of the batches, which a resumed run must share.
    """
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).train()
    tokens = WordTokenizer(json.loads((folder / VOCABULARY_FILE).read_text()), CONTEXT_LENGTH)(captions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = one_cycle(optimizer, learning_rate, steps, warmup=0.1)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    settings = {
        "captions": list(captions),
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        "data": data,
    }
    done = load_checkpoint(checkpoint, settings, parts) if checkpoint.is_file() else 0
    start = time.time()
    for step, (images, labels) in zip(range(done + 1, steps + 1), batches_from(done)):
        loss = loss_of(model, images, tokens, labels)
        check_loss(loss.item(), step)
        take_step(model, loss, optimizer)
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)
        if step % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, step, settings, parts)
    save(model, folder)
    checkpoint.unlink(missing_ok=True)
    return model


@contextmanager
def claim_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces the model in ``output`` at the end; no other process may write there.

    Raises:
        FileExistsError: another process writes to ``output`` or to its checkpoint.
    """
    with output_folder(output), replace_folder(output, FILES) as folder:
        yield folder


def loss_of(model: Any, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the contrastive loss of a batch of images and the tokens of all captions."""
    image = model.encode_image(preprocess(model, images), normalize=True)
    return contrastive_loss(image, model.encode_text(tokens, normalize=True), labels, model.logit_scale.exp())


def take_step(model: Any, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer step with clipped gradients; the temperature stays in CLIP's bound."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)


def checkpoint_of(folder: Path) -> Path:
    """Return the path of a model's training checkpoint, which lies next to the folder of the model."""
    return folder.with_name(f"{folder.name}.checkpoint.pt")


def save_checkpoint(path: Path, step: int, settings: dict[str, Any], parts: dict[str, Any]) -> None:
    """Write the state of a training run after a step."""
    states = {name: part.state_dict() for name, part in parts.items()}
    with atomic_write(path) as partial:
        torch.save({"step": step, "settings": settings, "rng": torch.get_rng_state(), **states}, partial)


def load_checkpoint(path: Path, settings: dict[str, Any], parts: dict[str, Any]) -> int:
    """Restore the state of a training run; return its step.

    Raises:
        ValueError: the checkpoint has other settings.
    """
    saved = torch.load(path, weights_only=True)
    if saved["settings"] != settings:
        raise ValueError(f"{path} must be of the same settings: delete it, or use another --output")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    return saved["step"]


def preprocess(model: Any, images: Tensor) -> Tensor:
    """Resize and normalize images (B, 3, H, W) in [-1, 1] for a model."""
    size = open_clip.transformer.to_2tuple(model.visual.image_size)[0]
    pixels = F.interpolate((images + 1) / 2, size, mode="bicubic", antialias=True)
    mean = torch.tensor(model.visual.image_mean).view(3, 1, 1)
    std = torch.tensor(model.visual.image_std).view(3, 1, 1)
    return (pixels - mean) / std


def one_cycle(optimizer: torch.optim.Optimizer, learning_rate: float, steps: int, warmup: float) -> Any:
    """Return torch's one-cycle schedule over at least four steps, two of them warm-up.

    With fewer steps torch divides by zero.

    Args:
        optimizer: the optimizer.
        learning_rate: peak learning rate.
        steps: number of steps.
        warmup: fraction of the steps with a rising learning rate.
    """
    steps = max(steps, 4)
    pct_start = max(warmup, 2 / steps)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=pct_start)


def save(model: nn.Module, folder: Path) -> None:
    """Write the weights in fp16.

    Raises:
        NonFiniteError: a weight is not finite in fp16.
    """
    model = copy.deepcopy(model).half()
    check_weights(model)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as partial:
        partial.write_bytes(to_safetensors(state))


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError if a label of the shards has no name in classes.json."""
    if len(labels) and labels.max() >= num_classes:
        raise ValueError(f"classes.json must name every class, got {num_classes} names and the label {labels.max()}")


def augmented(images: Tensor, shift: int = 4) -> Tensor:
    """Shift each image by up to ``shift`` pixels in both directions; the border is mirrored."""
    return shifted(images, torch.randint(2 * shift + 1, (len(images), 2)) - shift)


def labeled_batches(urls: str, image_size: int, batch_size: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield endless augmented batches of (images, labels) from shards."""
    dataset = ImageShards(urls, image_size, train=True, shuffle=5000, labels=True, seed=seed)
    for batch in torch.utils.data.DataLoader(dataset, batch_size=batch_size):
        yield augmented(batch["images"]), batch["label"]


@torch.no_grad()
def caption_accuracy(folder: Path, captions: Sequence[str], urls: str, image_size: int) -> float:
    """Return the fraction of the images whose own caption is the nearest of all captions.

    This is not a zero-shot accuracy: the model was trained on these captions.
    """
    clip = FrozenCLIP(str(folder))
    text = clip.encode_text(captions)
    dataset = ImageShards(urls, image_size, train=False, labels=True)
    correct = []
    for batch in torch.utils.data.DataLoader(dataset, batch_size=250):
        nearest = (clip.encode_image(batch["images"]) @ text.T).argmax(dim=1)
        correct.append(nearest == batch["label"])
    return torch.cat(correct).double().mean().item()


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, required=True, help="folder of train-*.tar, val-*.tar, classes.json")
    parser.add_argument("--output", type=user_path, required=True, help="folder of the model")
    parser.add_argument("--shards", default="train-*.tar", help="shards to train on (default: %(default)s)")
    parser.add_argument("--template", default="a photo of a {label}", help="caption of a class (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="size of the shards' images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=96, help="images per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialization and data (default: %(default)s)")
    return parser


def main() -> None:
    """Write the configuration, train, and print the accuracy."""
    args = make_parser().parse_args()
    if args.steps < 1:
        make_parser().error(f"--steps must be at least 1, got {args.steps}")
    classes = args.data / "classes.json"
    if not classes.is_file():
        sys.exit(
            f"python -m clipgen train_clip: error: no {classes}; python -m clipgen make_shards writes it for labeled "
            "data"
        )
    if "{label}" not in args.template:
        make_parser().error(f"--template must contain {{label}}, the place of the class, got {args.template!r}")
    captions = [args.template.replace("{label}", label) for label in json.loads(classes.read_text())]
    shards = str(args.data / args.shards)
    data = f"{args.batch_size} images of {args.image_size} pixels from {args.shards} {shard_sizes(args.data)}"

    def batches_from(step: int) -> Iterable[tuple[Tensor, Tensor]]:
        for images, labels in labeled_batches(shards, args.image_size, args.batch_size, args.seed + step):
            check_labels(labels, len(captions))
            yield images, labels

    with claim_folder(args.output) as folder:
        write_config(folder, CIFAR_CLIP, captions, mean=(0.5,) * 3, std=(0.25,) * 3)
        checkpoint = checkpoint_of(args.output)
        train(folder, captions, batches_from, args.steps, args.learning_rate, args.seed, checkpoint, data)
    accuracy = caption_accuracy(args.output, captions, str(args.data / "val-*.tar"), args.image_size)
    print(f"validation images whose own caption is the nearest: {accuracy:.4f}")


if __name__ == "__main__":
    main()
