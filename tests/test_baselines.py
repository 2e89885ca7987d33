"""The systems that the papers compare with: classes for a condition, generators of others, search, VQGAN-CLIP."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from commands import TRANSFORMER, everything
from models import TRANSFORMER_SIZES, make_class_transformer
from PIL import Image
from torch import Tensor, nn

from clipgen import sampling
from clipgen.baselines import generators, search, vqgan_clip
from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.baselines.generators import ExternalGenerator, load_generator
from clipgen.data.shapes import ALL_ATTRIBUTES, COLORS, rgb
from clipgen.pipeline import TextToImage

NAMES = ["red", "green", "blue"]


@pytest.fixture
def labelled(tiny_vqgan) -> ClassConditionalGenerator:
    """Untrained, with weights so large that its pictures differ clearly."""
    transformer = make_class_transformer(**{**TRANSFORMER_SIZES, "clip_dim": 3}, class_names=NAMES)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return ClassConditionalGenerator(tiny_vqgan, transformer.eval())


# ---------------------------------------------------------------------------------------------- classes for a condition


def test_it_is_the_transformer_on_one_hot_classes(labelled, tiny_vqgan):
    classes = torch.tensor([2, 0, 2, 1])
    one_hot = torch.eye(3)[classes]
    indices = labelled.transformer.sample(one_hot, seed=5)
    images = tiny_vqgan.decode(indices.view(4, 4, 4)).clamp(-1, 1).detach()
    torch.testing.assert_close(labelled.draw(classes, seed=5), images, atol=1e-5, rtol=0)
    assert not torch.equal(labelled.draw(torch.tensor([1, 0, 2, 1]), seed=5)[0], images[0])


def test_guidance_is_the_transformers(labelled, tiny_vqgan):
    guided = ClassConditionalGenerator(tiny_vqgan, labelled.transformer, guidance_scale=3.0, top_k=5)
    indices = labelled.transformer.sample(torch.eye(3), seed=5, guidance_scale=3.0, top_k=5)
    expected = tiny_vqgan.decode(indices.view(3, 4, 4)).clamp(-1, 1).detach()
    torch.testing.assert_close(guided.draw(torch.arange(3), seed=5), expected, atol=1e-5, rtol=0)


def test_an_image_follows_from_its_noise(labelled):
    """The normal CDF of the noise is the uniform number, so noise made of uniforms gives those uniforms' images."""
    uniforms = sampling.per_sample_uniforms([5, 6, 7], 16).double()
    noise = math.sqrt(2) * torch.erfinv(2 * uniforms - 1)
    assert labelled.noise_dim == 16 and labelled.class_names == NAMES
    images = labelled(noise, torch.arange(3))
    assert torch.equal(images, labelled.draw(torch.arange(3), seed=5)) and images.abs().max() <= 1
    torch.testing.assert_close(labelled(noise[[2, 0]], torch.tensor([2, 0])), images[[2, 0]])
    far = torch.full((1, 16), 50.0)  # where the CDF is 1 in floating point
    assert labelled(far, torch.tensor([0])).isfinite().all()


