"""BigGAN-CLIP: big-sleep's losses and its optimization."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from gan_states import biggan_state, deep_state, sagan_state

from clipgen.baselines.biggan import load_biggan
from clipgen.baselines.biggan_clip import (
    AveragedLatents,
    BigGANCLIPParams,
    biggan_clip,
    class_loss,
    class_weights,
    cut_views,
    latent_loss,
    similarity_loss,
)
from clipgen.cli import baseline
from clipgen.clip import FrozenCLIP

PARAMS = BigGANCLIPParams(steps=4, cutouts=4)


@pytest.fixture
def reference(shared) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the numbers of the public code, and its settings."""
    folder = shared / "parity/big_sleep"
    arrays = np.load(folder / "expected.npz")
    config = json.loads((folder / "config.json").read_text())
    return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}, config


@pytest.fixture
def generator(tmp_path):
    torch.save(deep_state(), tmp_path / "pytorch_model.bin")
    return load_biggan(tmp_path)


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return FrozenCLIP("shapes")


@pytest.mark.parametrize("suffix", ["", "_top"])
def test_losses_gradients_and_class_weights_equal_those_of_big_sleep(reference, suffix):
    expected, config = reference
    noise = expected[f"z{suffix}"].requires_grad_()
    logits = expected[f"class_logits{suffix}"].requires_grad_()
    weights = class_weights(logits, config["max_classes"] if suffix else None, config["class_temperature"])
    of_latents, of_classes = latent_loss(noise), class_loss(weights)
    similarity = similarity_loss(
        expected[f"cutout_embeddings{suffix}"],
        expected[f"prompt_embeddings{suffix}"],
        expected[f"penalised_embeddings{suffix}"],
    )
    gradients = torch.autograd.grad(of_latents + of_classes, [noise, logits])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(weights, expected[f"class_weights{suffix}"], **close)
    torch.testing.assert_close(of_latents, expected[f"latent_loss{suffix}"], **close)
    torch.testing.assert_close(of_classes, expected[f"class_loss{suffix}"], **close)
    torch.testing.assert_close(similarity, expected[f"similarity_loss{suffix}"], **close)
    torch.testing.assert_close(gradients[0], expected[f"z_gradient{suffix}"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], expected[f"class_logits_gradient{suffix}"], rtol=1e-4, atol=1e-6)


def test_average_equals_that_of_big_sleep(reference):
    expected, config = reference
    values = expected["ema_values"]
    average = AveragedLatents([values[0]], config["ema_decay"])
    averages = [average.values()[0]]
    for value in values[1:]:
        average.update([value])
        averages.append(average.values()[0])
    torch.testing.assert_close(torch.stack(averages), expected["ema_averages"], rtol=1e-5, atol=1e-5)


def test_image_with_a_condition_per_layer_equals_that_of_big_sleep(shared, reference):
    expected, _ = reference
    model = load_biggan(shared / "parity/biggan_deep_huggingface")
    weights = class_weights(expected["layers_class_logits"])
    error = (model.generate(expected["layers_z"][None], weights[None]) - expected["layers_image"]).abs()
    assert error.max() < 1e-3 and error.mean() < 1e-5


def test_image_follows_from_its_seed(generator, clip):
    target = clip.encode_text(["a red circle"])
    images = biggan_clip(generator, clip, target, num_images=2, seed=3, params=PARAMS)
    torch.manual_seed(99)
    assert torch.equal(biggan_clip(generator, clip, target, num_images=1, seed=4, params=PARAMS), images[1:])
    assert images.shape == (2, 3, 8, 8) and images.abs().max() <= 1 and not torch.equal(images[0], images[1])
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_optimization_reduces_the_loss_and_a_penalized_prompt_changes_it(generator, clip):
    target, other = clip.encode_text(["a red circle"]), clip.encode_text(["a blue star"])
    losses = []
    params = BigGANCLIPParams(steps=60, cutouts=8, max_classes=2)

    def callback(number, step, loss, image):
        losses.append(loss)

    image = biggan_clip(generator, clip, target, seed=1, params=params, callback=callback)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert not torch.equal(image, biggan_clip(generator, clip, target, other, seed=1, params=params))


