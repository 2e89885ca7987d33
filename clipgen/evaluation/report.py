"""The results of a measured set of images, and tables of results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from clipgen.evaluation.feature_store import FeatureStore
from clipgen.evaluation.metrics import METRICS

logger = logging.getLogger(__name__)
ENOUGH_IMAGES = 2048  # features of Inception: with fewer images their covariance is singular
RECONSTRUCTION_LABELS = {
    "psnr": "PSNR ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "rfid": "rFID ↓",
    "codebook_usage": "codebook usage ↑",
}
Results = Mapping[str, float]


def compute_results(store: FeatureStore, reference: FeatureStore | None = None) -> dict[str, float]:
    """Return the results of all metrics whose columns were measured.

    Args:
        store: the set to evaluate.
        reference: the set that its distribution is compared with. None omits FID, KID, precision and recall.

    Raises:
        ValueError: a set is too small.
    """
    if reference is not None:
        check_reference(store, reference)
    results: dict[str, float] = {}
    for metric in METRICS:
        results |= metric.reduce(store, reference)
    return {name: float(value) for name, value in results.items()}


def check_reference(store: FeatureStore, reference: FeatureStore) -> None:
    """Raise ValueError if the reference is empty; log a warning if the sets differ in size or one is small."""
    if not len(reference):
        raise ValueError(f"the reference must contain images, got none in {reference.folder}")
    if len(store) != len(reference):
        logger.warning(
            "%d images are compared with %d of the reference: such an FID must not be compared with one of another "
            "reference.",
            len(store),
            len(reference),
        )
    smaller = min(len(store), len(reference))
    if smaller < ENOUGH_IMAGES:
        logger.warning(
            "Only %d images: FID, KID, precision and recall are unreliable below %d.", smaller, ENOUGH_IMAGES
        )


def results_table(rows: Sequence[tuple[str, Results]], features: str = "", captioner: str = "") -> str:
    """Return a Markdown table of systems and their results, with a dash for a result that is missing.

    Args:
        rows: name and results of each system.
        features: name of the feature space, for the headings of the metrics that depend on it.
        captioner: name of the captioner, for the heading of CapS.
    """
    labels = column_labels({"features": features, "captioner": captioner, "": ""})
    names = result_names(rows)
    lines = [
        ["system", *(labels.get(name, name.replace("_", " ")) for name in names)],
        ["---"] * (len(names) + 1),
    ]
    for system, results in rows:
        lines.append([system.replace("|", "\\|"), *(format_result(results, name) for name in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def result_names(rows: Sequence[tuple[str, Results]]) -> list[str]:
    """Return the names of the results of all systems, without standard deviations, in the order of the columns."""
    names: list[str] = []
    for _, results in rows:
        for name in results:
            if name not in names and not name.endswith("_std"):
                names.append(name)
    return names


def column_labels(network_names: Mapping[str, str]) -> dict[str, str]:
    """Return the heading of each result, followed by the name of the network that it depends on, if given."""
    labels = {}
    for metric in METRICS:
        name = network_names[metric.network]
        for result, label in metric.labels.items():
            labels[result] = f"{label} ({name})" if name else label
    labels |= RECONSTRUCTION_LABELS
    if network_names["features"]:
        labels["rfid"] += f" ({network_names['features']})"
    return labels


def format_result(results: Results, name: str) -> str:
    """Return a number with four digits, and its standard deviation if it is known."""
    if name not in results:
        return "-"
    std = results.get(name.replace("_mean", "") + "_std")
    return f"{results[name]:.4g}" + ("" if std is None else f" ± {std:.2g}")