def test_classes_by_name_and_number(labelled):
    assert labelled.find("green") == labelled.find("1") == labelled.find(1) == 1
    for label in ("black", "3", "-1", ""):
        with pytest.raises(ValueError, match="label must be below 3 or one of red, green, blue; got"):
            labelled.find(label)
    with pytest.raises(ValueError, match=r"class_indices must be in \[0, 3\), got \[3\]"):
        labelled.draw(torch.tensor([3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_loss_weight": 0.2}, "clip_loss_weight must be 0 with data.conditioning=class, got 0.2"),
        ({"cond_noise_cosine": 0.9}, "cond_noise_cosine must be 1 for classes, got 0.9"),
        ({"clip_dim": 4}, "clip_dim must be 3, the number of classes, got 4"),
    ],
)
def test_what_a_class_cannot_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_class_transformer(**{**TRANSFORMER_SIZES, "clip_dim": 3, **arguments}, class_names=NAMES)


@pytest.fixture
def run(call, tiny_vqgan, tmp_path) -> Path:
    """A run folder of the label-conditioned transformer, by the commands."""
    tiny_vqgan.save(tmp_path / "vqgan")
    arguments = ["data.train_size=64", "data.val_size=16", "device=cpu", "output=cache", "data.labels=true"]
    result = call("clipgen-encode", "vqgan=vqgan", *arguments)
    assert result.code == 0, result.stderr
    result = call(
        "clipgen-train", *TRANSFORMER, "data=cached", "data.root=cache", "data.conditioning=class", "output=run"
    )
    assert result.code == 0, result.stderr
    return tmp_path / "run"


def test_training_by_the_command(call, run):
    assert {"vqgan", "clip.json", "label_transformer", "checkpoints"} <= {path.name for path in run.iterdir()}
    model = ClassConditionalGenerator.load(run)
    assert model.class_names == [str(attributes) for attributes in ALL_ATTRIBUTES]
    assert model.transformer.h.condition_cosine == 1  # the recipe's noise bridges images and sentences
    images = model.draw(torch.tensor([0, 287]), seed=1)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images[1:], model.draw(torch.tensor([287]), seed=2))
    for path in (run / "checkpoints" / "last.ckpt", run / "label_transformer"):
        assert ClassConditionalGenerator.load(path).transformer.clip_dim == 288
    result = call(
        "clipgen-train",
        *TRANSFORMER,
        "data=cached",
        "data.root=cache",
        "data.conditioning=class",
        "output=on",
        "resume=run",
        "trainer.max_steps=6",
    )
    assert result.code == 0 and ClassConditionalGenerator.load("on").class_names == model.class_names, result.stderr


def test_a_run_of_classes_is_no_text_model(call, run):
    needed = "but a ConditionalTransformer is needed"
    for path in (run, run / "label_transformer", run / "checkpoints" / "last.ckpt"):
        with pytest.raises(ValueError, match=f"is a ClassConditionalTransformer checkpoint .*, {needed}"):
            TextToImage.load(path)
    result = call("clipgen-sample", "--checkpoint", "run", "--prompt", "x")
    assert result.code == 1 and needed in result.stderr and result.stderr.count("\n") == 1
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match="it holds a ClassConditionalTransformer"):
        TextToImage.load(run)


def test_a_text_model_is_no_run_of_classes(pipe, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no ClassConditionalTransformer checkpoint: .*; it holds a ConditionalTransformer"
    ):
        ClassConditionalGenerator.load(pipe.save(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.clip_loss.weight=0.2", "clip_loss_weight must be 0 with data.conditioning=class, got 0.2"),
        ("model.clip_dim=7", "clip_dim must be 288"),
        ("model.n_layer=x", "model.n_layer must be int, got 'x'"),
        ("data.conditioning=text", "condition must be 'clip' or 'label', got 'text'"),
    ],
)
def test_refusals_of_training(call, run, argument, message):
    arguments = ["data=cached", "data.root=cache", "data.conditioning=class", argument, "output=other"]
    result = call("clipgen-train", *TRANSFORMER, *arguments)
    assert result.code == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not Path("other").exists()


# ---------------------------------------------------------------------------------------------- generators of others


class Plain(nn.Module):
    """A picture of one grey, by its class; scripted in the tests."""

    def forward(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        grey = class_indices.to(noise.dtype) / 4 - 1 + 0.0 * noise.sum(dim=1)
        return grey[:, None, None, None].expand(-1, 3, 8, 8)


def test_torchscript(tmp_path):
    path = str(tmp_path / "plain.pt")
    torch.jit.save(torch.jit.script(Plain()), path)
    generator = load_generator(path, noise_dim=2, class_names=NAMES)
    images = generator(torch.randn(3, 2), torch.tensor([0, 1, 2]))
    assert images.shape == (3, 3, 8, 8) and images[:, 0, 0, 0].tolist() == [-1, -0.75, -0.5]
    assert (generator.noise_dim, generator.class_names, generator.device.type) == (2, NAMES, "cpu")
    with pytest.raises(ValueError, match=r"plain.pt does not tell its noise_dim and class_names: they must be given"):
        load_generator(path)
    with pytest.raises(ValueError, match=r"plain.pt failed on noise \(3, 2\) and class_indices \(4,\): "):
        generator(torch.randn(3, 2), torch.zeros(4, dtype=torch.int64))
    Path(path).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"plain.pt is no TorchScript file"):
        load_generator(path, 2, NAMES)
    with pytest.raises(FileNotFoundError, match=r"no TorchScript file .*other.pt"):
        load_generator(str(tmp_path / "other.pt"), 2, NAMES)


