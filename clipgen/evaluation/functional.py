"""Metrics of sets of images as functions of their features; computed by torch-fidelity if it needs bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

KID_SUBSET = 1000  # images per subset of KID; torch-fidelity takes 100 subsets
NEIGHBORS = 3  # nearest neighbors of precision and recall
IS_SPLITS = 10  # splits of the Inception score
BLOCK_SIZE = 1000  # images per side whose distances are held in memory at a time
Moments = tuple[np.ndarray, np.ndarray]  # mean (F,), covariance (F, F)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Frechet distance (FID, arXiv:1706.08500): ||m - m'||^2 + tr(C + C' - 2 (C C')^(1/2)).

    The trace of the root is the sum of the square roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric.
    This is more stable than the root of a general matrix, and ten times faster for 2048 features.
    """
    mean_a, cov_a = a
    mean_b, cov_b = b
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum()
    return max(float(distance), 0.0)


def kernel_distance(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the kernel distance (KID, arXiv:1801.01401) of features (N, F), (M, F): mean and deviation over subsets.

    The estimate is unbiased and can be negative. A side of at most 1000 images is used completely in every subset, as
    in clean-fid: the deviation then reflects the other side only, and is 0 if both are used completely.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET, len(generated), len(reference))
    results = kid_features_to_metric(generated, reference, kid_subset_size=size, verbose=False)
    return results["kernel_inception_distance_mean"], results["kernel_inception_distance_std"]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Return the Inception score (IS, arXiv:1606.03498) of logits (N, C): mean and standard deviation over 10 splits.

    The splits are torch-fidelity's, but evaluated one at a time, so that the logits may be memory-mapped.

    Raises:
        ValueError: a split would be a single image, whose score is always 1.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < 2 * IS_SPLITS:
        raise ValueError(f"an Inception score needs at least {2 * IS_SPLITS} images, got {len(logits)}")
    order = np.random.RandomState(2020).permutation(len(logits))
    edges = [len(logits) * i // IS_SPLITS for i in range(IS_SPLITS + 1)]
    scores = []
    for start, stop in itertools.pairwise(edges):
        split = logits[order[start:stop]]
        scores.append(isc_features_to_metric(split, splits=1, shuffle=False)["inception_score_mean"])
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return improved precision and recall (arXiv:1904.06991) of features (N, F), (M, F), with 3 neighbors.

    The values equal torch-fidelity's, which keeps all distances of a block of images in memory.

    Raises:
        ValueError: a set has no more images than neighbors.
    """
    smaller = min(len(generated), len(reference))
    if smaller <= NEIGHBORS:
        raise ValueError(f"precision and recall need more than {NEIGHBORS} images on either side, got {smaller}")
    return _covered_fraction(generated, reference), _covered_fraction(reference, generated)


def _covered_fraction(points: Tensor, centers: Tensor) -> float:
    """Return the fraction of points inside a ball around a center that reaches to the center's third neighbor."""
    radii = _neighbor_radii(centers)
    covered = []
    for point_block in points.split(BLOCK_SIZE):
        inside = torch.zeros(len(point_block), dtype=torch.bool)
        for center_block, radius_block in zip(centers.split(BLOCK_SIZE), radii.split(BLOCK_SIZE)):
            inside |= (torch.cdist(point_block, center_block) <= radius_block).any(dim=1)
        covered.append(inside)
    return torch.cat(covered).double().mean().item()


def _neighbor_radii(centers: Tensor) -> Tensor:
    """Return the distance (M,) from each center to its third neighbor."""
    radii = []
    for block in centers.split(BLOCK_SIZE):
        # One more than the neighbors, because the nearest of all is the center itself.
        nearest = block.new_full((len(block), NEIGHBORS + 1), torch.inf)
        for others in centers.split(BLOCK_SIZE):
            candidates = torch.cat([nearest, torch.cdist(block, others)], dim=1)
            nearest = candidates.topk(NEIGHBORS + 1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def caption_score(log_probabilities: Tensor) -> float:
    """Return CogView's CapS (arXiv:2105.13290): the geometric mean of the probabilities of a caption's tokens (L,).

    Raises:
        ValueError: the caption has no token.
    """
    if not len(log_probabilities):
        raise ValueError("CapS needs a caption with a token, got none")
    return math.exp(log_probabilities.double().mean().item())


def moments(parts: Iterable[np.ndarray]) -> Moments:
    """Return mean and unbiased covariance, in float64 and constant memory, of features in parts (n, F).

    Raises:
        ValueError: there are fewer than two rows.
    """
    nonempty: Iterator[np.ndarray] = filter(len, iter(parts))
    first = next(nonempty, None)
    if first is None:
        raise ValueError("a Frechet distance needs at least two images on either side, got 0")
    # Features are centered near zero before they are multiplied, or large means would cancel the digits.
    shift = first.mean(axis=0, dtype=np.float64)
    count = 0
    total = np.zeros(first.shape[1])
    outer = np.zeros((first.shape[1], first.shape[1]))
    for part in itertools.chain([first], nonempty):
        centered = part - shift
        count += len(part)
        total += centered.sum(axis=0)
        outer += centered.T @ centered
    if count < 2:
        raise ValueError(f"a Frechet distance needs at least two images on either side, got {count}")
    covariance = (outer - np.outer(total, total) / count) / (count - 1)
    return shift + total / count, covariance
