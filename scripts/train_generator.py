"""Train a small generator on the shapes data, for the baselines that need a class-conditional GAN.

    python -m clipgen train_generator --output generator/G_ema.pth
    clipgen-baseline biggan-clip --generator biggan:generator/G_ema.pth --clip shapes --prompt "..."

The network is BigGAN's (arXiv:1809.11096, Appendix B) with 32 x 32 pixels, and its classes are the 288 sentences. It is
trained without a discriminator, which would take much longer: its noise decides where a shape lies and how large it is,
so that each noise and class determine one image. The file has the layout of ajbrock's BigGAN-PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.baselines.biggan import NORM_EPS, BigGAN
from clipgen.data.shapes import ALL_ATTRIBUTES, BACKGROUNDS, COLORS, RADII, SHAPES, SHIFTS, ShapesDataset
from clipgen.evaluation.shapes_evaluator import accuracy
from clipgen.images import save_png, to_pil
from clipgen.nonfinite import check_loss
from clipgen.storage.files import atomic_write, user_path, write_json
from clipgen.visualization import grid

PIECE = 16  # noise per layer
CLASS_DIM = 32
CHANNELS = (64, 48, 24, 12)  # after the first layer and each block: 4, 8, 16, 32 pixels
NOISE_DIM = PIECE * len(CHANNELS)
LEARNING_RATE = 3e-3
EMA_DECAY = 0.99
WORDS = (*RADII, *COLORS, *SHAPES, *BACKGROUNDS)
PUBLISHED_NAMES = (
    (r"^classes\.", "shared."),
    (r"^first\.", "linear."),
    (r"^norm\.weight$", "output_layer.0.gain"),
    (r"^norm\.", "output_layer.0."),
    (r"^to_rgb\.", "output_layer.2."),
    (r"^blocks\.(\d+)\.", r"blocks.\1.0."),
    (r"\.norm(\d)\.", r".bn\1."),
    (r"\.shortcut\.", ".conv_sc."),
    (r"\.(mean|var)$", r".stored_\1"),
)


def render(noise: Tensor, classes: Tensor) -> Tensor:
    """Render the images of noise (B, noise_dim) and classes (B,): three numbers are the position and the radius."""
    attributes = [ALL_ATTRIBUTES[i] for i in classes.tolist()]
    data = ShapesDataset(len(noise), attributes=attributes)
    uniform = torch.special.ndtr(noise[:, :3])
    data.centers = SHIFTS[0] + (SHIFTS[-1] - SHIFTS[0]) * uniform[:, :2]
    smallest, largest = torch.tensor([RADII[a.size] for a in attributes]).T
    data.radii = smallest + (largest - smallest) * uniform[:, 2]
    return data.render(range(len(noise)))


class ClassTable(nn.Module):
    """Class embeddings that are sums of word embeddings, so that a class learns from the images of all others.

    Their mean is 0, so that equal weights of all classes, with which BigGAN-CLIP starts, add up to nothing.
    """

    words: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", one_hot_words(), persistent=False)
        self.weight = nn.Parameter(torch.randn(len(WORDS), CLASS_DIM) / 2)

    def forward(self) -> Tensor:
        """Return the embeddings of all classes, (classes, CLASS_DIM)."""
        embeddings = self.words @ self.weight
        return embeddings - embeddings.mean(dim=0)


def one_hot_words() -> Tensor:
    """Return the words of each class, (classes, words)."""
    table = torch.zeros(len(ALL_ATTRIBUTES), len(WORDS))
    for row, attributes in zip(table, ALL_ATTRIBUTES):
        for word in (attributes.size, attributes.color, attributes.shape, attributes.background):
            row[WORDS.index(word)] = 1
    return table


class Training:
    """A generator, its average, and the optimizer.

    Args:
        seed: seed of weights and data.
        steps: number of steps, after which the learning rate is 0.
    """

    def __init__(self, seed: int, steps: int):
        torch.manual_seed(seed)
        self.generator = BigGAN(NOISE_DIM, len(ALL_ATTRIBUTES), CLASS_DIM, CHANNELS, [])
        for module in self.generator.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(module.weight)
        self.table = ClassTable()
        # The embeddings of the classes are those of the table, and not trained by themselves.
        self.generator.classes.weight.requires_grad_(False).copy_(self.table().detach())
        parameters = [p for p in self.generator.parameters() if p.requires_grad] + list(self.table.parameters())
        self.optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()

    def step(self, batch_size: int) -> float:
        """Take one step with the mean absolute error as the loss, and return it."""
        classes = torch.randint(len(ALL_ATTRIBUTES), (batch_size,))
        noise = torch.randn(batch_size, NOISE_DIM)
        layers = len(CHANNELS)
        embeddings = self.table()[classes][:, None].expand(-1, layers, -1)
        images = self.generator.render(noise.view(batch_size, layers, PIECE), embeddings)
        loss = F.l1_loss(images, render(noise, classes))
        check_loss(loss.item(), self.schedule.last_epoch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.update_average()
        return loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the average of the weights and of the statistics."""
        self.generator.classes.weight.copy_(self.table())
        for mean, value in zip(self.average.state_dict().values(), self.generator.state_dict().values()):
            mean.lerp_(value, 1 - EMA_DECAY)


def save(generator: BigGAN, path: Path) -> None:
    """Write the weights in ajbrock's layout, and the epsilon of its norms next to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        torch.save({published_name(name): tensor for name, tensor in generator.state_dict().items()}, partial)
    write_json(path.with_name("config.json"), {"BN_eps": NORM_EPS})


def published_name(name: str) -> str:
    """Return the name of a tensor in ajbrock's layout, which ``clipgen/baselines/biggan.py`` reads."""
    for pattern, replacement in PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def report(generator: BigGAN, step: int, loss: float, picture: Path) -> None:
    """Print the loss and how many of 288 images show what their sentence says, and write a sixth of them."""
    noise = torch.randn(len(ALL_ATTRIBUTES), NOISE_DIM, generator=torch.Generator().manual_seed(0))
    images = generator(noise, torch.arange(len(ALL_ATTRIBUTES)))
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in accuracy(images, ALL_ATTRIBUTES).items())
    print(f"step {step}, loss {loss:.4f}, correct: {rates}", flush=True)
    # Steps of 5 through the classes show all backgrounds.
    save_png(grid(to_pil(images[::5]), columns=12), picture)


def main() -> None:
    """Train, and write the averaged generator with every report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=user_path, required=True, help="file of the weights")
    parser.add_argument("--steps", type=int, default=1200, help="steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=100, help="steps between reports (default: %(default)s)")
    args = parser.parse_args()
    training = Training(args.seed, args.steps)
    for step in range(1, args.steps + 1):
        loss = training.step(args.batch_size)
        if step % args.report_every == 0 or step == args.steps:
            save(training.average, args.output)
            report(training.average, step, loss, args.output.with_name("samples.png"))


if __name__ == "__main__":
    main()