def test_functions_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_gan.py").write_text(
        "import torch\ndef draw(noise, class_indices):\n    return torch.zeros(len(noise), 3, 4, 4)\n"
        "draw.noise_dim, draw.class_names = 7, ['a', 'b']\nnumber = 3\n"
    )
    generator = load_generator("my_gan:draw")
    assert (generator.noise_dim, generator.class_names) == (7, ["a", "b"])
    assert load_generator("my_gan:draw", class_names=["c"]).class_names == ["c"]  # what is given comes first
    for source, message in (
        ("my_gan:number", "must be callable, got a int"),
        ("my_gan:none", "my_gan:none cannot be imported"),
        ("no_such_gan:draw", "no_such_gan:draw cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            load_generator(source)
    with pytest.raises(FileNotFoundError, match=r"generator must be a run folder, .* got my_gan, which does not exist"):
        load_generator("my_gan")
    with pytest.raises(ValueError, match="top_k must be left to our own models, got my_gan:draw"):
        load_generator("my_gan:draw", top_k=3)


def test_biggan(tmp_path):
    """A small one with random weights, as the package itself saves and builds it."""
    package = pytest.importorskip("pytorch_pretrained_biggan", reason="needs pip install 'clipgen[biggan]'")
    config = package.BigGANConfig(
        z_dim=16,
        class_embed_dim=16,
        channel_width=8,
        num_classes=10,
        output_dim=64,
        layers=[(True, 16, 8), (True, 8, 4), (True, 4, 2), (True, 2, 1)],
        attention_layer_position=2,
    )
    model = package.BigGAN(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for _ in range(3):  # in training mode: spectral norms are found step by step
        model(torch.randn(4, 16), torch.eye(10)[:4], 1.0)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(config.to_json_string())
    generator = load_generator(f"biggan:{tmp_path}", class_names=[str(i) for i in range(10)])
    noise, classes = torch.randn(3, 16), torch.tensor([1, 9, 1])
    with torch.no_grad():
        expected = model.eval()(noise, torch.eye(10)[classes], 1.0)
    assert generator.noise_dim == 16 and expected.shape == (3, 3, 64, 64) and expected.std() > 0.01
    torch.testing.assert_close(generator(noise, classes), expected)
    with pytest.raises(ValueError, match="does not tell its class_names"):  # it is none of the thousand classes
        load_generator(f"biggan:{tmp_path}")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(
        ValueError, match=r"the weights of BigGAN .* cannot be loaded; with its config.json and pytorch_mod"
    ):
        load_generator(f"biggan:{tmp_path}")


def test_biggan_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_pretrained_biggan", None)
    with pytest.raises(ImportError, match=r"BigGAN needs pip install 'clipgen\[biggan\]'"):
        load_generator("biggan-deep-256")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4), r"must return images \(2, 3, H, W\), got \(2, 3, 4\)"),
        (torch.zeros(2, 1, 4, 4), r"must return images \(2, 3, H, W\), got \(2, 1, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"must return images \(2, 3, H, W\), got \(1, 3, 4, 4\)"),
        ([1, 2], r"must return images \(2, 3, H, W\), got list"),
        (torch.full((2, 3, 4, 4), math.nan), r"must return images in \[-1, 1\], got NaN or infinite pixels"),
        (torch.full((2, 3, 4, 4), 255.0), r"must return images in \[-1, 1\], got pixels from 255 to 255"),
    ],
)
def test_what_is_no_image(images, message):
    with pytest.raises(ValueError, match="mine " + message):
        ExternalGenerator(lambda noise, classes: images, "mine", 4, NAMES)(
            torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
        )


def test_rounding_is_clamped():
    images = ExternalGenerator(lambda noise, classes: torch.full((1, 3, 2, 2), 1.01), "mine", 4, NAMES)(
        torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    )
    assert torch.equal(images, torch.ones(1, 3, 2, 2))


