"""The shapes dataset."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clipgen.data.shapes import (
    ALL_ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    RADII,
    SHAPES,
    SHIFTS,
    Attributes,
    ShapesDataset,
    held_out_attributes,
    parse_caption,
    shapes_data,
    silhouettes,
)
from clipgen.evaluation.shapes_evaluator import evaluate_shapes


def test_every_combination_of_attributes_has_its_own_caption():
    assert len(SHAPES) >= 6 and len(COLORS) >= 8 and len(RADII) >= 2 and len(BACKGROUNDS) >= 3
    captions = {str(attributes) for attributes in ALL_ATTRIBUTES}
    assert len(captions) == len(ALL_ATTRIBUTES) == len(SHAPES) * len(COLORS) * len(RADII) * len(BACKGROUNDS)


def test_parse_inverts_str():
    assert str(Attributes("large", "blue", "ring", "white")) == "a large blue ring on a white background"
    assert all(parse_caption(str(attributes)) == attributes for attributes in ALL_ATTRIBUTES)
    assert parse_caption("A small Red star on a black background.") == Attributes("small", "red", "star", "black")


@pytest.mark.parametrize("what", ["", "cat", "large blue cat", "blue large ring", "blue ring", "nice large blue ring"])
def test_other_sentences_are_refused(what):
    caption = f"a {what} on a white background" if what else ""
    with pytest.raises(ValueError, match="caption must read like 'a small red circle on a white background'"):
        parse_caption(caption)


def test_sample_shapes_and_ranges():
    sample = ShapesDataset(4, image_size=48)[1]
    assert sample["images"].shape == (3, 48, 48) and sample["images"].dtype == torch.float32
    assert sample["images"].min() >= -1 and sample["images"].max() <= 1
    assert parse_caption(sample["texts"]) in ALL_ATTRIBUTES
    batch = next(iter(DataLoader(ShapesDataset(4), batch_size=3)))
    assert batch["images"].shape == (3, 3, 32, 32) and len(batch["texts"]) == 3


def test_images_depend_only_on_the_seed():
    render = lambda seed: ShapesDataset(64, seed=seed).render(range(64))
    assert torch.equal(render(3), render(3))
    torch.rand(5)
    state = torch.random.get_rng_state()
    assert torch.equal(render(3), render(3)) and torch.equal(torch.random.get_rng_state(), state)
    same = (render(3) == render(4)).flatten(1).all(1)
    assert not same.any()
    data = ShapesDataset(64, seed=3)
    assert torch.equal(torch.stack([data[i]["images"] for i in range(64)]), render(3))  # one by one as in a batch


def test_images_of_a_sentence_vary_in_position_and_radius():
    images = ShapesDataset(200, seed=1, attributes=ALL_ATTRIBUTES[:1]).render(range(200))
    assert len(images.flatten(1).unique(dim=0)) > 40


@pytest.mark.parametrize(("fraction", "pairs"), [(0.0, 0), (0.1, 5), (0.25, 12), (0.5, 24)])
def test_held_out_pairs_occur_in_no_split(fraction, pairs):
    hidden = held_out_attributes(fraction)
    assert hidden == held_out_attributes(fraction) and len(hidden) == 6 * pairs  # 2 sizes x 3 backgrounds
    assert len({(a.shape, a.color) for a in hidden}) == pairs
    assert set(held_out_attributes(fraction / 2)) <= set(hidden)
    data = shapes_data(train_size=4000, val_size=1000, image_size=32, batch_size=8, held_out=fraction)
    for part in (data.train, data.val):
        shown = set(part.attributes)
        assert not shown & set(hidden) and len(shown) > 0.9 * (288 - len(hidden))
        for names, attribute in ((SHAPES, "shape"), (COLORS, "color")):  # each occurs, in other pairs
            assert {getattr(a, attribute) for a in shown} == set(names)
    for attribute, names in (("shape", SHAPES), ("color", COLORS)):  # and the missing ones are evenly distributed
        missing = [len({(a.shape, a.color) for a in hidden if getattr(a, attribute) == name}) for name in names]
        assert max(missing) <= -(-pairs // 6)


def test_images_of_seed_0_have_not_changed():
    """The first captions of seed 0, from before ``held_out`` was added."""
    first = ["a small blue triangle on a black background", "a large yellow star on a white background"]
    assert [str(a) for a in ShapesDataset(2).attributes] == first


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.999])
def test_held_out_fraction_is_checked(fraction):
    with pytest.raises(
        ValueError, match=rf"held_out must be in \[0, 1\) and leave one of the 48 pairs, got {fraction}"
    ):
        held_out_attributes(fraction)


def test_training_and_validation_images_differ():
    parts = []
    for seed in (0, 1, 2):
        data = shapes_data(train_size=32, val_size=32, image_size=32, batch_size=8, seed=seed)
        parts += [torch.stack([sample["images"] for sample in part]) for part in (data.train, data.val)]
    for a, b in itertools.combinations(parts, 2):  # the validation images of one seed are not another's training images
        assert (a == b).flatten(1).all(1).float().mean() < 0.1


def test_attributes_are_uniform():
    sampled = ShapesDataset(6000, seed=2).attributes
    for name, known in (("shape", SHAPES), ("color", COLORS), ("size", RADII), ("background", BACKGROUNDS)):
        for value in known:
            part = sum(getattr(a, name) == value for a in sampled) / 6000
            assert part == pytest.approx(1 / len(known), abs=0.03), value


def test_explicit_attributes_are_repeated():
    chosen = [
        parse_caption("a small red star on a black background"),
        parse_caption("a large pink ring on a gray background"),
    ]
    data = ShapesDataset(5, attributes=chosen)
    assert data.attributes == [chosen[i % 2] for i in range(5)]
    assert evaluate_shapes(data.render(range(5))) == data.attributes


def supersampled(inside, image_size: int, times: int = 16) -> Tensor:
    """Return the fraction of each pixel that a shape covers, counted on a fine grid; ``inside(x, y)`` -> bool."""
    axis = (torch.arange(image_size * times) + 0.5) / times - image_size / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return inside(x, y).float().view(image_size, times, image_size, times).mean((1, 3))


def test_edges_are_antialiased():
    """Compared with the counted coverage of a disc and of a square that is not aligned with the pixels."""
    center = torch.tensor([[1.3, -2.6]])
    circle = silhouettes("circle", torch.tensor([9.4]), center, 32)[0]
    expected = supersampled(lambda x, y: (x - 1.3) ** 2 + (y + 2.6) ** 2 < 9.4**2, 32)
    assert (circle - expected).abs().max() < 0.12 and (circle - expected).abs().mean() < 0.003
    square = silhouettes("square", torch.tensor([9.4]), center, 32)[0]
    side = 9.4 / math.sqrt(2)
    expected = supersampled(lambda x, y: ((x - 1.3).abs() < side) & ((y + 2.6).abs() < side), 32)
    assert (square - expected).abs().max() < 0.3 and (square - expected).abs().mean() < 0.01
    for mask in (circle, square):
        assert ((mask > 0.05) & (mask < 0.95)).sum() > 20


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_areas_match_geometry(shape):
    """In units of the squared radius; and no shape touches the border."""
    star = 10 * 0.5 * 0.42 * math.sin(math.pi / 5)
    area = {
        "circle": math.pi,
        "square": 2.0,
        "triangle": 0.75 * math.sqrt(3),
        "star": star,
        "ring": math.pi * (1 - 0.52**2),
        "cross": 8 * 0.34 - 4 * 0.34**2,
    }[shape]
    mask = silhouettes(shape, torch.tensor([80.0]), torch.zeros(1, 2), 256)[0]
    assert mask.sum().item() / 80**2 == pytest.approx(area, rel=0.01)
    border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert not border.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_inside_the_image(shape):
    largest = max(high for _, high in RADII.values())
    centers = torch.tensor([(0, 0), *itertools.product((min(SHIFTS), max(SHIFTS)), repeat=2)]).float()
    masks = silhouettes(shape, torch.full((len(centers),), largest), centers, 32)
    areas = masks.sum((1, 2))
    assert (areas - areas[0]).abs().max() < 1.0  # of 1024 pixels: nothing is cut off


def test_sizes_scale_with_the_image():
    small, large = (ShapesDataset(16, image_size=size, seed=4).render(range(16)) for size in (32, 128))
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - shrunk).abs().mean() < 0.03


def test_length_is_checked():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        ShapesDataset(0)
