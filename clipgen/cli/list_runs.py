"""The runs below a folder: which there are, which are finished, and which is the newest of a stage."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

logger = logging.getLogger(__name__)
OUTPUTS = Path("outputs")  # where clipgen-train puts runs by default
FOLDERS = {"vqgan": ("vqgan",), "transformer": ("transformer", "label_transformer")}  # stage -> finished models


@dataclass(frozen=True)
class Run:
    """A run folder of ``clipgen-train``.

    Args:
        stage: ``"vqgan"`` or ``"transformer"``.
        finished: whether it holds a finished model, and not only checkpoints.
        time: when it was last written to, in seconds since the epoch.
    """

    path: Path
    stage: str
    finished: bool
    time: float


def find_runs(outputs: Path) -> list[Run]:
    """Return all runs below a folder, the newest last."""
    models = (
        file.parent.parent
        for names in FOLDERS.values()
        for name in names
        for file in outputs.rglob(f"{name}/config.json")
    )
    stopped = (file.parent.parent for file in outputs.rglob("checkpoints/last.ckpt"))
    runs = [describe(path) for path in {*models, *stopped}]
    # a cache of stage 2 has a tokenizer and a CLIP as a run has them, but neither model nor checkpoint
    return sorted((run for run in runs if run.time), key=lambda run: (run.time, run.path))


def describe(path: Path) -> Run:
    """Return what a run folder's files tell about it. One of stage 2 holds a copy of its tokenizer and its CLIP."""
    stage = "transformer" if (path / "clip.json").is_file() or folder_of(path, "transformer") else "vqgan"
    model = folder_of(path, stage)
    newest = model / "config.json" if model else path / "checkpoints" / "last.ckpt"
    time = newest.stat().st_mtime if newest.is_file() else 0.0
    return Run(path, stage, model is not None, time)


def folder_of(path: Path, stage: str) -> Path | None:
    """Return the folder of the finished model in a run folder, None if there is none."""
    folders = [path / name for name in FOLDERS[stage] if (path / name / "config.json").is_file()]
    return folders[0] if folders else None


def newest_run(outputs: Path, stage: str = "transformer") -> str | None:
    """Return the run of a stage that finished last; tell about later ones that are not finished."""
    runs = [run for run in find_runs(outputs) if run.stage == stage and not (run.path / "label_transformer").is_dir()]
    finished = [run for run in runs if run.finished]
    for run in runs[runs.index(finished[-1]) + 1 :] if finished else runs:
        logger.warning("Passed over %s, which is not finished: clipgen-train resume=%s finishes it", run.path, run.path)
    return str(finished[-1].path) if finished else None


def table(runs: Iterable[Run]) -> list[str]:
    """Return a line per run: stage, step, lowest monitored value, state, path; the newest first."""
    rows = [("STAGE", "STEP", "BEST", "STATE", "PATH")]
    for run in sorted(runs, key=lambda run: -run.time):
        step, best = progress_of(run.path)
        rows.append((run.stage, step, best, "finished" if run.finished else "unfinished", str(run.path)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]) for row in rows]


def progress_of(run: Path) -> tuple[str, str]:
    """Return a run's step and the lowest value of what it monitors, as text; "-" if its checkpoint cannot tell."""
    import torch

    try:  # memory-mapped: the weights stay on the disk
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", "cpu", weights_only=True, mmap=True)
        step = str(checkpoint["global_step"])
    except Exception:  # damaged bytes raise anything
        return "-", "-"
    states = checkpoint.get("callbacks", {}).values()
    scores = [state for state in states if isinstance(state, dict) and state.get("best_model_score") is not None]
    best = f"{scores[0]['monitor']} {float(scores[0]['best_model_score']):.4g}" if scores else "-"
    return step, best


def free_folder(folder: Path, pattern: str) -> Path:
    """Return the folder if it holds no file of a pattern, else the first of FOLDER-2, FOLDER-3, ... that holds none."""
    name = folder.name.strip(".") or "samples"
    numbered = (folder.parent / f"{name}-{number}" for number in count(2))
    return next(place for place in chain([folder], numbered) if not any(place.glob(pattern)))