def test_the_classes_of_imagenet():
    names = generators.names_of("imagenet")
    assert len(names) == 1000 and names[0] == "tench" and names[207].lower() == "golden retriever"


# ------------------------------------------------------------------------------------------------------------- search


class ToyCLIP:
    """Sentences and images in the plane: a sentence is an angle in degrees, an image has it in its first pixel."""

    device = torch.device("cpu")

    def encode_text(self, texts):
        return self.at(torch.tensor([float(text.split()[-1]) for text in texts]))

    def encode_image(self, images):
        return self.at(images[:, 0, 0, 0] * 180)

    def at(self, degrees):
        return torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)


class ToyGAN:
    """Class i draws the angle 10 i, and up to some degrees more by the noise."""

    noise_dim, device, class_names = 3, torch.device("cpu"), [str(10 * i) for i in range(12)]

    def __call__(self, noise, class_indices):
        degrees = 10 * class_indices + noise.sum(dim=1).tanh()
        return (degrees / 180)[:, None, None, None].expand(-1, 3, 2, 2)


def test_the_classes_nearest_to_a_prompt():
    labels = search.encode_labels(ToyCLIP(), ToyGAN.class_names)
    assert labels.shape == (12, 2)
    prompt = ToyCLIP().encode_text(["52"])[0]
    assert search.top_labels(labels, prompt, 4).tolist() == [5, 6, 4, 7]
    for k in (0, 13):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 12\], the number of classes, got {k}"):
            search.top_labels(labels, prompt, k)


def test_templates(shapes_clip, caplog):
    name = "a small red star on a black background"
    labels = search.encode_labels(shapes_clip, [name])
    assert torch.equal(labels, shapes_clip.encode_text([name])) and not caplog.records  # no word but those it knows
    other = search.encode_labels(shapes_clip, ["red star"], "a small {label} on a black background")
    assert torch.equal(labels, other)
    with pytest.raises(ValueError, match=r"template must hold \{label\}, got 'a star'"):
        search.encode_labels(shapes_clip, [name], "a star")
    asked = []
    clip = ToyCLIP()
    clip.encode_text = lambda texts: asked.extend(texts) or torch.zeros(len(texts), 2)
    search.encode_labels(clip, ["dog", "cat {x}"])
    assert asked == ["An image of dog", "An image of cat {x}"]  # the paper's


def test_the_best_answer_is_found():
    """The class of 50 degrees with a noise of about tanh^-1(0.6) is the answer to 50.6."""
    found = search.search(ToyGAN(), ToyCLIP(), "50.6", k=3, num_images=200, seed=1, keep=True)
    assert found.class_index == 5 and found.image[0, 0, 0] * 180 == pytest.approx(50.6, abs=0.1)
    degrees = found.images[:, 0, 0, 0] * 180
    assert found.score == pytest.approx(math.cos(math.radians((degrees - 50.6).abs().min())), abs=1e-6)
    assert set((degrees / 10).round().int().tolist()) == {4, 5, 6}  # drawn from the top 3 alone
    counts = (degrees / 10).round().int().bincount()[4:]
    assert counts.min() > 40  # uniformly
    scores = ToyCLIP().encode_image(found.images) @ ToyCLIP().encode_text(["50.6"])[0]
    assert all(found.curve[b] == scores[: b + 1].max() for b in range(200))  # the running best
    assert (found.curve.diff() >= 0).all() and found.curve[-1] == found.score


def test_all_classes_are_plain_random_search():
    """Classes and noise are then drawn without CLIP having a say in it."""
    found = search.search(ToyGAN(), ToyCLIP(), "50.6", k=12, num_images=100, seed=2, keep=True)
    noise, classes = search.draws(3, torch.arange(12), 100, "2 50.6")
    assert torch.equal(found.images, ToyGAN()(noise, classes)) and len(classes.unique()) == 12
    assert noise.mean().abs() < 0.2 and noise.std() == pytest.approx(1, abs=0.15)