def test_best_image_is_kept(generator, clip):
    """On the same path, so that it is one of the previews."""
    target = clip.encode_text(["a red circle"])
    previews = []
    params = BigGANCLIPParams(steps=6, cutouts=4, keep_best_every=2)

    def callback(number, step, loss, image):
        previews.append(image())

    best = biggan_clip(generator, clip, target, seed=1, params=params, callback=callback)
    assert any(torch.equal(best, preview) for preview in previews[1::2])


@pytest.mark.parametrize("center_bias", [False, True])
def test_views_are_squares_within_the_image(center_bias):
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    views = cut_views(image, 200, 16, torch.Generator().manual_seed(0), center_bias)
    assert views.shape == (200, 3, 16, 16)
    sides = ((views[:, 0, 0, -1] - views[:, 0, 0, 0]) + 1).long()
    assert sides.min() == 4 and sides.max() == 7  # half, and int(0.95 * 8)
    assert views[:, 0, 0, 0].min() == 0 and (center_bias or views.max() == 63)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutouts": 0}, "cutouts must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite, got inf"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1"),
        ({"max_classes": 6}, r"max_classes must be in \[1, 5\], got 6"),
    ],
)
def test_settings_out_of_range_are_refused(generator, clip, settings, message):
    with pytest.raises(ValueError, match=message):
        biggan_clip(generator, clip, clip.encode_text(["a red circle"]), params=BigGANCLIPParams(**settings))


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["clipgen-baseline", "biggan-clip", *map(str, arguments)])
    baseline.run()


def test_command_writes_images_a_preview_and_a_grid(monkeypatch, tmp_path, generator, capsys):
    options = ["--prompt", "a red circle", "--penalize", "a blue star", "--clip", "shapes", "--num-images", 2]
    options += ["--steps", 2, "--cutouts", 2, "--preview-every", 1, "--device", "cpu", "--output", tmp_path / "out"]
    run(monkeypatch, "--generator", f"biggan:{tmp_path}", *options)
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"grid.png", "preview.png"} <= names and len(names) == 4
    assert "step 4/4, loss" in capsys.readouterr().out
    torch.save(sagan_state(), tmp_path / "sagan.pth")
    with pytest.raises(ValueError, match=r"condition per layer, got sagan:.*, which has no generate, num_layers"):
        run(monkeypatch, "--generator", f"sagan:{tmp_path / 'sagan.pth'}", *options)
    with pytest.raises(ValueError, match=r"biggan:FILE_OR_FOLDER or module:object, got nothing"):
        run(monkeypatch, "--generator", "nothing", *options)


def test_biggan_takes_a_piece_of_noise_and_classes_per_layer(tmp_path):
    """With the same class in every layer the image is that of the class."""
    torch.save(biggan_state(), tmp_path / "G_ema.pth")
    model = load_biggan(tmp_path / "G_ema.pth")
    noise = torch.randn(2, model.noise_dim)
    pieces = noise.view(2, model.num_layers, model.layer_noise_dim)
    weights = torch.nn.functional.one_hot(torch.tensor([1, 3]), model.num_classes).float()
    layered = model.generate(pieces, weights[:, None].expand(-1, model.num_layers, -1))
    torch.testing.assert_close(layered, model(noise, torch.tensor([1, 3])))


def test_command_takes_any_generator_with_conditions_per_layer(monkeypatch, tmp_path):
    (tmp_path / "tiny_layers.py").write_text(
        "import torch\n\n"
        "class Tiny:\n"
        "    num_layers, layer_noise_dim, num_classes = 2, 12, 3\n\n"
        "    def generate(self, noise, class_weights, truncation=1.0):\n"
        "        return (noise.sum(1) * class_weights.sum()).tanh().view(-1, 3, 2, 2)\n\n"
        "tiny = Tiny()\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--prompt", "a red circle", "--clip", "shapes", "--steps", 2, "--cutouts", 2, "--device", "cpu"]
    run(monkeypatch, "--generator", "tiny_layers:tiny", *options, "--output", tmp_path / "out")
    assert (tmp_path / "out/grid.png").is_file()
