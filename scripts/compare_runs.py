"""Compare runs: a Markdown table of their last validation, and a plot of each metric over the steps.

clipgen-train stage=vqgan experiment=cifar10_quick logger=csv output=runs/a
clipgen-train stage=vqgan experiment=cifar10_quick logger=csv output=runs/b quantizer=fsq
python -m clipgen compare_runs runs/a runs/b --metrics psnr rfid codebook_usage --output runs/compared.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from clipgen.images import save_png
from clipgen.storage.files import user_path
from clipgen.visualization import GAP, font_for, to_image

Curve = list[tuple[int, float]]  # step, value
RunCurves = dict[str, dict[str, Curve]]  # run -> metric -> curve


def read_curves(run: Path, metrics: list[str]) -> dict[str, Curve]:
    """Return the curve of each metric of a run: of validation, or of training if its name begins with train/."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, Curve] = {}
    for metric in metrics:
        column = full_name(metric)
        curves[metric] = [(int(row["step"]) + 1, float(row[column])) for row in rows if row.get(column)]
    return curves


def full_name(metric: str) -> str:
    """Return the name under which a metric is logged; without a prefix it is one of validation."""
    return metric if "/" in metric else f"val/{metric}"


def table(runs: RunCurves, metrics: list[str]) -> str:
    """Return a Markdown table of the last value of each metric."""
    lines = [["", *metrics], ["---"] * (len(metrics) + 1)]
    for name, curves in runs.items():
        lines.append([name, *(format_last(curves[metric]) for metric in metrics)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_last(curve: Curve) -> str:
    """Return the last value of a curve with four digits; a dash if it is empty."""
    return f"{curve[-1][1]:.4g}" if curve else "-"


def plot(runs: RunCurves, metrics: list[str]) -> Image.Image:
    """Plot one panel per metric, with a line per run."""
    figure = Figure(figsize=(4.5 * len(metrics), 3.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics):
        for name, curves in runs.items():
            panel.plot(*zip(*curves[metric]), label=name, marker=".")
        panel.set(title=full_name(metric), xlabel="step")
        panel.legend()
    return to_image(figure)


def with_grids(chart: Image.Image, grids: dict[str, Image.Image]) -> Image.Image:
    """Append the image grids of the runs below a chart, side by side under their names."""
    width = chart.width // len(grids)
    labels_height = 20
    resized = {name: image.resize((width, round(image.height * width / image.width))) for name, image in grids.items()}
    height = labels_height + max(image.height for image in resized.values())
    sheet = Image.new("RGB", (chart.width, chart.height + height), "white")
    sheet.paste(chart, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(resized.items()):
        draw.text((i * width + GAP, chart.height), name, "black", font_for(name))
        sheet.paste(image, (i * width, chart.height + labels_height))
    return sheet


def short_names(runs: Sequence[Path]) -> dict[str, Path]:
    """Return runs by the names of their folders, or by their paths if two folders have the same name."""
    names = [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else map(str, runs)
    return dict(zip(names, runs))


def last_grid(run: Path, name: str) -> Image.Image:
    """Return the last image grid of a kind, such as "reconstructions", that a run wrote."""
    files = sorted((run / "grids").glob(f"{name}_*.png"))
    if not files:
        sys.exit(f"python -m clipgen compare_runs: error: no {name}_*.png in {run / 'grids'}")
    return Image.open(files[-1]).convert("RGB")


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=user_path, nargs="+", help="run folders, trained with logger=csv")
    parser.add_argument("--metrics", nargs="+", default=["psnr"], help="val/ can be left out (default: psnr)")
    parser.add_argument("--output", type=user_path, help="PNG file for the plots")
    parser.add_argument(
        "--grids", metavar="NAME", help="add the last image grids of this name, such as reconstructions"
    )
    return parser


def main() -> None:
    """Print the table, and write the plots if an output is given."""
    args = make_parser().parse_args()
    for run in args.runs:
        if not (run / "metrics.csv").is_file():
            sys.exit(f"python -m clipgen compare_runs: error: no metrics.csv in {run}; train with logger=csv")
    names = short_names(args.runs)
    runs = {name: read_curves(run, args.metrics) for name, run in names.items()}
    print(table(runs, args.metrics))
    if args.output:
        chart = plot(runs, args.metrics)
        if args.grids:
            chart = with_grids(chart, {name: last_grid(run, args.grids) for name, run in names.items()})
        save_png(chart, args.output)


if __name__ == "__main__":
    main()