def test_a_search_is_a_function_of_its_seed():
    def run(seed=1, batch=32, count=50, prompt="50.6"):
        return search.search(ToyGAN(), ToyCLIP(), prompt, 5, count, seed, batch_size=batch, keep=True)

    first = run()
    for other in (run(batch=1), run(batch=7), run(batch=500)):
        assert torch.equal(other.images, first.images) and torch.equal(other.curve, first.curve)
        assert torch.equal(other.image, first.image) and other[1:3] == first[1:3]
    assert torch.equal(run(count=20).curve, first.curve[:20])  # a longer search begins like a shorter one
    assert not torch.equal(run(seed=2).images, first.images)
    assert not set(run(seed=2).images.flatten().tolist()) & set(first.images.flatten().tolist())  # seeds share nothing
    assert run()[4] is not None and search.search(ToyGAN(), ToyCLIP(), "5", 5, 3).images is None


def test_images_needed():
    curve = torch.tensor([0.1, 0.3, 0.3, 0.4])
    assert [search.images_needed(curve, t) for t in (0.0, 0.1, 0.3, 0.4)] == [1, 2, 4, None]


def test_the_tables(shapes_clip):
    """Against single searches; standard deviations as the paper takes them (its Appendix A, SAGAN, k = 1)."""
    seen = []
    prompts = ["11", "52", "87"]
    rows = search.search_table(
        ToyGAN(), ToyCLIP(), prompts, 0.99995, num_images=30, seeds=(1, 2), watch=lambda *call: seen.append(call[:3])
    )
    assert [row.k for row in rows] == [1, 10, 12]  # capped by the classes at hand
    assert seen == [(k, seed, j) for k in (1, 10, 12) for seed in (1, 2) for j in range(3)]
    curves = [torch.stack([search.search(ToyGAN(), ToyCLIP(), p, 10, 30, s).curve for p in prompts]) for s in (1, 2)]
    assert rows[1].best == pytest.approx([c[:, -1].mean().item() for c in curves], abs=1e-6)
    assert rows[1].needed == [search.images_needed(c.double().mean(0), 0.99995) for c in curves]
    torch.testing.assert_close(rows[1].curve, torch.stack(curves).double().mean(dim=(0, 1)))
    paper = search.Row(1, [0.298575, 0.298602, 0.298783], [13, None, 14], torch.zeros(1))
    assert paper.best_mean_std == pytest.approx((0.298653, 1.131e-4), abs=1e-6) and paper.needed_mean_std is None
    assert search.Row(1, [0.3], [13, 14, 14], torch.zeros(1)).needed_mean_std == pytest.approx((13.67, 0.58), abs=0.005)
    assert search.Row(1, [0.3], [8], torch.zeros(1)).best_mean_std == (pytest.approx(0.3), 0.0)


def test_the_score_of_real_images(shapes_clip, images):
    texts = ["a small red star on a black background"] * 8
    expected = sum(
        float(shapes_clip.encode_image(images[i : i + 1])[0] @ shapes_clip.encode_text(texts[:1])[0]) for i in range(8)
    )
    assert search.real_score(shapes_clip, images, texts) == pytest.approx(expected / 8, abs=1e-6)


@pytest.mark.slow
def test_searching_shapes(shapes_clip):
    """A perfect generator of squares of each colour: the colour of the prompt is found, by its name alone."""
    colours = rgb(list(COLORS.values()))

    def draw(noise, class_indices):
        pictures = torch.ones(len(noise), 3, 32, 32)
        pictures[:, :, 8:24, 8:24] = colours[class_indices][:, :, None, None]
        return pictures

    names = [f"a large {colour} square on a white background" for colour in COLORS]
    for i, name in enumerate(names):
        found = search.search(ExternalGenerator(draw, "squares", 1, names), shapes_clip, name, k=2, num_images=8)
        assert found.class_index == i


# --------------------------------------------------------------------------------------------------------- VQGAN-CLIP


def test_the_distance_is_the_angle():
    angles = torch.tensor([0.0, 0.5, 1.5, 3.0])
    a = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    b = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    torch.testing.assert_close(vqgan_clip.great_circle(a, b), angles**2 / 2, atol=1e-4, rtol=1e-4)
    vqgan_clip.great_circle(a, b).sum().backward()
    assert b.grad.isfinite().all()


