"""The rule-based evaluator of the shapes data, against renders whose attributes are known."""

from __future__ import annotations

import pytest
import torch

from clipgen.data.shapes import ALL_ATTRIBUTES, Attributes, ShapesDataset, parse_caption
from clipgen.evaluation.shapes_evaluator import UNKNOWN, accuracy, evaluate_shapes


def test_evaluator_reads_fresh_renders():
    data = ShapesDataset(4000, seed=424_242)
    results = accuracy(data.render(range(4000)), data.attributes)
    assert results == {"shape": 1, "color": 1, "size": 1, "background": 1, "all": 1}


def test_evaluator_tolerates_noise_and_rounding():
    """What a tokenizer does to an image at least."""
    data = ShapesDataset(500, seed=11)
    images = data.render(range(500))
    noisy = (images + 0.05 * torch.randn(images.shape)).clamp(-1, 1)
    rounded = ((noisy + 1) * 127.5).round() / 127.5 - 1
    assert accuracy(rounded, data.attributes)["all"] >= 0.95


def test_evaluator_reads_other_sizes():
    for size in (24, 64):
        data = ShapesDataset(300, image_size=size, seed=12)
        assert accuracy(data.render(range(300)), data.attributes)["all"] >= 0.95


def test_evaluator_rejects_wrong_attributes():
    images = ShapesDataset(300, seed=13).render(range(300))
    others = ShapesDataset(300, seed=14).attributes
    assert accuracy(images, others)["all"] < 0.05
    wrong = [
        Attributes(a.size, a.color, "star" if a.shape != "star" else "ring", a.background)
        for a in ShapesDataset(300, seed=13).attributes
    ]
    results = accuracy(images, wrong)
    assert results["shape"] < 0.02 and results["color"] > 0.98


@pytest.mark.parametrize("image", [torch.zeros(3, 32, 32), torch.rand(3, 32, 32) * 2 - 1, torch.ones(3, 32, 32)])
def test_evaluator_finds_no_shape_in_noise_or_flat_images(image):
    assert evaluate_shapes(image[None])[0].shape == UNKNOWN and evaluate_shapes(image[None])[0].size == UNKNOWN


def test_half_a_shape_is_not_the_shape():
    circle = parse_caption("a large red circle on a white background")
    images = ShapesDataset(100, seed=15, attributes=[circle]).render(range(100))
    images[:, :, :, 14:] = 1.0  # white
    assert accuracy(images, [circle] * 100)["all"] < 0.05


def test_images_must_be_square():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, H\), got \(1, 3, 32, 16\)"):
        evaluate_shapes(torch.zeros(1, 3, 32, 16))
    with pytest.raises(ValueError):
        accuracy(torch.zeros(2, 3, 32, 32), [ALL_ATTRIBUTES[0]])
