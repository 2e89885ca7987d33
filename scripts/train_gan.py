"""Train a small BigGAN on the shapes data, for the baselines that need a class-conditional GAN.

    python -m clipgen train_gan --output gan/G_ema.pth
    clipgen-baseline biggan-clip --generator biggan:gan/G_ema.pth --clip shapes --prompt "..."

The generator is BigGAN's (arXiv:1809.11096, Appendix B) with 32 x 32 pixels; the classes are the 288 sentences. The
file has the layout of ajbrock's BigGAN-PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from clipgen.baselines.biggan import NORM_EPS, BigGAN
from clipgen.data.shapes import ALL_ATTRIBUTES, BACKGROUNDS, CLASS_INDEX, COLORS, RADII, SHAPES, ShapesDataset
from clipgen.evaluation.shapes_evaluator import accuracy
from clipgen.files import atomic_write, write_json
from clipgen.images import save_png, to_pil
from clipgen.visualization import grid

PIECE = 16  # noise per layer
CLASS_DIM = 32
CHANNELS = (64, 64, 32, 16)  # of the first map and after each block: 4, 8, 16, 32 pixels
LEARNING_RATE = 1e-3
EMA_DECAY = 0.99
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
WORDS = (*RADII, *COLORS, *SHAPES, *BACKGROUNDS)


def one_hot_words() -> Tensor:
    """Return which words each class consists of, (classes, words)."""
    table = torch.zeros(len(ALL_ATTRIBUTES), len(WORDS))
    for row, attributes in zip(table, ALL_ATTRIBUTES):
        for word in (attributes.size, attributes.color, attributes.shape, attributes.background):
            row[WORDS.index(word)] = 1
    return table


class ClassTable(nn.Module):
    """Class embeddings that are sums of word embeddings, so that a class learns from the images of all others.

    Args:
        width: width of the embedding.
    """

    words: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("words", one_hot_words(), persistent=False)
        self.weight = nn.Parameter(torch.randn(len(WORDS), width) / 2)

    def forward(self) -> Tensor:
        """Return the embeddings of all classes, (classes, D)."""
        return self.words @ self.weight


class Discriminator(nn.Module):
    """Projection discriminator (Miyato and Koyama 2018, arXiv:1802.05637) for 32 x 32 pixels, spectrally normalized.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for a, b in pairwise(channels):
            layers += [spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers, spectral_norm(nn.Conv2d(4 * width, 4 * width, 4)), nn.LeakyReLU(0.2))
        self.realism = spectral_norm(nn.Linear(4 * width, 1))
        self.classes = ClassTable(4 * width)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """(B, 3, 32, 32), (B,) -> (B,)."""
        features = self.features(images).flatten(1)
        table = F.normalize(self.classes(), dim=1) * 4
        return self.realism(features)[:, 0] + (features * table[classes]).sum(dim=1)


class Training:
    """Generator, discriminator and their optimizers.

    Args:
        seed: seed of weights and noise.
    """

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        layers = len(CHANNELS)
        self.generator = BigGAN(PIECE * layers, len(ALL_ATTRIBUTES), CLASS_DIM, CHANNELS, [])
        for module in self.generator.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(module.weight)
        self.table = ClassTable(CLASS_DIM)
        self.discriminator = Discriminator()
        generator_parameters = [*self.generator.parameters(), *self.table.parameters()]
        options = {"lr": LEARNING_RATE, "betas": (0.0, 0.99)}
        self.generator_optimizer = torch.optim.Adam(generator_parameters, **options)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), **options)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()

    def sample(self, classes: Tensor) -> Tensor:
        """Generate images of classes with the generator in training."""
        noise = torch.randn(len(classes), len(CHANNELS), PIECE)
        return self.generator.render(noise, self.table()[classes][:, None].expand(-1, len(CHANNELS), -1))

    def step(self, images: Tensor, classes: Tensor) -> tuple[float, float]:
        """Make one step of both networks with the hinge loss, and return the losses."""
        fake = self.sample(classes)
        scores = self.discriminator(torch.cat([images, fake.detach()]), classes.repeat(2))
        real_score, fake_score = scores.chunk(2)
        discriminator_loss = (1 - real_score).relu().mean() + (1 + fake_score).relu().mean()
        update(self.discriminator_optimizer, discriminator_loss)
        generator_loss = -self.discriminator(fake, classes).mean()
        update(self.generator_optimizer, generator_loss)
        self.update_average()
        return discriminator_loss.item(), generator_loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the average of the weights and of the statistics."""
        self.generator.classes.weight.copy_(self.table())
        for mean, value in zip(self.average.state_dict().values(), self.generator.state_dict().values()):
            mean.lerp_(value, 1 - EMA_DECAY)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one step of an optimizer."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of new renders and their classes without end."""
    while True:
        seed += 1
        data = ShapesDataset(size, seed=seed)
        yield data.render(range(size)), torch.tensor([CLASS_INDEX[attributes] for attributes in data.attributes])


@torch.no_grad()
def images_of_all_classes(generator: BigGAN, seed: int = 0) -> Tensor:
    """Return one image of each class."""
    noise = torch.randn(len(ALL_ATTRIBUTES), generator.noise_dim, generator=torch.Generator().manual_seed(seed))
    return generator(noise, torch.arange(len(ALL_ATTRIBUTES)))


def save(generator: BigGAN, path: Path) -> None:
    """Write the weights in ajbrock's layout, and its epsilon beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        torch.save({published_name(name): tensor for name, tensor in generator.state_dict().items()}, partial)
    write_json(path.with_name("config.json"), {"BN_eps": NORM_EPS})


def published_name(name: str) -> str:
    """Return the name of a tensor in ajbrock's layout, which ``clipgen/baselines/biggan.py`` reads."""
    for pattern, replacement in PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def report(generator: BigGAN, step: int, losses: tuple[float, float], picture: Path) -> None:
    """Print losses and how many of 288 images show all that their sentence says, and write a sixth of them."""
    images = images_of_all_classes(generator)
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in accuracy(images, ALL_ATTRIBUTES).items())
    print(f"step {step}, discriminator {losses[0]:.3f}, generator {losses[1]:.3f}, correct: {rates}", flush=True)
    # Steps of 5 through the classes show all backgrounds
    save_png(grid(to_pil(images[::5]), columns=12), picture)


def main() -> None:
    """Train, and write the averaged generator after every report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of the weights")
    parser.add_argument("--steps", type=int, default=3000, help="steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=100, help="steps between reports (default: %(default)s)")
    args = parser.parse_args()
    training = Training(args.seed)
    data = batches(args.batch_size, args.seed * 1_000_000)
    for step, (images, classes) in zip(range(1, args.steps + 1), data):
        losses = training.step(images, classes)
        if step % args.report_every == 0 or step == args.steps:
            save(training.average, args.output)
            report(training.average, step, losses, args.output.with_name("samples.png"))


if __name__ == "__main__":
    main()
