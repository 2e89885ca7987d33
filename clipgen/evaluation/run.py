"""One evaluation from images to numbers: measure, compare, write."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipgen.evaluation.feature_store import Advance, FeatureStore, Source, check_same, collect
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.report import summary
from clipgen.files import read_json, write_json

METRICS = "metrics.json"


def evaluate(
    output: str | Path,
    source: Source,
    measure: ImageMetrics,
    reference: Source | FeatureStore | None = None,
    *,
    advance: Advance = lambda count: None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, float] | None:
    """Measure a source's images, compare them with the reference's, and write ``metrics.json``.

    Killed at any moment and called again it goes on. A reference of images is measured once for each content and
    feature space, and kept in ``reference_folder``; or it is a collection that was measured before.

    Args:
        advance: called with a number of images when they are done. share: (rank, world size) of processes that measure
            together.

    Returns:
        The metrics; None where other processes have not finished their share.
    """
    theirs = measured_reference(reference, measure.for_reference(), share)
    images = FeatureStore(Path(output) / "parts")
    collect(images.folder, source, measure, measure.identity, advance, share)
    if not (images.complete and (theirs is None or theirs.complete)):  # asked at the end: whoever is last goes on
        return None
    found = summary(images, theirs)
    protocol = {"images": len(images)} | images.identity
    if theirs is not None:
        protocol["reference"] = {"images": len(theirs)} | theirs.identity
    write(Path(output) / METRICS, found, protocol)
    return found


def measured_reference(
    reference: Source | FeatureStore | None, measure: ImageMetrics, share: tuple[int, int]
) -> FeatureStore | None:
    """The reference as a collection, measured as far as this process's share goes."""
    if reference is None:
        return None
    if measure.features and not measure.features.identity:  # another space's numbers would be found in the cache
        raise ValueError("features must have an identity where they are compared: Features(function, 'a name')")
    if isinstance(reference, FeatureStore):
        check_space(reference, measure)
        return reference
    found = FeatureStore(reference_folder(measure.identity | reference.identity | {"parts": len(reference.pieces)}))
    collect(found.folder, reference, measure, measure.identity, share=share)
    return found


def check_space(reference: FeatureStore, measure: ImageMetrics) -> None:
    """Raise ValueError where a reference is not finished, or measured in another space than images are to be."""
    if not reference.complete:
        raise ValueError(f"the reference {reference.folder} is not finished: finish its evaluation first")
    for key, wanted in measure.space.items():
        if (got := reference.identity.get(key)) != wanted:
            raise ValueError(f"the reference {reference.folder} was measured with {key}={got}, not {wanted}")


def reference_folder(identity: Mapping[str, Any]) -> Path:
    """Where a reference's features are kept: below ``$CLIPGEN_CACHE``, or ``~/.cache/clipgen``."""
    base = Path(os.environ.get("CLIPGEN_CACHE", "~/.cache/clipgen")).expanduser()
    return base / "features" / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def refuse_other(path: Path, protocol: Mapping[str, Any]) -> None:
    """Raise ValueError where ``path`` holds the numbers of another protocol, as far as this one says: they would be
    lost."""
    if path.is_file():
        found = read_json(path).get("protocol", {})
        check_same(path.parent, {key: found.get(key) for key in protocol}, protocol)


def write(path: Path, found: Mapping[str, float], protocol: Mapping[str, Any]) -> None:
    """The numbers, and all that must be known to compare them with others."""
    versions = {name: version(name) for name in ("clipgen", "torch", "pillow")}
    content = {"metrics": dict(found), "protocol": dict(protocol), "versions": versions}
    write_json(path, content)
