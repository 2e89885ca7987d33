"""Metrics of reconstructions, against values by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from torch.utils.data import DataLoader

from clipgen.data.shapes import ShapesDataset
from clipgen.evaluation.features import Features, feature_extractor
from clipgen.evaluation.reconstruction import ReconstructionMetrics
from clipgen.images import from_pil, to_pil


def four_numbers(images: torch.Tensor) -> torch.Tensor:
    """A feature space that a test can follow: means of four quarters."""
    return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


def validate(vqgan, callback: pl.Callback, count: int = 24, batch: int = 8) -> dict[str, float]:
    trainer = pl.Trainer(accelerator="cpu", callbacks=[callback], **QUIET)
    (results,) = trainer.validate(vqgan, DataLoader(ShapesDataset(count, seed=9), batch), verbose=False)
    return results


@torch.no_grad()
def test_ssim_rfid_and_psnr_match_their_formulas(tiny_vqgan):
    images = ShapesDataset(24, seed=9).render(range(24))
    decoded = to_pil(tiny_vqgan(images))  # as they would be saved
    reconstruction = torch.cat([from_pil(image) for image in decoded])
    results = validate(tiny_vqgan, ReconstructionMetrics(fid_features=f"{__name__}:four_numbers"))
    # Frechet distance by numpy: ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)
    a, b = (four_numbers(x).double().numpy() for x in (images, reconstruction))
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert results["val/rfid"] == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    # SSIM by its formula, with the Gaussian window of the paper (11 pixels, sigma 1.5)
    g = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / (g.sum() ** 2)).expand(3, 1, 11, 11).double()
    blur = lambda x: torch.nn.functional.conv2d(x, window, groups=3)
    x, y = ((v.double() + 1) / 2 for v in (images, reconstruction))
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    ssim = ((2 * mx * my + 1e-4) * (2 * vxy + 9e-4)) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert results["val/ssim"] == pytest.approx(ssim.mean().item(), abs=0.02)  # torchmetrics pads the border
    squared = ((x - y) ** 2).mean(dim=(1, 2, 3))
    assert results["val/psnr"] == pytest.approx((-10 * squared.log10()).mean().item(), abs=1e-5)


def test_results_do_not_depend_on_batches_or_earlier_validations(tiny_vqgan):
    metrics = ReconstructionMetrics(fid_features=f"{__name__}:four_numbers")
    first = validate(tiny_vqgan, metrics, batch=8)
    assert validate(tiny_vqgan, metrics, batch=6) == pytest.approx(first, rel=1e-3)


def test_distance_of_a_single_image_is_omitted(tiny_vqgan, caplog):
    results = validate(tiny_vqgan, ReconstructionMetrics(fid_features=f"{__name__}:four_numbers"), count=1)
    assert "val/rfid" not in results and math.isfinite(results["val/ssim"])
    assert "rFID omitted: at least 2 images are needed" in caplog.text


def test_dead_codes_usage_and_perplexity_are_consistent(tiny_vqgan):
    results = validate(tiny_vqgan, ReconstructionMetrics(ssim=False))
    assert results["val/dead_codes"] == 16 - round(16 * results["val/codebook_usage"])
    assert 1 <= results["val/perplexity"] <= 16 - results["val/dead_codes"]
    assert "val/ssim" not in results and "val/rfid" not in results


def test_clip_is_a_feature_space(images, shapes_clip):
    features = feature_extractor("clip:shapes")
    assert features.num_features == shapes_clip.embed_dim
    assert torch.equal(features(images), shapes_clip.encode_image(images))


@pytest.mark.parametrize("name", ["vgg", "clip:", "no_such_module:f", f"{__name__}:no_such_function"])
def test_unknown_feature_names_are_refused(name):
    with pytest.raises(ValueError, match=r"features .*(must be|cannot be loaded)"):
        feature_extractor(name)


def test_features_of_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"features must be \(2, F\)"):
        Features(lambda images: images)


def test_missing_inception_weights_say_what_to_do(monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", broken)
    with pytest.raises(ValueError, match=r"\(no network\): pip install .*inception:FILE"):
        feature_extractor("inception")


def test_identical_images_have_distance_zero():
    metrics = ReconstructionMetrics(fid_features=f"{__name__}:four_numbers")
    images = ShapesDataset(16, seed=1).render(range(16))
    metrics.update(images, images)
    results = {name: metric.compute().item() for name, metric in metrics.metrics.items()}
    assert results["ssim"] == pytest.approx(1, abs=1e-4) and results["rfid"] == pytest.approx(0, abs=1e-3)
    assert math.isfinite(results["rfid"])
