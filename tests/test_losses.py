"""Discriminator, adversarial losses, adaptive weight, LeCam and LPIPS, compared with values computed by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from models import VQGAN_SIZES, make_vqgan
from torch import nn
from torchvision.models import vgg

from clipgen.checkpoint.vgg import load_lpips
from clipgen.models import losses
from clipgen.models.discriminator import PatchDiscriminator

# ------------------------------------------------------------------------------------------------------- discriminator


def test_discriminator_logit_sees_70_pixels():
    net = PatchDiscriminator(channels=4, num_layers=3).eval()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = net(images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    visible = images.grad.abs().sum((0, 1)) > 0
    assert visible.any(0).sum() == 70 and visible.any(1).sum() == 70


def test_discriminator_width_doubles_up_to_eight_times():
    convs = [m for m in PatchDiscriminator(channels=4, num_layers=5).modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [4, 8, 16, 32, 32, 32, 1]
    with pytest.raises(ValueError, match=r"gan\.num_layers must be at least 1, got 0"):
        make_vqgan(gan_num_layers=0)


# ------------------------------------------------------------------------------------------------- adversarial losses

REAL, FAKE = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, -0.5, -3.0])


def test_hinge_loss_by_hand():
    # mean(0, 1, 2) = 1 and mean(2, 0.5, 0) = 2.5 / 3
    assert losses.discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx((1 + 2.5 / 3) / 2)
    assert losses.generator_loss(FAKE, "hinge").item() == pytest.approx(2.5 / 3)


def test_log_loss_by_hand():
    log_d = lambda x: math.log(1 / (1 + math.exp(-x)))
    real = -sum(log_d(x) for x in REAL.tolist()) / 3
    fake = -sum(log_d(-x) for x in FAKE.tolist()) / 3  # log(1 - D) = log D(-x)
    assert losses.discriminator_loss(REAL, FAKE, "log").item() == pytest.approx((real + fake) / 2)
    assert losses.generator_loss(FAKE, "log").item() == pytest.approx(-sum(log_d(x) for x in FAKE.tolist()) / 3)
    assert torch.isfinite(losses.discriminator_loss(REAL * 1e4, FAKE * 1e4, "log"))


def test_minimax_loss_is_equation_5_for_both_networks():
    """E[log D(I) + log(1 - D(I'))]: the discriminator maximizes it, the autoencoder minimizes its second term."""
    equation_5 = REAL.sigmoid().log().mean() + (1 - FAKE.sigmoid()).log().mean()
    assert losses.discriminator_loss(REAL, FAKE, "minimax").item() == pytest.approx(-equation_5.item())
    assert losses.generator_loss(FAKE, "minimax").item() == pytest.approx((1 - FAKE.sigmoid()).log().mean().item())


def test_reconstruction_loss_by_hand():
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0])
    assert losses.reconstruction_loss(a, b, "l1").item() == 1.5
    assert losses.reconstruction_loss(a, b, "l2").item() == 2.5


def test_unknown_losses_are_refused():
    with pytest.raises(ValueError, match=r"gan\.loss must be one of hinge, log, minimax, got 'wgan'"):
        losses.discriminator_loss(REAL, FAKE, "wgan")
    with pytest.raises(ValueError, match=r"gan\.loss must be one of hinge, log, minimax, got 'wgan'"):
        losses.generator_loss(FAKE, "wgan")
    with pytest.raises(ValueError, match="reconstruction must be 'l1' or 'l2', got 'l3'"):
        losses.reconstruction_loss(REAL, FAKE, "l3")


def test_adaptive_weight_by_hand():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction = layer * torch.tensor([3.0, 4.0])
    # Their norms at the layer are 5 and 0.5.
    recon_grad = torch.tensor([1.0, 1.0])
    adv_grad = torch.tensor([0.5 / 3, 0.0])
    weight = losses.adaptive_weight(reconstruction, layer, recon_grad, adv_grad)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4)) and not weight.requires_grad
    assert layer.grad is None
    reconstruction.sum().backward(retain_graph=True)  # the graph was retained
    assert losses.adaptive_weight(reconstruction, layer, 9e9 * recon_grad, 0 * adv_grad).item() == 1e4
    assert losses.adaptive_weight(reconstruction, layer, recon_grad, adv_grad, maximum=3.0).item() == 3


def test_lecam_by_hand():
    lecam = losses.LeCam(decay=0.9)
    real, fake = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -3.0])
    value = lecam(real, fake)  # the means move by a tenth of the way, to 0.3 and -0.2
    assert lecam.means.tolist() == pytest.approx([0.3, -0.2])
    expected = ((2.2**2 + 4.2**2) + (1.3**2 + 3.3**2)) / 2
    assert value.item() == pytest.approx(expected)
    assert lecam(torch.tensor([-9.0]), torch.tensor([9.0])).item() == 0  # a fooled discriminator is not regularized


