"""A logger that writes ``metrics.csv`` and continues it when a run is resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger as LightningCSVLogger
from pytorch_lightning.utilities import rank_zero_only

from clipgen.storage.files import check_size, one_line, read_text

MAX_BYTES = 2**28


class CSVLogger(LightningCSVLogger):
    """Lightning's CSV logger, which would otherwise overwrite ``metrics.csv`` when a run is resumed.

    Keeps the existing rows of all steps before the one at which the run resumes.
    """

    def __init__(self, save_dir: str, name: str = "", version: str = ""):
        super().__init__(save_dir, name, version)
        path = Path(self.log_dir) / "metrics.csv"
        self.previous_rows = read_rows(path) if path.is_file() else []

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for row in self.previous_rows:
            if row["step"] < (step or 0):
                self.experiment.metrics.append({key: value for key, value in row.items() if value not in ("", None)})
        self.previous_rows = []
        super().log_metrics(metrics, step)


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
