"""A logger that writes ``metrics.csv`` and continues it when a run is resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger as LightningCSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from clipgen.storage.files import atomic_write, check_size, one_line, read_text

MAX_BYTES = 2**28


class KeepingWriter(ExperimentWriter):
    """Lightning's writer, which would otherwise delete an existing ``metrics.csv`` before anything is logged."""

    def _check_log_dir_exists(self) -> None:
        """Leave the existing files alone."""


class CSVLogger(LightningCSVLogger):
    """Lightning's CSV logger, which would otherwise overwrite ``metrics.csv`` when a run is resumed.

    Keeps the existing rows of all steps before the one at which the run resumes. The file stays as it is until the
    resumed run logs its first step.
    """

    def __init__(self, save_dir: str, name: str = "", version: str = ""):
        super().__init__(save_dir, name, version)
        self.path = Path(self.log_dir) / "metrics.csv"
        self.previous_rows = read_rows(self.path) if self.path.is_file() else []

    def forget_rows(self) -> None:
        """Delete the rows of an earlier run in the same folder."""
        self.path.unlink(missing_ok=True)
        self.previous_rows = []

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the files."""
        if self._experiment is None:
            self._experiment = KeepingWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.previous_rows:
            kept = [row for row in self.previous_rows if is_before(row, metrics, step or 0)]
            self.experiment.metrics_keys = write_rows(self.path, kept)
            self.previous_rows = []
        super().log_metrics(metrics, step)


def is_before(row: Mapping[str, Any], metrics: Mapping[str, Any], step: int) -> bool:
    """Return whether a row was logged before the metrics of a step; of the same step if it has none of their values."""
    if row["step"] != step:
        return bool(row["step"] < step)
    return all(row.get(name) in ("", None) for name in metrics if name != "epoch")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Replace a ``metrics.csv``, without the columns that no row uses; return its columns."""
    used: set[str] = set()
    for row in rows:
        used.update(key for key, value in row.items() if value not in ("", None))
    columns = sorted(used)
    if not rows:
        path.unlink()
        return columns
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return columns


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.csv``, each with its step as a number.

    Raises:
        ValueError: the file is damaged or too large; the message names it.
    """
    check_size(path, MAX_BYTES)
    rows: list[dict[str, Any]] = []
    try:
        for row in csv.DictReader(read_text(path).splitlines(), strict=True):
            rows.append({**row, "step": int(row["step"])})
            if None in row:
                raise ValueError("a row has more values than there are names")
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: it must be a table with a column of steps, got {one_line(error)}"
        ) from error
    return rows
