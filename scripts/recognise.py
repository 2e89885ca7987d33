"""How often an independent classifier recognises the class that a picture was asked to show.

    python -m clipgen recognise --data data/cifar10 --checkpoint outputs/transformer/... --output runs/recognise

The classifier is trained on the real images of the shards alone, once: it is kept in --classifier, and refused for
other steps or data. Then pictures of every class are drawn from the sentence "a photo of a {label}", by the same
sampling as clipgen-sample.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_clip import labelled_batches, one_cycle

from clipgen import TextToImage
from clipgen.data.webdataset import ImageShards
from clipgen.evaluation.sources import drawing
from clipgen.files import atomic_write, write_json
from clipgen.images import save_png, to_pil
from clipgen.visualization import grid


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def convolution(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def classifier(classes: int) -> nn.Sequential:
    """A small residual network for small images (after David Page's cifar10-fast, thinned for a CPU)."""
    return nn.Sequential(
        convolution(3, 32),
        nn.MaxPool2d(2),
        convolution(32, 64),
        convolution(64, 64),
        nn.MaxPool2d(2),
        convolution(64, 128),
        Residual(convolution(128, 128), convolution(128, 128)),
        nn.MaxPool2d(2),
        convolution(128, 256),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def train(net: nn.Module, data: Path, image_size: int, steps: int, batch_size: int = 128) -> None:
    """Train on real images."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = one_cycle(optimizer, 0.2, steps, warmup=0.2)
    batches = labelled_batches(str(data / "train-*.tar"), image_size, batch_size, seed=1)
    for step, (images, labels) in zip(range(1, steps + 1), batches):
        loss = F.cross_entropy(net(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 200 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def real_accuracy(net: nn.Module, data: Path, image_size: int) -> float:
    """Accuracy on the validation shards: what the classifier is worth."""
    batches = torch.utils.data.DataLoader(ImageShards(str(data / "val-*.tar"), image_size, False, labels=True), 250)
    hits = torch.cat([net(batch["images"]).argmax(1) == batch["label"] for batch in batches])
    return hits.float().mean().item()


def load_or_train(path: Path, data: Path, classes: int, image_size: int, steps: int) -> nn.Module:
    """Return the classifier in evaluation mode: the one in the file if it was trained in the same way, else a new one.

    Raises:
        ValueError: the file holds a classifier of other steps, data or size, or does not say of which.
    """
    torch.manual_seed(1)
    net = classifier(classes)
    wanted = {"steps": steps, "image_size": image_size, "classes": classes, "data": data_files(data)}
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        made = saved.get("trained", {})
        if differing := [key for key in wanted if made.get(key) != wanted[key]]:
            raise ValueError(
                f"{path} must hold a classifier trained with the same {' and '.join(differing)}: delete it, or name "
                "another --classifier"
            )
        print(f"classifier: {path}, trained before ({steps} steps)")
        net.load_state_dict(saved["weights"])
    else:
        train(net, data, image_size, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            torch.save({"trained": wanted, "weights": net.state_dict()}, partial)
    return net.eval()


def data_files(data: Path) -> list[str]:
    """Return name and size of each training shard, which tell one data set from another."""
    return [f"{shard.name} {shard.stat().st_size}" for shard in sorted(data.glob("train-*.tar"))]


@torch.no_grad()
def recognised(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image (B, 3, H, W) is taken for its class (B,)."""
    return torch.cat([net(part).argmax(1) for part in images.split(250)]) == labels


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every default."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("--data", type=Path, required=True, help="folder of train-*.tar, val-*.tar, classes.json")
    p.add_argument("--checkpoint", help="stage-2 run; without it, only the classifier is trained")
    p.add_argument("--output", type=Path, default=Path("runs/recognise"), help="folder of grid.png and recognised.json")
    p.add_argument("--classifier", type=Path, default=Path("runs/classifier.pt"), help="its file: read, or written")
    p.add_argument("--steps", type=int, default=2000, help="of the classifier's training")
    p.add_argument("--image-size", type=int, default=32, help="pixels of the shards' images")
    p.add_argument("--template", default="a photo of a {label}", help="of the sentences")
    p.add_argument("--per-class", type=int, default=100, help="images drawn of each class")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rerank", type=int, default=1, help="keep the best of so many draws by CLIP; 1: no reranking")
    for name, value in (("temperature", 1.0), ("top-p", 1.0), ("guidance-scale", 1.0)):
        p.add_argument(f"--{name}", type=float, default=value)
    p.add_argument("--top-k", type=int, default=300)
    args = p.parse_args()
    if args.steps < 1:
        p.error(f"--steps must be at least 1, got {args.steps}")
    if not (args.data / "classes.json").is_file():
        sys.exit(f"recognise.py: error: no classes.json in {args.data}; scripts/make_shards.py writes it")
    names = json.loads((args.data / "classes.json").read_text())
    try:
        net = load_or_train(args.classifier, args.data, len(names), args.image_size, args.steps)
    except ValueError as error:
        sys.exit(f"recognise.py: error: {error}")
    print(f"classifier on real validation images: {real_accuracy(net, args.data, args.image_size):.4f}")
    if not args.checkpoint:
        return
    pipe = TextToImage.load(args.checkpoint)
    settings = {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "guidance_scale")}
    prompts = [args.template.format(label=name) for name in names]
    sentences = [prompt for prompt in prompts for _ in range(args.per_class)]
    images = drawing(pipe, args.rerank, **settings)(sentences, [args.seed + i for i in range(len(sentences))])
    hits = recognised(net, images, torch.arange(len(names)).repeat_interleave(args.per_class))
    result = {name: part.float().mean().item() for name, part in zip(names, hits.view(len(names), -1))}
    result |= {"all": hits.float().mean().item(), "settings": {**settings, "rerank": args.rerank, "seed": args.seed}}
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "recognised.json", result)
    first = images.view(len(names), args.per_class, *images.shape[1:])[:, :8].transpose(0, 1).flatten(0, 1)
    save_png(
        grid(to_pil(first), columns=len(names), captions=names * min(8, args.per_class), cell=96),
        args.output / "grid.png",
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