# --------------------------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    """Write the convolutions of a VGG-16 with random weights in torchvision's format."""
    torch.manual_seed(1)
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def lpips(vgg_file) -> nn.Module:
    return load_lpips(str(vgg_file))


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Return the published linear layers of LPIPS, from torchmetrics' own file."""
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    return torch.load(folder / "vgg.pth", map_location="cpu", weights_only=True)


def test_lpips_matches_its_definition(lpips, vgg_file, published):
    """arXiv:1801.03924, Eq. 1: squared differences of normalized features, weighted, averaged over positions."""
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    state = torch.load(vgg_file, weights_only=True)
    features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items()})
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    x, y = ((i - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for i in (a, b))
    expected = torch.zeros(2)
    lin = 0
    with torch.no_grad():
        for number, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
                weights = published[f"lin{lin}.model.1.weight"].flatten()
                expected += torch.einsum("bchw,c->bhw", difference, weights).mean((1, 2))
                lin += 1
        distance = lpips(a, b)
    assert lin == 5 and distance.shape == (2, 1, 1, 1)
    torch.testing.assert_close(distance.flatten(), expected, atol=1e-5, rtol=1e-3)


def test_lpips_has_the_published_linear_layers(lpips, published):
    assert len(published) == 5
    for name, tensor in published.items():
        assert torch.equal(lpips.state_dict()[name], tensor) and tensor.min() >= 0


def test_lpips_of_equal_images_is_zero_with_finite_gradient(lpips):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    copy = image.clone().requires_grad_()
    distance = lpips(image, copy).sum()
    assert distance.item() == 0
    distance.backward()
    assert torch.isfinite(copy.grad).all()
    black = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    lpips(image, black).sum().backward()
    assert torch.isfinite(black.grad).all() and black.grad.abs().sum() > 0


def test_lpips_compiles_one_graph(lpips, images):
    lpips = copy.deepcopy(lpips)
    graphs = []
    lpips.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for distance in (lpips(images[:2], other) for other in (-images[:2], images[2:4], images[4:6])):
        assert distance.shape == (2, 1, 1, 1)
    assert len(graphs) == 1


def test_lpips_is_frozen_without_dropout(lpips, vgg_file, images, fit):
    assert not any(p.requires_grad for p in lpips.parameters())
    vqgan = make_vqgan(**VQGAN_SIZES | dict(vgg_weights=str(vgg_file), perceptual_weight=2.0))
    trainer = fit(vqgan, 1, batch=2)
    assert not any("lpips" in name or "vgg" in name for name in vqgan.state_dict())
    assert sum(p.numel() for p in vqgan.parameters()) < 1_000_000
    assert trainer.callback_metrics["train/perceptual_loss"] > 0
    vqgan.train()
    reconstruction, quantized = vqgan.autoencode(images[:2])
    terms = [vqgan.autoencoder_loss(images[:2], reconstruction, quantized) for _ in range(2)]
    assert torch.equal(terms[0]["perceptual_loss"], terms[1]["perceptual_loss"])
    by_hand = 2 * lpips(images[:2], reconstruction).mean()
    torch.testing.assert_close(terms[0]["perceptual_loss"], by_hand)


def test_clip_perceptual_loss_is_the_weighted_distance_and_frozen(shapes_clip, images, fit):
    vqgan = make_vqgan(**VQGAN_SIZES | dict(clip_perceptual_weight=2.0, clip_perceptual_model="shapes"))
    trainer = fit(vqgan, 1, batch=2)
    assert trainer.callback_metrics["train/clip_perceptual_loss"] > 0
    assert not any("clip" in name for name in [*vqgan.state_dict(), *dict(vqgan.named_parameters())])
    reconstruction, quantized = vqgan.eval().autoencode(images[:2])
    terms = vqgan.autoencoder_loss(images[:2], reconstruction, quantized)
    by_hand = 2 * shapes_clip.perceptual_distance(images[:2], reconstruction).mean()
    torch.testing.assert_close(terms["clip_perceptual_loss"], by_hand)


def test_clip_perceptual_loss_needs_a_clip():
    with pytest.raises(ValueError, match=r"loss\.clip_perceptual_model, a CLIP; got none"):
        make_vqgan(**VQGAN_SIZES | dict(clip_perceptual_weight=1.0))


@pytest.mark.parametrize("content", [None, b"", b"no weights", {"other": torch.zeros(1)}])
def test_error_for_missing_vgg_weights_names_the_remedies(tmp_path, content):
    path = tmp_path / "vgg16.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        load_lpips(str(path))
    for word in (str(path), "vgg16-397923af.pth", "model.loss.vgg_weights=", "model.loss.perceptual_weight=0"):
        assert word in str(error.value)
