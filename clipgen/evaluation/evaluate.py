"""One evaluation from images to a table row: measure, compare, write."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipgen.evaluation.collection import Advance, Collection, Source, check_same, collect
from clipgen.evaluation.measure import Measure, summary
from clipgen.files import read_json, write_json

LABELS = {
    "is_mean": "IS ↑", "fid_0": "FID-0 ↓", "fid_1": "FID-1 ↓", "fid_2": "FID-2 ↓", "kid_mean": "KID ↓",
    "precision": "precision ↑", "recall": "recall ↑", "caps": "CapS ↑", "judge_all": "judge: all ↑",
    "accuracy": "recognised ↑", "psnr": "PSNR ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓", "rfid": "rFID ↓",
    "codebook_usage": "codes in use ↑",
}  # fmt: skip
METRICS = "metrics.json"
BY_FEATURES = ("is_mean", "fid_0", "fid_1", "fid_2", "kid_mean", "precision", "recall", "rfid")


def evaluate(
    output: str | Path, source: Source, measure: Measure, reference: Source | Collection | None = None, *,
    advance: Advance = lambda count: None, share: tuple[int, int] = (0, 1),
) -> dict[str, float] | None:  # fmt: skip
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
    images = Collection(Path(output) / "parts")
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
    reference: Source | Collection | None, measure: Measure, share: tuple[int, int]
) -> Collection | None:
    """The reference as a collection, measured as far as this process's share goes."""
    if reference is None:
        return None
    if isinstance(reference, Collection):
        check_space(reference, measure)
        return reference
    found = Collection(reference_folder(measure.identity | reference.identity | {"parts": len(reference.pieces)}))
    collect(found.folder, reference, measure, measure.identity, share=share)
    return found


def check_space(reference: Collection, measure: Measure) -> None:
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
