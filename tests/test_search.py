"""CLIP-guided search of a class-conditional generator."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from gan_states import biggan_state, deep_state
from PIL import Image

from clipgen.baselines import load_generator, search
from clipgen.baselines.generators import ExternalGenerator
from clipgen.baselines.search import encode_labels
from clipgen.cli import baseline
from clipgen.clip import FrozenCLIP
from clipgen.data.shapes import COLORS, rgb


class ToyCLIP:
    """Texts and images in the plane: a text is an angle in degrees, an image has it in its first pixel."""

    device = torch.device("cpu")

    def encode_text(self, texts):
        return self.at(torch.tensor([float(text.split()[-1]) for text in texts]))

    def encode_image(self, images):
        return self.at(images[:, 0, 0, 0] * 180)

    def at(self, degrees):
        return torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)


class ToyGAN:
    """Class i generates the angle 10 i, plus up to some degrees by the noise."""

    noise_dim, device, class_names = 3, torch.device("cpu"), [str(10 * i) for i in range(12)]

    def __call__(self, noise, class_indices):
        degrees = 10 * class_indices + noise.sum(dim=1).tanh()
        return (degrees / 180)[:, None, None, None].expand(-1, 3, 2, 2)


def test_top_labels_are_the_nearest_classes():
    labels = search.encode_labels(ToyCLIP(), ToyGAN.class_names)
    assert labels.shape == (12, 2)
    prompt = ToyCLIP().encode_text(["52"])[0]
    assert search.top_labels(labels, prompt, 4).tolist() == [5, 6, 4, 7]
    for k in (0, 13):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 12\], the number of classes, got {k}"):
            search.top_labels(labels, prompt, k)


def test_template_of_the_labels(shapes_clip, caplog):
    name = "a small red star on a black background"
    labels = search.encode_labels(shapes_clip, [name])
    assert torch.equal(labels, shapes_clip.encode_text([name])) and not caplog.records  # no word but those it knows
    other = search.encode_labels(shapes_clip, ["red star"], "a small {label} on a black background")
    assert torch.equal(labels, other)
    with pytest.raises(ValueError, match=r"template must contain \{label\}, got 'a star'"):
        search.encode_labels(shapes_clip, [name], "a star")
    asked = []
    clip = ToyCLIP()
    clip.encode_text = lambda texts: asked.extend(texts) or torch.zeros(len(texts), 2)
    search.encode_labels(clip, ["dog", "cat {x}"])
    assert asked == ["An image of dog", "An image of cat {x}"]  # the paper's


def test_search_returns_the_best_image():
    """The class of 50 degrees with a noise of about tanh^-1(0.6) is the answer to 50.6."""
    result = search.search(ToyGAN(), ToyCLIP(), "50.6", k=3, num_images=200, seed=1, return_images=True)
    assert result.class_index == 5 and result.image[0, 0, 0] * 180 == pytest.approx(50.6, abs=0.1)
    degrees = result.images[:, 0, 0, 0] * 180
    assert result.score == pytest.approx(math.cos(math.radians((degrees - 50.6).abs().min())), abs=1e-6)
    assert set((degrees / 10).round().int().tolist()) == {4, 5, 6}  # sampled from the top 3 only
    counts = (degrees / 10).round().int().bincount()[4:]
    assert counts.min() > 40  # uniformly
    scores = ToyCLIP().encode_image(result.images) @ ToyCLIP().encode_text(["50.6"])[0]
    assert all(result.curve[b] == scores[: b + 1].max() for b in range(200))  # the running best
    assert (result.curve.diff() >= 0).all() and result.curve[-1] == result.score


def test_search_of_all_classes_is_random_search():
    """Classes and noise are then sampled independently of CLIP."""
    result = search.search(ToyGAN(), ToyCLIP(), "50.6", k=12, num_images=100, seed=2, return_images=True)
    noise, classes = search.sample_inputs(3, torch.arange(12), 100, "2 50.6")
    assert torch.equal(result.images, ToyGAN()(noise, classes)) and len(classes.unique()) == 12
    assert noise.mean().abs() < 0.2 and noise.std() == pytest.approx(1, abs=0.15)


def test_search_is_a_function_of_its_seed():
    def run(seed=1, batch=32, count=50, prompt="50.6"):
        return search.search(ToyGAN(), ToyCLIP(), prompt, 5, count, seed, batch_size=batch, return_images=True)

    first = run()
    for other in (run(batch=1), run(batch=7), run(batch=500)):
        assert torch.equal(other.images, first.images) and torch.equal(other.curve, first.curve)
        assert torch.equal(other.image, first.image) and other[1:3] == first[1:3]
    assert torch.equal(run(count=20).curve, first.curve[:20])  # a longer search begins like a shorter one
    assert not torch.equal(run(seed=2).images, first.images)
    assert not set(run(seed=2).images.flatten().tolist()) & set(first.images.flatten().tolist())  # seeds share nothing
    assert run()[4] is not None and search.search(ToyGAN(), ToyCLIP(), "5", 5, 3).images is None


def test_images_needed_counts_to_the_first_score_above_the_threshold():
    curve = torch.tensor([0.1, 0.3, 0.3, 0.4])
    assert [search.images_needed(curve, t) for t in (0.0, 0.1, 0.3, 0.4)] == [1, 2, 4, None]


def test_table_matches_single_searches(shapes_clip):
    """Against single searches; standard deviations as the paper takes them (its Appendix A, SAGAN, k = 1)."""
    seen = []
    prompts = ["11", "52", "87"]
    rows = search.search_table(
        ToyGAN(), ToyCLIP(), prompts, 0.99995, num_images=30, seeds=(1, 2), callback=lambda *call: seen.append(call[:3])
    )
    assert [row.k for row in rows] == [1, 10, 12]  # capped by the classes at hand
    assert seen == [(k, seed, j) for k in (1, 10, 12) for seed in (1, 2) for j in range(3)]
    curves = [torch.stack([search.search(ToyGAN(), ToyCLIP(), p, 10, 30, s).curve for p in prompts]) for s in (1, 2)]
    assert rows[1].best == pytest.approx([c[:, -1].mean().item() for c in curves], abs=1e-6)
    assert rows[1].needed == [search.images_needed(c.double().mean(0), 0.99995) for c in curves]
    torch.testing.assert_close(rows[1].curve, torch.stack(curves).double().mean(dim=(0, 1)))
    paper = search.SearchRow(1, [0.298575, 0.298602, 0.298783], [13, None, 14], torch.zeros(1))
    assert paper.best_mean_std == pytest.approx((0.298653, 1.131e-4), abs=1e-6) and paper.needed_mean_std is None
    assert search.SearchRow(1, [0.3], [13, 14, 14], torch.zeros(1)).needed_mean_std == pytest.approx(
        (13.67, 0.58), abs=0.005
    )
    assert search.SearchRow(1, [0.3], [8], torch.zeros(1)).best_mean_std == (pytest.approx(0.3), 0.0)


def test_real_score_is_the_mean_cosine(shapes_clip, images):
    texts = ["a small red star on a black background"] * 8
    expected = sum(
        float(shapes_clip.encode_image(images[i : i + 1])[0] @ shapes_clip.encode_text(texts[:1])[0]) for i in range(8)
    )
    assert search.real_score(shapes_clip, images, texts) == pytest.approx(expected / 8, abs=1e-6)


@pytest.mark.slow
def test_search_finds_the_color_of_the_prompt(shapes_clip):
    """A perfect generator of squares of each color: the color of the prompt is found by its name only."""
    colors = rgb(list(COLORS.values()))

    def generate(noise, class_indices):
        images = torch.ones(len(noise), 3, 32, 32)
        images[:, :, 8:24, 8:24] = colors[class_indices][:, :, None, None]
        return images

    names = [f"a large {color} square on a white background" for color in COLORS]
    for i, name in enumerate(names):
        result = search.search(ExternalGenerator(generate, "squares", 1, names), shapes_clip, name, k=2, num_images=8)
        assert result.class_index == i


def test_search_asks_for_the_names_of_other_classes_than_imagenets(tmp_path):
    torch.save(biggan_state(), tmp_path / "G_ema.pth")
    generator = load_generator(f"biggan:{tmp_path}")
    with pytest.raises(ValueError, match=r"class_names must name the classes of the generator, got none"):
        encode_labels(FrozenCLIP("shapes"), generator.class_names)


def test_search_reports_its_truncation(monkeypatch, tmp_path):
    torch.save(deep_state(), tmp_path / "pytorch_model.bin")
    (tmp_path / "names.txt").write_text("circle\nsquare\nstar\nring\ncross\n")
    options = ["--generator", f"biggan:{tmp_path}", "--class-names", tmp_path / "names.txt", "--truncation", 0.4]
    options += ["--prompt", "a red circle", "--clip", "shapes", "--k", 2, "--num-images", 3, "--device", "cpu"]
    arguments = ["clipgen-baseline", "search", *options, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    baseline.run()
    with Image.open(next((tmp_path / "out").glob("00*.png"))) as image:
        assert image.info["truncation"] == "0.4"
