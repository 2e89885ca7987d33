"""Runs side by side: their last validation as a Markdown table, and one plot for each metric over the steps.

clipgen-train stage=vqgan experiment=cifar10 logger=csv output=runs/a
clipgen-train stage=vqgan experiment=cifar10 logger=csv output=runs/b quantizer_type=fsq
python scripts/compare_runs.py runs/a runs/b --metrics psnr rfid codebook_usage --output runs/compared.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

from clipgen.files import atomic_write

Curve = list[tuple[int, float]]


def curves(run: Path, metrics: list[str]) -> dict[str, Curve]:
    """Metric -> (step, value) of each validation."""
    with (run / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return {m: [(int(r["step"]) + 1, float(r[f"val/{m}"])) for r in rows if r.get(f"val/{m}")] for m in metrics}


def table(found: dict[str, dict[str, Curve]], metrics: list[str]) -> str:
    """Rows are runs, columns metrics."""
    lines = [["", *metrics], ["---"] * (len(metrics) + 1)]
    lines += [[name, *(f"{c[m][-1][1]:.4g}" if c[m] else "-" for m in metrics)] for name, c in found.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(found: dict[str, dict[str, Curve]], metrics: list[str], path: Path) -> None:
    """One panel a metric."""
    figure = Figure(figsize=(4.5 * len(metrics), 3.2), dpi=100, layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for name, curve in found.items():
            axis.plot(*zip(*curve[metric]), label=name, marker=".")
        axis.set(title=f"val/{metric}", xlabel="step")
        axis.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=Path, nargs="+", help="run folders, trained with logger=csv")
    p.add_argument("--metrics", nargs="+", default=["psnr"], help="names after val/")
    p.add_argument("--output", type=Path, help="PNG of the plots")
    args = p.parse_args()
    for run in args.runs:
        if not (run / "metrics.csv").is_file():
            sys.exit(f"compare_runs.py: error: no metrics.csv in {run}; train with logger=csv")
    found = {run.name: curves(run, args.metrics) for run in args.runs}
    print(table(found, args.metrics))
    if args.output:
        plot(found, args.metrics, args.output)


if __name__ == "__main__":
    main()
