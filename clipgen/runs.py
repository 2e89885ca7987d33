"""The runs of ``clipgen-train``: list those below a folder, find the newest finished one and the last checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgen.model_kinds import MODEL_FOLDER_NAMES
from clipgen.storage.files import printable

logger = logging.getLogger(__name__)
# Default output folder of clipgen-train.
OUTPUTS = Path("outputs")
# Stage -> names of the folders of finished models.
MODEL_FOLDERS = {
    "vqgan": (MODEL_FOLDER_NAMES["VQGAN"],),
    "transformer": (MODEL_FOLDER_NAMES["ConditionalTransformer"], MODEL_FOLDER_NAMES["ClassConditionalTransformer"]),
}


@dataclass(frozen=True)
class Run:
    """A run folder of ``clipgen-train``.

    Args:
        path: the folder.
        stage: ``"vqgan"`` or ``"transformer"``.
        finished: whether it contains a finished model, and not only checkpoints.
        time: time of the last change, in seconds since the epoch; 0 if it contains neither model nor checkpoint.
    """

    path: Path
    stage: str
    finished: bool
    time: float


def find_runs(outputs: Path) -> list[Run]:
    """Return all runs below a folder, the newest last."""
    folders = {file.parent.parent for file in outputs.rglob("checkpoints/last.ckpt")}
    for names in MODEL_FOLDERS.values():
        for name in names:
            folders |= {file.parent.parent for file in outputs.rglob(f"{name}/config.json")}
    runs = [read_run(path) for path in folders]
    # A token cache contains a VQ-GAN and a CLIP as a run of stage 2 does, but neither its model nor a checkpoint.
    return sorted((run for run in runs if run.time), key=lambda run: (run.time, run.path))


def read_run(path: Path) -> Run:
    """Return the stage and state of a run folder. A run of stage 2 contains copies of its VQ-GAN and CLIP."""
    is_stage_2 = (path / "clip.json").is_file() or finished_model(path, "transformer") is not None
    stage = "transformer" if is_stage_2 else "vqgan"
    model = finished_model(path, stage)
    newest_file = model / "config.json" if model else path / "checkpoints" / "last.ckpt"
    time = newest_file.stat().st_mtime if newest_file.is_file() else 0.0
    return Run(path, stage, model is not None, time)


def finished_model(path: Path, stage: str) -> Path | None:
    """Return the folder of the finished model in a run folder; None if there is none."""
    for name in MODEL_FOLDERS[stage]:
        if (path / name / "config.json").is_file():
            return path / name
    return None


def newest_run(outputs: Path, stage: str = "transformer") -> str | None:
    """Return the run of a stage that finished last, and name later runs that are not finished."""
    runs = [run for run in find_runs(outputs) if run.stage == stage and not is_class_conditional(run)]
    newest: Run | None = None
    unfinished: list[Run] = []
    for run in runs:
        if run.finished:
            newest = run
            unfinished = []
        else:
            unfinished.append(run)
    for run in unfinished:
        logger.warning("Passed over %s, which is not finished: clipgen-train resume=%s finishes it", run.path, run.path)
    return str(newest.path) if newest else None


def is_class_conditional(run: Run) -> bool:
    """Return whether a run trained a class-conditional transformer, which takes no prompts."""
    return (run.path / "label_transformer").is_dir()


def checkpoint_path(resume: str) -> Path:
    """Return the checkpoint that ``resume`` names: a ``.ckpt`` file, or the last one of a run folder.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
    """
    path = Path(resume).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"resume must name a .ckpt or a run folder with checkpoints/last.ckpt, got {resume}")
    return path


def runs_table(runs: Iterable[Run]) -> list[str]:
    """Return the lines of a table: stage, step, best monitored value, state and path; the newest run first."""
    rows = [("STAGE", "STEP", "BEST", "STATE", "PATH")]
    for run in sorted(runs, key=lambda run: -run.time):
        step, best = read_progress(run.path)
        rows.append((run.stage, step, best, "finished" if run.finished else "unfinished", str(run.path)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return lines


def read_progress(run: Path) -> tuple[str, str]:
    """Return the step of a run and the best value of its monitored metric, as text; "-" if they cannot be read."""
    from clipgen.checkpoint.safe_load import read_checkpoint

    try:
        # The file is mapped into memory, so the weights are not read.
        checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
        return str(int(checkpoint["global_step"])), best_value(checkpoint.get("callbacks", {}).values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return "-", "-"


def best_value(callback_states: Iterable[Any]) -> str:
    """Return name and best value of the metric that a checkpoint callback monitors; "-" if there is none yet."""
    for state in callback_states:
        if isinstance(state, dict) and state.get("best_model_score") is not None:
            return printable(f"{state['monitor']:.60} {float(state['best_model_score']):.4g}")
    return "-"
