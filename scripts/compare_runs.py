"""Compare runs: a Markdown table of their last validation, and a plot of each metric over the steps.

clipgen-train stage=vqgan experiment=cifar10 logger=csv output=runs/a
clipgen-train stage=vqgan experiment=cifar10 logger=csv output=runs/b quantizer=fsq
python -m clipgen compare_runs runs/a runs/b --metrics psnr rfid codebook_usage --output runs/compared.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

from clipgen.files import atomic_write

Curve = list[tuple[int, float]]  # step, value
RunCurves = dict[str, dict[str, Curve]]  # run -> metric -> curve


def read_curves(run: Path, metrics: list[str]) -> dict[str, Curve]:
    """Return the curve of each metric over the validations of a run."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, Curve] = {}
    for metric in metrics:
        column = f"val/{metric}"
        curves[metric] = [(int(row["step"]) + 1, float(row[column])) for row in rows if row.get(column)]
    return curves


def table(runs: RunCurves, metrics: list[str]) -> str:
    """Return a Markdown table of the last value of each metric."""
    lines = [["", *metrics], ["---"] * (len(metrics) + 1)]
    for name, curves in runs.items():
        lines.append([name, *(format_last(curves[metric]) for metric in metrics)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_last(curve: Curve) -> str:
    """Return the last value of a curve with four digits; a dash if it is empty."""
    return f"{curve[-1][1]:.4g}" if curve else "-"


def plot(runs: RunCurves, metrics: list[str], path: Path) -> None:
    """Plot one panel per metric, with a line per run."""
    figure = Figure(figsize=(4.5 * len(metrics), 3.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics):
        for name, curves in runs.items():
            panel.plot(*zip(*curves[metric]), label=name, marker=".")
        panel.set(title=f"val/{metric}", xlabel="step")
        panel.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")


def main() -> None:
    """Print the table, and write the plots if an output is given."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=Path, nargs="+", help="run folders, trained with logger=csv")
    p.add_argument("--metrics", nargs="+", default=["psnr"], help="names of the metrics, without val/ (default: psnr)")
    p.add_argument("--output", type=Path, help="PNG file for the plots")
    args = p.parse_args()
    for run in args.runs:
        if not (run / "metrics.csv").is_file():
            sys.exit(f"compare_runs.py: error: no metrics.csv in {run}; train with logger=csv")
    runs = {run.name: read_curves(run, args.metrics) for run in args.runs}
    print(table(runs, args.metrics))
    if args.output:
        plot(runs, args.metrics, args.output)


if __name__ == "__main__":
    main()
