"""Metrics as functions of features: against torch-fidelity, scipy and values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipgen.evaluation import functional

pytest.importorskip("torch_fidelity")


def test_frechet_distance_matches_torch_fidelity_and_scipy():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20)), rng.normal(size=(400, 20)) + 0.5
    ours = functional.frechet_distance(functional.moments(np.array_split(a, 7)), functional.moments([b]))
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    both = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    assert ours == pytest.approx(fid_statistics_to_metric(*both, False)["frechet_inception_distance"], rel=1e-6)
    root = scipy_linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    by_scipy = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert ours == pytest.approx(by_scipy, rel=1e-6)


def test_frechet_distance_of_two_known_gaussians():
    """Diagonal covariances: sum (m - m')^2 + (s - s')^2."""
    a = np.array([1.0, 2.0]), np.diag([4.0, 9.0])
    b = np.array([0.0, 4.0]), np.diag([1.0, 25.0])
    assert functional.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 4)
    assert functional.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_moments_keep_their_precision_for_large_means():
    x = np.random.default_rng(0).normal(size=(100, 3)) + 1e6
    mean, covariance = functional.moments(np.array_split(x, 9))
    assert mean == pytest.approx(x.mean(0), rel=1e-12) and covariance == pytest.approx(np.cov(x.T), rel=1e-6)
    with pytest.raises(ValueError, match="at least two images on either side, got 1"):
        functional.moments([x[:1]])


def test_inception_score_by_hand():
    """Two classes, each image sure of one of them: exp(KL) = 2; all alike: 1."""
    sure = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(500, 1)
    mean, _ = functional.inception_score(sure)
    assert mean == pytest.approx(2, rel=1e-2)
    assert functional.inception_score(torch.zeros(100, 5))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        functional.inception_score(sure[:19])


def test_kernel_distance_by_its_formula():
    x, y = torch.randn(40, 6), torch.randn(40, 6) + 1
    k = lambda a, b: (a @ b.T / 6 + 1) ** 3
    off = lambda m: (m.sum() - m.trace()) / (40 * 39)
    expected = off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean()  # fewer than 1000: every subset is the whole
    mean, spread = functional.kernel_distance(x, y)
    assert mean == pytest.approx(expected.item(), rel=1e-4) and spread == pytest.approx(0, abs=1e-4)


def test_precision_and_recall_of_identical_and_collapsed_sets():
    x = torch.randn(50, 4)
    assert functional.precision_recall(x, x) == (1, 1)
    assert (
        functional.precision_recall(x[:25] * 0.01, x)[1] < functional.precision_recall(x[:25] * 0.01, x)[0]
    )  # one mode
    with pytest.raises(ValueError, match="more than 3 images on either side, got 3"):
        functional.precision_recall(x[:3], x)


@pytest.mark.parametrize("sizes", [(4, 5, 3), (700, 1003, 16), (2002, 1500, 64)])
def test_precision_and_recall_match_torch_fidelity(sizes):
    """The last of several blocks may hold fewer images than there are neighbors."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = torch.randn(sizes[0], sizes[2]), 1.1 * torch.randn(sizes[1], sizes[2]) + 0.1
    expected = prc_features_to_metric(a, b, save_cpu_ram=False, verbose=False)
    actual = functional.precision_recall(a, b)
    assert actual == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)


def test_caption_score_is_the_geometric_mean():
    assert functional.caption_score(torch.tensor([0.5, 0.125]).log()) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="a caption with a token, got none"):
        functional.caption_score(torch.empty(0))
