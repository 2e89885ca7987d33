"""The embedded data set: antialiased coloured shapes, each with the sentence that describes it.

6 shapes x 8 colours x 2 sizes x 3 backgrounds = 288 sentences; the position moves by up to four pixels each way and the
radius by up to one, so no two images are alike. Everything is drawn on the fly from signed distances, and the same seed
draws the same images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipgen.data.datamodule import ImageDataModule

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (214, 39, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "orange": (245, 130, 20),
    "purple": (140, 50, 185),
    "cyan": (50, 205, 225),
    "pink": (250, 130, 200),
}
RADII = {"small": (7.5, 8.5), "large": (11.0, 12.0)}  # from, to: pixels of a 32-pixel image
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SHIFTS = (-4, 0, 4)  # pixels of a 32-pixel image, to the right and down


@dataclass(frozen=True)
class Attributes:
    """What a sentence says about an image."""

    size: str
    color: str
    shape: str
    background: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape} on a {self.background} background"


ALL_ATTRIBUTES = tuple(Attributes(*names) for names in itertools.product(RADII, COLORS, SHAPES, BACKGROUNDS))


def held_out_attributes(fraction: float) -> tuple[Attributes, ...]:
    """What ``data.held_out`` keeps from training: all sentences of some of the 48 pairs of a shape and a colour.

    The pairs follow from the fraction alone. They lie on diagonals of the shuffled table of shapes and colours, so that
    every shape and every colour is missing as seldom as can be; a larger fraction holds out those of a smaller, too.

    Raises:
        ValueError: the fraction is not in [0, 1), or so large that nothing is left.
    """
    pairs = len(SHAPES) * len(COLORS)
    if not 0 <= fraction < 1 or round(fraction * pairs) == pairs:
        raise ValueError(f"held_out must be in [0, 1) and leave one of the {pairs} pairs, got {fraction}")
    generator = torch.Generator().manual_seed(0)
    shapes, colors = (
        [list(names)[i] for i in torch.randperm(len(names), generator=generator)] for names in (SHAPES, COLORS)
    )
    diagonals = itertools.product(range(len(colors)), range(len(shapes)))
    order = [(shapes[i], colors[(i + shift) % len(colors)]) for shift, i in diagonals]
    chosen = set(order[: round(fraction * pairs)])
    return tuple(a for a in ALL_ATTRIBUTES if (a.shape, a.color) in chosen)


def parse(sentence: str) -> Attributes:
    """Read the attributes back from a sentence of the set; inverse of ``str(attributes)``.

    Raises:
        ValueError: the sentence is not one of the 288.
    """
    words = sentence.lower().rstrip(".").split()
    match words:
        case ["a", size, color, shape, "on", "a", background, "background"]:
            attributes = Attributes(size, color, shape, background)
            if attributes in ALL_ATTRIBUTES:
                return attributes
    raise ValueError(f"sentence must read like {str(ALL_ATTRIBUTES[0])!r}, got {sentence!r}")


def rgb(colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """8-bit colours -> (N, 3) in [-1, 1]."""
    return torch.tensor(colors, dtype=torch.float32) / 127.5 - 1


def polygon(corners: int, inner: float = 1.0, turn: float = 0.0) -> Tensor:
    """Vertices (N, 2) of a regular polygon in the unit circle; ``inner`` < 1 pulls every second one in (a star)."""
    steps = torch.arange(corners)
    angle = steps * (2 * math.pi / corners) + turn - math.pi / 2
    radius = torch.where(steps % 2 == 0, 1.0, inner)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def plus(width: float) -> Tensor:
    """Vertices (12, 2) of an upright cross whose arms are ``2 * width`` wide."""
    quarter = torch.tensor([[width, -1.0], [width, -width], [1.0, -width]])
    turns = [
        torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) for a in torch.arange(4) * math.pi / 2
    ]
    return torch.cat([quarter @ turn for turn in turns])


POLYGONS = {
    "square": polygon(4, turn=math.pi / 4),
    "triangle": polygon(3),
    "star": polygon(10, inner=0.42),
    "cross": plus(0.34),
}


def polygon_distance(points: Tensor, vertices: Tensor) -> Tensor:
    """Signed distance to a polygon, negative inside: (..., 2), (N, 2) -> (...). Inigo Quilez' ``sdPolygon``."""
    distance = torch.full(points.shape[:-1], math.inf)
    sign = torch.ones(points.shape[:-1])
    for a, b in zip(vertices, vertices.roll(1, 0)):
        edge, to_point = b - a, points - a
        along = (to_point @ edge / edge.dot(edge)).clamp(0, 1)
        distance = torch.minimum(distance, (to_point - along[..., None] * edge).square().sum(-1))
        left = edge[0] * to_point[..., 1] > edge[1] * to_point[..., 0]
        above_a, below_b = points[..., 1] >= a[1], points[..., 1] < b[1]
        crossing = (above_a & below_b & left) | ~(above_a | below_b | left)
        sign = torch.where(crossing, -sign, sign)
    return sign * distance.sqrt()