def generators_of(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_augmentations(images):
    """Crops are parts of the picture: of a ramp they show its slope, less steep, half of them mirrored."""
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    crops = vqgan_clip.augment(ramp, generators_of(0), 64, 0.5, 0.0)
    assert crops.shape == (64, 3, 32, 32) and crops.abs().max() <= 1
    slopes = crops[:, 0, 16, 20] - crops[:, 0, 16, 12]
    whole = 8 * 2 / 31
    assert (slopes.abs() <= whole + 1e-4).all() and (slopes.abs() >= whole / 2 - 1e-4).all()
    assert 16 <= (slopes < 0).sum() <= 48
    flat = vqgan_clip.augment(torch.zeros(1, 3, 32, 32), generators_of(0), 64, 0.5, 0.1)
    assert flat.mean().abs() < 0.01 and flat.std(dim=(1, 2, 3)).min() > 0 and flat.std(dim=(1, 2, 3)).max() < 0.11
    same = vqgan_clip.augment(images[:2], generators_of(3, 4), 1, 1.0, 0.0)
    for picture, crop in zip(images, same):
        assert torch.allclose(picture, crop, atol=1e-5) or torch.allclose(picture.flip(-1), crop, atol=1e-5)
    first = vqgan_clip.augment(images[:3], generators_of(3, 4, 5), 4, 0.5, 0.1)
    alone = vqgan_clip.augment(images[1:2], generators_of(4), 4, 0.5, 0.1)
    torch.testing.assert_close(first[4:8], alone)  # by its own generator


def test_latents_are_codes_and_gradients_pass(tiny_vqgan):
    latents = vqgan_clip.Latents(tiny_vqgan, generators_of(1, 2), 4)
    codes = tiny_vqgan.codebook.detach()
    assert latents.z.shape == (2, 8, 4, 4)
    nearest = (latents.z.detach().permute(0, 2, 3, 1).reshape(-1, 1, 8) - codes).norm(dim=2)
    assert nearest.min(dim=1).values.max() == 0
    indices = nearest.argmin(dim=1).view(2, 4, 4)
    torch.testing.assert_close(latents.images(), tiny_vqgan.decode(indices))
    with torch.no_grad():
        latents.z += 0.05 * torch.randn(latents.z.shape)  # a little aside: the same codes
    images = latents.images()
    torch.testing.assert_close(images, tiny_vqgan.decode(indices))
    z_q = tiny_vqgan.active_model.quantize.indices_to_codes(indices).detach().requires_grad_()
    (expected,) = torch.autograd.grad(tiny_vqgan.decode_latents(z_q).square().sum(), z_q)
    found = torch.autograd.grad(images.square().sum(), latents.z)[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def shapes() -> TextToImage:
    return TextToImage.load("shapes")


@torch.no_grad()
def cosines(pipe, images, targets) -> Tensor:
    return (pipe.clip.encode_image(images) * targets).sum(dim=1)


def test_clip_likes_the_picture_better(shapes):
    targets = shapes.embed("a large blue ring on a white background").repeat(2, 1)
    start, end = (
        vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets, steps=steps, cutouts=8, seed=0, batch_size=2)
        for steps in (0, 40)
    )
    assert start.shape == end.shape == (2, 3, 32, 32) and end.abs().max() <= 1
    assert (cosines(shapes, end, targets) > cosines(shapes, start, targets) + 0.3).all()
    assert all(parameter.grad is None for parameter in shapes.vqgan.parameters())


def test_rows_are_on_their_own(shapes):
    """The same picture alone, among others, and again; another one from another seed."""
    targets = shapes.clip.encode_text(
        ["a large blue ring on a white background", "a small red star on a black background"]
    )
    options = dict(steps=5, cutouts=4, image_size=16)
    both = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets, seed=[7, 3], **options)
    alone = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets[1:], seed=3, **options)
    assert both.shape == (2, 3, 16, 16) and torch.equal(both[1:], alone)
    other = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets[1:], seed=4, **options)
    assert not torch.equal(other, alone)
    together = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets, seed=[7, 3], batch_size=2, **options)
    assert (together - both).abs().mean() < 0.02  # rounding apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"cutouts": 0}, "cutouts must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"smallest_cut": 1.5}, r"smallest_cut must be in \(0, 1\], got 1.5"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"image_size": 30}, "image_size must be divisible by 4, got 30"),
    ],
)
def test_refusals_of_vqgan_clip(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, torch.zeros(1, 64), **options)
    with pytest.raises(ValueError, match=r"clip_embedding must be \(B, 64\), got \(1, 3\)"):
        vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, torch.zeros(1, 3))


