"""The papers' metrics of sets of images, as functions of features: torch-fidelity's where its memory has a bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

KID_SUBSET = 1000  # images in each of torch-fidelity's 100 subsets; all of them where there are fewer
NEIGHBOURS = 3  # of precision and recall
IS_SPLITS = 10  # of IS
BLOCK = 1000  # images on either side whose distances are held at a time
Moments = tuple[np.ndarray, np.ndarray]  # mean (F,), covariance (F, F)


def frechet_distance(a: Moments, b: Moments) -> float:
    """FID (arXiv:1706.08500): ||m - m'||^2 + tr(C + C' - 2 (C C')^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric: that is
    stabler, and on 2048 features ten times faster, than the general root.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product).sum()
    return max(float(distance), 0.0)


def kernel_distance(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """KID (arXiv:1801.01401) of features (N, F), (M, F): mean and standard deviation over 100 subsets.

    Unbiased, so that it may be below 0. With no more than 1000 images on a side that side is whole in every subset, as
    in clean-fid: the deviation then tells of the other side alone, and is 0 where both are whole.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET, len(generated), len(reference))
    found = kid_features_to_metric(generated, reference, kid_subset_size=size, verbose=False)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """IS (arXiv:1606.03498) of logits (N, C): mean and standard deviation over 10 splits.

    The splits are torch-fidelity's, but one at a time, so that logits may lie on a disk.

    Raises:
        ValueError: a split would be a single image, whose score is 1 whatever it shows.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < 2 * IS_SPLITS:
        raise ValueError(f"an Inception score needs at least {2 * IS_SPLITS} images, got {len(logits)}")
    order = np.random.RandomState(2020).permutation(len(logits))
    edges = [len(logits) * i // IS_SPLITS for i in range(IS_SPLITS + 1)]
    splits = (logits[order[a:b]] for a, b in itertools.pairwise(edges))
    scores = [isc_features_to_metric(split, splits=1, shuffle=False)["inception_score_mean"] for split in splits]
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991) of features (N, F), (M, F), with 3 neighbours.

    Equal to torch-fidelity's, which concatenates all distances of a block of images; here memory has a bound.

    Raises:
        ValueError: a set has no more images than neighbours.
    """
    if (few := min(len(generated), len(reference))) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} images on either side, got {few}")
    return _share_inside(generated, reference), _share_inside(reference, generated)


def _share_inside(points: Tensor, centres: Tensor) -> float:
    """The part of points that lie in the ball of a centre, which reaches to its third neighbour among the centres."""
    radii, inside = _radii(centres), torch.zeros(len(points), dtype=torch.bool)
    for some, found in zip(points.split(BLOCK), inside.split(BLOCK)):
        for others, reach in zip(centres.split(BLOCK), radii.split(BLOCK)):
            found |= (torch.cdist(some, others) <= reach).any(dim=1)
    return inside.double().mean().item()


def _radii(centres: Tensor) -> Tensor:
    """The distance (M,) of each centre from its third neighbour; the nearest of all is itself."""
    radii = centres.new_empty(len(centres))
    for some, found in zip(centres.split(BLOCK), radii.split(BLOCK)):
        nearest = some.new_full((len(some), NEIGHBOURS + 1), torch.inf)
        for others in centres.split(BLOCK):
            nearest = torch.cat([nearest, torch.cdist(some, others)], dim=1).topk(NEIGHBOURS + 1, largest=False).values
        found.copy_(nearest[:, -1])
    return radii


def caption_score(log_probabilities: Tensor) -> float:
    """CapS of CogView (arXiv:2105.13290): the geometric mean of a caption's token probabilities (L,).

    Raises:
        ValueError: there is no token.
    """
    if not len(log_probabilities):
        raise ValueError("CapS needs a caption with a token, got none")
    return math.exp(log_probabilities.double().mean().item())


def moments(parts: Iterable[np.ndarray]) -> Moments:
    """Mean and unbiased covariance of features that come part by part, (n, F) each; in 64 bits, in constant memory.

    Raises:
        ValueError: there are fewer than two rows.
    """
    count, shift, total, outer = 0, np.zeros(0), np.zeros(0), np.zeros(0)
    for part in filter(len, parts):
        if not count:  # products of small differences keep their digits
            shift, total, outer = part.mean(0, dtype=np.float64), np.zeros(part.shape[1]), np.zeros(part.shape[1:] * 2)
        centred = part - shift
        count, total, outer = count + len(part), total + centred.sum(0), outer + centred.T @ centred
    if count < 2:
        raise ValueError(f"a Frechet distance needs at least two images on either side, got {count}")
    return shift + total / count, (outer - np.outer(total, total) / count) / (count - 1)
