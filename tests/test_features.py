"""Feature spaces: torch-fidelity's Inception, classifiers, CLIP, functions of users."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipgen.evaluation.features import Features, clean_resize, feature_extractor
from clipgen.evaluation.image_metrics import ImageMetrics

pytest.importorskip("torch_fidelity")


@pytest.mark.slow
def test_inception_from_a_file_matches_torch_fidelity(inception_file, images):
    """The network's features are torch-fidelity's; the resizes are two spaces; a crafted file runs nothing."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    plain, clean = (feature_extractor(f"{name}:{inception_file}") for name in ("inception", "inception-clean"))
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    for ours, theirs in zip(plain.features_and_logits(images), network(pixels)):
        assert torch.equal(ours, theirs)
    assert plain.identity != clean.identity and not torch.allclose(plain(images), clean(images), rtol=1e-3)
    large = F.interpolate(images, (299, 299))  # nothing to resize: both agree
    assert torch.allclose(plain(large), clean(large), atol=1e-5)
    bad = inception_file.with_name("bad.pth")
    torch.save({"x": pytest.raises}, bad)
    with pytest.raises(ValueError, match="need torch-fidelity and its weights"):
        feature_extractor(f"inception:{bad}")


def test_clean_resize_matches_pillow_on_floats(images):
    pixels = (images + 1) * 127.5
    ours = clean_resize(pixels, 61)
    for image, expected in zip(ours[:2], pixels[:2]):
        for channel, plane in zip(image, expected):
            resized = Image.fromarray(plane.numpy(), mode="F").resize((61, 61), Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(resized).clip(0, 255) - channel.numpy()).max() < 0.01


def test_classifier_features_are_the_input_of_the_last_layer(tmp_path, images):
    import timm
    from torchvision.models import resnet18

    network = resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    features, logits = feature_extractor(f"torchvision:resnet18:{tmp_path / 'resnet.pth'}").features_and_logits(images)
    assert features.shape == (8, 512) and torch.allclose(network.fc(features), logits, atol=1e-5)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "timm.pth")
    features, logits = feature_extractor(f"timm:resnet10t:{tmp_path / 'timm.pth'}").features_and_logits(images)
    assert features.shape == (8, 512) and logits.shape == (8, 1000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "features must be inception"),
        ("torchvision:nothing", "nothing"),
        ("timm:nothing", "cannot be"),
        ("os:nothing", "has no attribute"),
        ("math:sqrt", "features 'math:sqrt' cannot be loaded"),
        ("inception:/nowhere.pth", "need torch-fidelity and its weights"),
    ],
)
def test_unavailable_features_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        feature_extractor(name)


def test_images_are_moved_to_the_device_of_the_networks(images, shapes_clip):
    """Decoded images are on the CPU; a bound method moves with its network."""
    seen = []

    def features(images):
        seen.append((images.device.type, len(images)))
        return torch.zeros(len(images), 1)

    metrics = ImageMetrics(Features(features), [0], device="meta")
    for measure in (metrics, metrics.for_reference()):
        measure(images, [])
    assert seen[1:] == [("meta", 8)] * 2
    moved = Features(copy.deepcopy(shapes_clip).encode_image).to(torch.float64)
    assert moved.features_and_logits(images.double())[0].shape == (8, shapes_clip.embed_dim)
    assert {p.dtype for p in moved.parameters()} == {torch.float64}
