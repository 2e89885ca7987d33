"""Generate a dataset of antialiased colored shapes, each with the caption that describes it.

6 shapes x 8 colors x 2 sizes x 3 backgrounds = 288 captions. The position varies by four pixels in each direction and
the radius by one, so images of the same caption differ. Images are rendered on the fly from signed distances, and the
same seed gives the same images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipgen.data.chunks import index_ranges
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.source import ImageCount, Views

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
# Range of the radius and shifts to the right and down, in pixels of a 32-pixel image.
RADII = {"small": (7.5, 8.5), "large": (11.0, 12.0)}
SHIFTS = (-4, 0, 4)
REFERENCE_SIZE = 32
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}


@dataclass(frozen=True)
class Attributes:
    """Attributes of an image, as its caption states them."""

    size: str
    color: str
    shape: str
    background: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape} on a {self.background} background"


ALL_ATTRIBUTES = tuple(Attributes(*names) for names in itertools.product(RADII, COLORS, SHAPES, BACKGROUNDS))
CLASS_INDEX = dict(zip(ALL_ATTRIBUTES, range(len(ALL_ATTRIBUTES))))


def held_out_attributes(fraction: float) -> tuple[Attributes, ...]:
    """Return the attributes that ``data.held_out`` excludes from training: all captions of some shape-color pairs.

    The pairs depend only on the fraction of the 48 pairs. They lie on diagonals of the shuffled table of shapes and
    colors, so that all shapes and all colors are missing about equally often. A larger fraction includes the pairs of a
    smaller one.

    Raises:
        ValueError: the fraction is not in [0, 1), or so large that no pair is left.
    """
    num_pairs = len(SHAPES) * len(COLORS)
    num_held_out = round(fraction * num_pairs)
    if not 0 <= fraction < 1 or num_held_out == num_pairs:
        raise ValueError(f"held_out must be in [0, 1) and leave one of the {num_pairs} pairs, got {fraction}")
    generator = torch.Generator().manual_seed(0)
    shapes = shuffled(SHAPES, generator)
    colors = shuffled(tuple(COLORS), generator)
    pairs = []
    for shift in range(len(colors)):
        for i, shape in enumerate(shapes):
            pairs.append((shape, colors[(i + shift) % len(colors)]))
    held_out = set(pairs[:num_held_out])
    return tuple(attributes for attributes in ALL_ATTRIBUTES if (attributes.shape, attributes.color) in held_out)


def shuffled(names: Sequence[str], generator: torch.Generator) -> list[str]:
    """Return the names in random order."""
    return [names[i] for i in torch.randperm(len(names), generator=generator)]


def parse_caption(caption: str) -> Attributes:
    """Parse a caption of the dataset; inverse of ``str(attributes)``.

    Raises:
        ValueError: the caption is not one of the 288.
    """
    match caption.lower().rstrip(".").split():
        case ["a", size, color, shape, "on", "a", background, "background"]:
            attributes = Attributes(size, color, shape, background)
            if attributes in ALL_ATTRIBUTES:
                return attributes
    raise ValueError(f"caption must read like {str(ALL_ATTRIBUTES[0])!r}, got {caption!r}")


def rgb(colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """Convert 8-bit colors to (N, 3) in [-1, 1]."""
    return torch.tensor(colors, dtype=torch.float32) / 127.5 - 1


def polygon(corners: int, inner_radius: float = 1.0, rotation: float = 0.0) -> Tensor:
    """Return the vertices (N, 2) of a regular polygon in the unit circle.

    Args:
        corners: number of vertices.
        inner_radius: radius of every second vertex; below 1 the polygon is a star.
        rotation: angle in radians.
    """
    steps = torch.arange(corners)
    angle = steps * (2 * math.pi / corners) + rotation - math.pi / 2
    radius = torch.where(steps % 2 == 0, 1.0, inner_radius)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def plus(half_width: float) -> Tensor:
    """Return the vertices (12, 2) of an upright cross whose arms are ``2 * half_width`` wide."""
    quarter = torch.tensor([[half_width, -1.0], [half_width, -half_width], [1.0, -half_width]])
    quarters = []
    for angle in torch.arange(4) * math.pi / 2:
        rotation = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        quarters.append(quarter @ rotation)
    return torch.cat(quarters)


POLYGONS = {
    "square": polygon(4, rotation=math.pi / 4),
    "triangle": polygon(3),
    "star": polygon(10, inner_radius=0.42),
    "cross": plus(0.34),
}


def polygon_distance(points: Tensor, vertices: Tensor) -> Tensor:
    """Return the signed distance to a polygon, negative inside: (..., 2), (N, 2) -> (...). Inigo Quilez' ``sdPolygon``.

    The distance is that to the nearest edge. A point is inside if a ray from it crosses an odd number of edges.
    """
    squared_distance = torch.full(points.shape[:-1], math.inf)
    sign = torch.ones(points.shape[:-1])
    for a, b in zip(vertices, vertices.roll(1, 0)):
        edge = b - a
        to_point = points - a
        along = (to_point @ edge / edge.dot(edge)).clamp(0, 1)
        squared_distance = torch.minimum(squared_distance, (to_point - along[..., None] * edge).square().sum(-1))
        is_left = edge[0] * to_point[..., 1] > edge[1] * to_point[..., 0]
        above_a = points[..., 1] >= a[1]
        below_b = points[..., 1] < b[1]
        crosses = (above_a & below_b & is_left) | ~(above_a | below_b | is_left)
        sign = torch.where(crosses, -sign, sign)
    return sign * squared_distance.sqrt()


def signed_distance(shape: str, points: Tensor) -> Tensor:
    """Return the signed distance of points (..., 2) to a shape of radius 1 around the origin, negative inside."""
    if shape == "circle":
        return points.norm(dim=-1) - 1
    if shape == "ring":
        return (points.norm(dim=-1) - 0.76).abs() - 0.24
    return polygon_distance(points, POLYGONS[shape])


def silhouettes(shape: str, radius: Tensor, center: Tensor, image_size: int) -> Tensor:
    """Render antialiased masks of one shape.

    Args:
        shape: one of ``SHAPES``.
        radius: (B,) in pixels.
        center: (B, 2) as (x, y) in pixels from the center of the image.
        image_size: height and width in pixels.

    Returns:
        (B, image_size, image_size) in [0, 1], the fraction of each pixel that the shape covers.
    """
    axis = torch.arange(image_size) - (image_size - 1) / 2
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (H, W, 2) as (x, y)
    points = (grid - center[:, None, None, :]) / radius[:, None, None, None]
    return (0.5 - signed_distance(shape, points) * radius[:, None, None]).clamp(0, 1)


class ShapesDataset(Dataset[dict[str, Any]]):
    """Colored shapes, rendered on access. Sample ``i`` is ``{"images": (3, H, W) in [-1, 1], "texts": caption}``.

    Args:
        length: number of images.
        image_size: height and width in pixels.
        seed: seed of attributes, positions and radii.
        attributes: attributes of the images, repeated to ``length``; None samples them uniformly.
        labels: return the class of each image from ``augmented_views``, the index of its attributes in
            ``ALL_ATTRIBUTES``.
        held_out: fraction of the shape-color pairs that are not sampled; see ``held_out_attributes``.
    """

    # Generated images cannot be unusable.
    skip_counter = None

    def __init__(
        self,
        length: int,
        image_size: int = REFERENCE_SIZE,
        seed: int = 0,
        attributes: Sequence[Attributes] | None = None,
        labels: bool = False,
        held_out: float = 0.0,
    ):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.image_size = image_size
        self.seed = seed
        self.labels = labels
        self.class_names = list(map(str, ALL_ATTRIBUTES))
        # One generator for everything, in this order: the images of a seed must not change.
        generator = torch.Generator().manual_seed(seed)
        sampled = sample_attributes(length, held_out, generator)
        if attributes is None:
            self.attributes = sampled
        else:
            self.attributes = list(itertools.islice(itertools.cycle(attributes), length))
        scale = image_size / REFERENCE_SIZE
        smallest, largest = torch.tensor([RADII[attributes.size] for attributes in self.attributes]).T
        self.radii = (smallest + (largest - smallest) * torch.rand(length, generator=generator)) * scale
        self.centers = torch.tensor(SHIFTS)[torch.randint(len(SHIFTS), (length, 2), generator=generator)] * scale

    def __len__(self) -> int:
        return len(self.attributes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return many samples; DataLoader calls this with the indices of a batch."""
        images = self.render(indices)
        return [{"images": image, "texts": str(self.attributes[i])} for image, i in zip(images, indices)]

    def split_into_chunks(self, size: int) -> list[range]:
        """Return ranges of item indices."""
        return index_ranges(len(self), size)

    def augmented_views(self, chunk: Sequence[int], num_views: int) -> Iterator[Views]:
        """Yield each image as (1, 3, H, W) in [-1, 1], and its class with ``labels``, else None.

        Raises:
            ValueError: ``num_views`` is not 1, because shapes have no other crops.
        """
        if num_views != 1:
            raise ValueError(
                f"augmentations must be 1 for shapes, got {num_views}; set data.train_size for more images"
            )
        for item in chunk:
            label = CLASS_INDEX[self.attributes[item]] if self.labels else None
            yield self.render([item]), label

    def file_names(self) -> list[str]:
        """Return []: nothing is read."""
        return []

    def content_id(self) -> str:
        """Return the number of images and the seed."""
        return f"shapes {len(self)} {self.seed}"

    def count_images(self) -> ImageCount:
        """Return the number of images."""
        return ImageCount(len(self))

    def render(self, indices: Sequence[int]) -> Tensor:
        """Render the images at ``indices``: (B, 3, H, W) in [-1, 1]."""
        attributes = [self.attributes[i] for i in indices]
        foreground = rgb([COLORS[a.color] for a in attributes])[:, :, None, None]
        background = rgb([BACKGROUNDS[a.background] for a in attributes])[:, :, None, None]
        mask = self._masks(indices, [a.shape for a in attributes])[:, None]
        return background + mask * (foreground - background)

    def _masks(self, indices: Sequence[int], shapes: list[str]) -> Tensor:
        """Render the masks (B, H, W) of images with the given shapes, all images of one shape at a time."""
        masks = torch.empty(len(indices), self.image_size, self.image_size)
        items = torch.as_tensor(indices)
        names = np.array(shapes)
        for shape in set(shapes):
            has_shape = torch.from_numpy(names == shape)
            radii = self.radii[items[has_shape]]
            centers = self.centers[items[has_shape]]
            masks[has_shape] = silhouettes(shape, radii, centers, self.image_size)
        return masks


def sample_attributes(length: int, held_out: float, generator: torch.Generator) -> list[Attributes]:
    """Sample attributes uniformly, without the held-out pairs."""
    excluded = set(held_out_attributes(held_out))
    pool = [attributes for attributes in ALL_ATTRIBUTES if attributes not in excluded]
    choices = torch.randint(len(pool), (length,), generator=generator).tolist()
    return [pool[choice] for choice in choices]


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
    """Make the data module of ``data=shapes``: training and validation images from different seeds.

    Arguments as in ``ShapesDataset`` and ``ImageDataModule``. ``held_out`` pairs occur in neither split.
    """
    train = ShapesDataset(train_size, image_size, seed=2 * seed, labels=labels, held_out=held_out)
    val = ShapesDataset(val_size, image_size, seed=2 * seed + 1, labels=labels, held_out=held_out)
    return ImageDataModule(train, val, batch_size, num_workers, seed=seed)
