"""The numbers that follow from measured sets of images, and their table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from clipgen.evaluation import functional, shapes_evaluator
from clipgen.evaluation.feature_store import FeatureStore

logger = logging.getLogger(__name__)
LABELS = {
    "is_mean": "IS ↑",
    "fid_0": "FID-0 ↓",
    "fid_1": "FID-1 ↓",
    "fid_2": "FID-2 ↓",
    "kid_mean": "KID ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "caps": "CapS ↑",
    "judge_all": "judge: all ↑",
    "accuracy": "recognised ↑",
    "psnr": "PSNR ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "rfid": "rFID ↓",
    "codebook_usage": "codes in use ↑",
}
BY_FEATURES = ("is_mean", "fid_0", "fid_1", "fid_2", "kid_mean", "precision", "recall", "rfid")


def summary(images: FeatureStore, reference: FeatureStore | None = None) -> dict[str, float]:
    """All metrics that the measured columns allow.

    Args:
        images: the set to judge. reference: what its distribution is compared with; None leaves FID, KID, precision
            and recall out.

    Raises:
        ValueError: a set is too small.
    """
    columns, found = images.columns(), {}
    if "logits" in columns and len(images) < 2 * functional.IS_SPLITS:
        logger.warning("IS is left out: it needs at least %d images, got %d", 2 * functional.IS_SPLITS, len(images))
    elif "logits" in columns:
        logits = torch.from_numpy(images.mapped("logits", images.folder))
        found["is_mean"], found["is_std"] = functional.inception_score(logits)
    if reference is not None:
        found |= distances(images, reference)
    for name in sorted(columns):
        if name.startswith("clip "):
            found[f"clip_score {name.removeprefix('clip ')}"] = 100 * images.column(name).astype(np.float64).mean()
    found |= {name: images.column(name).mean() for name in ("accuracy", "caps") if name in columns}
    if "judge" in columns:
        right = images.column("judge").mean(0)
        found |= {f"judge_{name}": value for name, value in zip(("all", *shapes_evaluator.ATTRIBUTES), right)}
    return {name: float(value) for name, value in found.items()}


def distances(images: FeatureStore, reference: FeatureStore) -> dict[str, float]:
    """FID at every blur; KID, precision and recall without one."""
    if not len(reference):
        raise ValueError(f"the reference must hold images, got none in {reference.folder}")
    if (count := min(len(images), len(reference))) < 2048:
        logger.warning("%d images are few: FID, KID, precision and recall of so few say little.", count)
    found = {}
    for name in sorted(images.columns() & reference.columns()):
        if name.startswith("features_"):
            both = functional.moments(images.each(name)), functional.moments(reference.each(name))
            found[f"fid_{name.removeprefix('features_')}"] = functional.frechet_distance(*both)
    if "features_0" in images.columns():
        pair = [torch.from_numpy(side.mapped("features_0", images.folder)) for side in (images, reference)]
        found["kid_mean"], found["kid_std"] = functional.kernel_distance(*pair)
        found["precision"], found["recall"] = functional.precision_recall(*pair)
    return found


def table(rows: Sequence[tuple[str, Mapping[str, float]]], features: str = "", captioner: str = "") -> str:
    """A Markdown table of systems and their metrics; a dash where one was not measured.

    Args:
        features, captioner: named in the columns that depend on them.
    """
    by = dict.fromkeys(BY_FEATURES, features) | {"caps": captioner}
    names = [name for name in dict.fromkeys(n for _, found in rows for n in found) if not name.endswith("_std")]
    heads = [LABELS.get(name, name.replace("_", " ")) + (f" ({by[name]})" if by.get(name) else "") for name in names]
    lines = [["system", *heads], ["---"] * (len(names) + 1)]
    lines += [[system.replace("|", "\\|"), *(cell(found, name) for name in names)] for system, found in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(found: Mapping[str, float], name: str) -> str:
    """A number with four digits, and its spread where it is known."""
    if name not in found:
        return "-"
    spread = found.get(name.replace("_mean", "") + "_std")
    return f"{found[name]:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