def signed_distance(shape: str, points: Tensor) -> Tensor:
    """Signed distance of points (..., 2) to a shape of radius 1 around the origin, negative inside."""
    if shape == "circle":
        return points.norm(dim=-1) - 1
    if shape == "ring":
        return (points.norm(dim=-1) - 0.76).abs() - 0.24
    return polygon_distance(points, POLYGONS[shape])


def silhouettes(shape: str, radius: Tensor, center: Tensor, image_size: int) -> Tensor:
    """Antialiased masks of one shape.

    Args:
        radius: (B,) in pixels. center: (B, 2) as (x, y) in pixels from the image's centre.

    Returns:
        (B, image_size, image_size) in [0, 1], the part of each pixel that the shape covers.
    """
    axis = torch.arange(image_size) - (image_size - 1) / 2
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (H, W, 2) as (x, y)
    points = (grid - center[:, None, None, :]) / radius[:, None, None, None]
    return (0.5 - signed_distance(shape, points) * radius[:, None, None]).clamp(0, 1)


class ShapesDataset(Dataset):
    """Coloured shapes, drawn when they are asked for.

    Sample ``i`` is ``{"images": (3, H, W) in [-1, 1], "texts": sentence}``. Attributes are drawn uniformly, or given.

    Args:
        length: number of images.
        image_size: height and width in pixels.
        seed: draws attributes, positions and radii; another seed gives other images.
        attributes: the ``Attributes`` of each image in turn (repeated to ``length``) instead of random ones.
        labels: give a cache the class of each image too, the place of its attributes among ``ALL_ATTRIBUTES``.
        held_out: part of the pairs of a shape and a colour that are not among the random ones; see
            ``held_out_attributes``.
    """

    def __init__(
        self,
        length: int,
        image_size: int = 32,
        seed: int = 0,
        attributes: Sequence[Attributes] | None = None,
        labels: bool = False,
        held_out: float = 0.0,
    ):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.image_size, self.labels = image_size, labels
        self.class_names = [str(attributes) for attributes in ALL_ATTRIBUTES]
        generator = torch.Generator().manual_seed(seed)
        hidden = set(held_out_attributes(held_out))
        pool = attributes or [a for a in ALL_ATTRIBUTES if a not in hidden]
        choices = torch.randint(len(pool), (length,), generator=generator).tolist()
        self.attributes = [pool[c if attributes is None else i % len(pool)] for i, c in enumerate(choices)]
        scale = image_size / 32
        low, high = torch.tensor([RADII[a.size] for a in self.attributes]).T
        self.radii = (low + (high - low) * torch.rand(length, generator=generator)) * scale
        self.centers = torch.tensor(SHIFTS)[torch.randint(len(SHIFTS), (length, 2), generator=generator)] * scale

    def __len__(self) -> int:
        return len(self.attributes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:  # DataLoader asks for whole batches here
        images = self.render(indices)
        return [{"images": image, "texts": str(self.attributes[i])} for image, i in zip(images, indices)]

    def views(self, items: Sequence[int], count: int) -> Iterator[tuple[Tensor, int | None]]:
        """The images at ``items`` one by one, as (1, 3, H, W), and their class where ``labels``; shapes have no other
        crops than what they are."""
        if count != 1:
            raise ValueError(f"augmentations must be 1 for shapes, got {count}; ask for more images by data.train_size")
        place = {attributes: i for i, attributes in enumerate(ALL_ATTRIBUTES)}
        return ((self.render([item]), place[self.attributes[item]] if self.labels else None) for item in items)

    def render(self, indices: Sequence[int]) -> Tensor:
        """Draw the images at ``indices``: (B, 3, H, W) in [-1, 1]."""
        chosen = [self.attributes[i] for i in indices]
        foreground = rgb([COLORS[a.color] for a in chosen])[:, :, None, None]
        background = rgb([BACKGROUNDS[a.background] for a in chosen])[:, :, None, None]
        mask = self._masks(indices, [a.shape for a in chosen])[:, None]
        return background + mask * (foreground - background)

    def _masks(self, indices: Sequence[int], shapes: list[str]) -> Tensor:
        masks = torch.empty(len(indices), self.image_size, self.image_size)
        where = torch.as_tensor(indices)
        for shape in set(shapes):
            rows = torch.tensor([s == shape for s in shapes])
            picked = where[rows]
            masks[rows] = silhouettes(shape, self.radii[picked], self.centers[picked], self.image_size)
        return masks


def shapes_data(
    train_size: int,
    val_size: int,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    labels: bool = False,
    held_out: float = 0.0,
) -> ImageDataModule:
    """The data module of ``data=shapes``: training and validation images from different seeds.

    Args:
        held_out: part of the 48 pairs of a shape and a colour that neither shows; see ``held_out_attributes``.
    """
    train = ShapesDataset(train_size, image_size, seed=2 * seed, labels=labels, held_out=held_out)
    val = ShapesDataset(val_size, image_size, seed=2 * seed + 1, labels=labels, held_out=held_out)
    return ImageDataModule(train, val, batch_size, num_workers, seed=seed)