# ------------------------------------------------------------------------------------------------------------ command


def test_command_vqgan_clip(call, tmp_path):
    prompt = "a large blue ring on a white background"
    result = call(
        "clipgen-baseline",
        "vqgan-clip",
        "--prompt",
        prompt,
        "--steps",
        2,
        "--cutouts",
        2,
        "--num-images",
        2,
        "--seed",
        4,
        "--device",
        "cpu",
    )
    assert result.code == 0 and "CLIP score" in result.stdout, result.stderr
    name = "00_a-large-blue-ring-on-a-white-background_{}.png"
    assert {path.name for path in (tmp_path / "baseline").iterdir()} == {name.format(4), name.format(5), "grid.png"}
    picture = Image.open(tmp_path / "baseline" / name.format(5))
    picture.load()
    assert picture.text["prompt"] == prompt and picture.text["baseline"] == "vqgan-clip" and picture.text["seed"] == "5"
    assert -1 <= float(picture.text["clip_score"]) <= 1 and picture.text["steps"] == "2"


def test_command_label_and_search(call, run):
    name = str(ALL_ATTRIBUTES[3])
    result = call(
        "clipgen-baseline",
        "label",
        "--checkpoint",
        "run",
        "--label",
        name,
        "--label",
        7,
        "--num-images",
        2,
        "--output",
        "labels",
        "--device",
        "cpu",
        "--guidance-power",
        1,
    )
    assert result.code == 0 and len(list(Path("labels").glob("0*.png"))) == 4, result.stderr
    told = Image.open(next(Path("labels").glob("0*.png")))
    told.load()
    assert told.text["guidance_power"] == "1.0" and told.text["top_k"] == "300"
    options = [
        "--generator",
        "run",
        "--prompt",
        name,
        "--prompt",
        "a small red star on a black background",
        "--num-images",
        5,
        "--device",
        "cpu",
    ]
    result = call("clipgen-baseline", "search", *options, "--k", 3, "--output", "found", "--keep-all")
    assert result.code == 0 and len(list(Path("found").glob("0*.png"))) == 2, result.stderr
    assert len(list(Path("found/all").rglob("*.png"))) == 10
    picture = Image.open(next(Path("found").glob("01_*.png")))
    picture.load()
    curve = json.loads(picture.text["curve"])
    assert len(curve) == 5 and curve[-1] == pytest.approx(float(picture.text["clip_score"]))

    result = call("clipgen-baseline", "search", *options, "--table", "--seeds", 1, 2, "--threshold", 2, "--output", "t")
    assert result.code == 0 and "> 5" in result.stdout, result.stderr
    report = json.loads(Path("t/search.json").read_text())
    assert [row["k"] for row in report["rows"]] == [1, 10, 20, 50, 100, 288]
    assert all(len(row["best"]) == 2 and row["needed"] == [None, None] for row in report["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqgan-clip"], "there must be something to draw: give --prompt or --prompts-file"),
        (["vqgan-clip", "--prompt", " "], "prompt must not be empty"),
        (["vqgan-clip", "--prompt", "x", "--steps", "-1"], "steps must be at least 0, got -1"),
        (["vqgan-clip", "--prompt", "x", "--num-images", "0"], "num_images must be at least 1, got 0"),
        (["vqgan-clip", "--prompt", "x", "--checkpoint", "none"], "no ConditionalTransformer checkpoint: none"),
        (["search", "--prompt", "x", "--generator", "none"], "generator must be a run folder"),
        (["search", "--prompt", "x", "--generator", "none.pt"], "no TorchScript file none.pt"),
        (
            ["label", "--label", "x", "--checkpoint", "none"],
            "no ClassConditionalTransformer checkpoint: none does not exist",
        ),
    ],
)
def test_refusals_of_the_command(call, tmp_path, arguments, message):
    result = call("clipgen-baseline", *arguments)
    assert result.code == 1 and result.stderr.startswith(f"clipgen-baseline: error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1 and everything(tmp_path) == set()
