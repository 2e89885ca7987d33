"""A complete evaluation: measure the images, compare them with the reference, write the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import clipgen
from clipgen.evaluation.feature_store import Advance, FeatureStore, Source, collect
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.report import compute_results
from clipgen.storage.files import cache_folder, read_json, write_json
from clipgen.storage.resumable_store import require_same_identity

METRICS_FILE = "metrics.json"


def evaluate(
    output: str | Path,
    source: Source,
    metrics: ImageMetrics,
    reference: Source | FeatureStore | None = None,
    *,
    advance: Advance = lambda count: None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float] | None:
    """Measure the images of a source, compare them with the reference's, and write ``metrics.json``.

    An interrupted evaluation can be called again and resumes.

    Args:
        output: folder of the results.
        source: the images.
        metrics: what is measured.
        reference: real images, which are measured once per content and feature space and kept in
            ``reference_folder``; or a store that was measured before.
        advance: called with the number of images when they are done.
        rank: number of this process; processes share the images without communication.
        world_size: number of processes.

    Returns:
        The results; None if other processes have not finished their share.
    """
    reference_store = measure_reference(reference, metrics.for_reference(), rank, world_size)
    store = FeatureStore(Path(output) / "parts")
    collect(store.folder, source, metrics, metrics.identity(), advance, rank=rank, world_size=world_size)
    # Both are checked at the end, so that the process that finishes last computes the results.
    if not store.is_complete() or not (reference_store is None or reference_store.is_complete()):
        return None
    results = compute_results(store, reference_store)
    protocol = {"images": len(store)} | store.read_identity()
    if reference_store is not None:
        protocol["reference"] = {"images": len(reference_store)} | reference_store.read_identity()
    write_results(Path(output) / METRICS_FILE, results, protocol)
    return results


def measure_reference(
    reference: Source | FeatureStore | None, metrics: ImageMetrics, rank: int, world_size: int
) -> FeatureStore | None:
    """Measure this process's share of a reference and return its store."""
    if reference is None:
        return None
    # Without an identity, the cache could return the features of another space.
    if metrics.features and not metrics.features.identity:
        raise ValueError("features must have an identity to be compared: Features(function, 'a name')")
    if isinstance(reference, FeatureStore):
        require_same_features(reference, metrics)
        return reference
    identity = metrics.identity()
    folder = reference_folder(identity | reference.identity | {"parts": len(reference.chunks)})
    collect(folder, reference, metrics, identity, rank=rank, world_size=world_size, shared=True)
    return FeatureStore(folder)


def require_same_features(reference: FeatureStore, metrics: ImageMetrics) -> None:
    """Raise ValueError if a reference is incomplete, or was measured in another feature space."""
    if not reference.is_complete():
        raise ValueError(f"the reference {reference.folder} is not finished: finish its evaluation first")
    stored = reference.read_identity()
    for key, wanted in metrics.feature_config.items():
        if stored.get(key) != wanted:
            raise ValueError(
                f"the reference {reference.folder} was measured with {key}={stored.get(key)}, not {wanted}"
            )


def reference_folder(identity: Mapping[str, Any]) -> Path:
    """Return the folder of a reference's features, below ``$CLIPGEN_CACHE`` or ``~/.cache/clipgen``."""
    base = cache_folder()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return base / "features" / digest[:32]


def require_same_protocol(path: Path, protocol: Mapping[str, Any]) -> None:
    """Raise ValueError if a results file contains the results of another protocol, which would be overwritten.

    Args:
        path: the results file; it need not exist.
        protocol: the part of the protocol that is compared.
    """
    if path.is_file():
        stored = read_json(path).get("protocol", {})
        require_same_identity(path.parent, {key: stored.get(key) for key in protocol}, protocol)


def write_results(path: Path, results: Mapping[str, float], protocol: Mapping[str, Any]) -> None:
    """Write the results and all that must be known to compare them with others."""
    versions = {"clipgen": clipgen.__version__, "torch": version("torch"), "pillow": version("pillow")}
    write_json(path, {"metrics": dict(results), "protocol": dict(protocol), "versions": versions})
