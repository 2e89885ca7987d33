"""The search as its authors ran it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gan_states import deep_state

from clipgen.baselines import search
from clipgen.baselines.gan_files import load_gan_file
from clipgen.baselines.search_protocol import (
    PublishedCLIPInput,
    SearchProtocol,
    keras_names,
    prepare_caption,
    ranking_caption,
)
from clipgen.clip import FrozenCLIP


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return FrozenCLIP("shapes")


def test_constants_are_those_of_the_public_code():
    protocol = SearchProtocol(truncation=0.4)
    assert (protocol.num_images, protocol.template) == (100, "An image of {label}")
    assert protocol.threshold == 0.2841796875 and list(protocol.seeds) == [42, 43, 44]
    assert search.PAPER_KS == (1, 10, 20, 50, 100, 1000)
    assert prepare_caption("  A Bird " + "x" * 100) == "a bird " + "x" * 63
    assert len(keras_names()) == 1000 and keras_names()[2] == "great_white_shark"


def test_published_input_is_neither_normalized_nor_antialiased(clip):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    resized = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False)
    expected = F.normalize(clip.model.encode_image(resized), dim=-1)
    published = PublishedCLIPInput(clip).encode_image(images)
    torch.testing.assert_close(published, expected, rtol=1e-4, atol=1e-5)
    assert (published - clip.encode_image(images)).abs().max() > 0.01


def test_ranking_caption_is_one_of_the_image_and_stays_the_same():
    captions = ["a", "b", "c"]
    chosen = [ranking_caption(captions, number) for number in range(50)]
    assert set(chosen) == set(captions) and chosen == [ranking_caption(captions, number) for number in range(50)]


def test_each_image_is_scored_against_a_random_caption_of_its_prompt(clip):
    """The prompt ranks the classes alone, so the images are the same with and without captions."""
    texts = ["a small red star on a black background", "a large blue ring on a white background"]
    generator = SimpleNamespace(noise_dim=2, device=torch.device("cpu"), class_names=["red", "blue"])

    class Generator:
        noise_dim, device, class_names = generator.noise_dim, generator.device, generator.class_names

        def __call__(self, noise, class_indices):
            return noise.tanh().repeat(1, 6)[:, :12].view(-1, 3, 2, 2)

    options = {"k": 2, "num_images": 12, "seed": 5, "return_images": True}
    alone = search.search(Generator(), clip, texts[0], **options)
    result = search.search(Generator(), clip, texts[0], captions=texts, **options)
    assert torch.equal(alone.images, result.images)
    scores = clip.encode_image(result.images) @ clip.encode_text(texts).T  # (12, 2)
    chosen = search.sample_captions(2, 12, f"5 {texts[0]}")
    assert 0 < chosen.sum() < 12
    torch.testing.assert_close(result.curve, scores[torch.arange(12), chosen].cummax(dim=0).values)


def test_truncation_is_the_papers_for_biggan_deep_alone(tmp_path):
    torch.save(deep_state(), tmp_path / "deep.bin")
    generator = load_gan_file(f"biggan:{tmp_path / 'deep.bin'}", class_names=list("abcde"))
    settings = {"own_class_names": True}
    assert not any("truncation" in phrase for phrase in SearchProtocol(0.4, **settings).deviations(generator, True))
    assert "truncation is None instead of 0.4" in SearchProtocol(None, **settings).deviations(generator, True)
    other = SimpleNamespace(model=None)
    assert not any("truncation" in phrase for phrase in SearchProtocol(None, **settings).deviations(other, True))


def test_every_departure_is_stated():
    protocol = SearchProtocol(None, "a {label}", 5, (1,), None, "normalized", True, True)
    phrases = " ".join(protocol.deviations(SimpleNamespace(model=None), True))
    for words in ("template is a {label}", "num_images is 5 instead of 100", "seeds are [1] instead of [42, 43, 44]"):
        assert words in phrases
    for words in ("threshold is None", "another scale", "one caption per image", "class names are given"):
        assert words in phrases
    assert "one caption per image" in " ".join(SearchProtocol(None).deviations(SimpleNamespace(model=None), False))


def test_command_writes_the_tables_with_the_deviations(call, tmp_path):
    torch.save(deep_state(), tmp_path / "deep.bin")
    (tmp_path / "names.json").write_text(json.dumps(["red star", "blue ring", "cross", "square", "circle"]))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "1.txt").write_text("A small red star\na red star\n")
    (tmp_path / "text" / "2.txt").write_text("a large blue ring\n")
    options = [
        "--generator",
        "biggan:deep.bin",
        "--class-names",
        "names.json",
        "--captions",
        "text",
        "--clip",
        "shapes",
    ]
    options += ["--protocol", "csc2516", "--num-images", 3, "--save-best", "--device", "cpu", "--output", "out"]
    result = call("clipgen-baseline", "search", *options)
    assert result.code == 0, result.stderr
    report = json.loads((tmp_path / "out/search.json").read_text())
    assert report["truncation"] == 0.4 and report["threshold"] == 0.2841796875 and report["prompts"] == 2
    assert report["protocol"] == "csc2516" and "num_images is 3 instead of 100" in report["deviations"]
    assert [row["k"] for row in report["rows"]] == [1, 5] and len(report["rows"][0]["best"]) == 3
    table = (tmp_path / "out/search.md").read_text()
    assert "| Best CLIP score | k = 1 | k = 5 |" in table and "num_images is 3 instead of 100" in table
    assert len(list((tmp_path / "out/best").rglob("*.png"))) == 2 * 3 * 2
    result = call("clipgen-baseline", "search", *options[:-1], "other", "--clip-input", "normalized", "--one-caption")
    report = json.loads((tmp_path / "other/search.json").read_text())
    assert report["threshold"] is None and any("another scale" in phrase for phrase in report["deviations"])
