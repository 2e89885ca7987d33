"""A logger that writes ``metrics.csv`` and continues it when a run is resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger as LightningCSVLogger
from pytorch_lightning.utilities import rank_zero_only


class CSVLogger(LightningCSVLogger):
    """Lightning's CSV logger, which would otherwise overwrite ``metrics.csv`` when a run is resumed.

    Keeps the existing rows of all steps before the one at which the run resumes.
    """

    def __init__(self, save_dir: str, name: str = "", version: str = ""):
        super().__init__(save_dir, name, version)
        path = Path(self.log_dir) / "metrics.csv"
        self.previous_rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for row in self.previous_rows:
            if int(row["step"]) < (step or 0):
                self.experiment.metrics.append({key: value for key, value in row.items() if value})
        self.previous_rows = []
        super().log_metrics(metrics, step)
