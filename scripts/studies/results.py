"""Tables of a study, with intervals, and the sheet of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clipgen.evaluation.intervals import bootstrap_interval, difference_interval
from studies.rows import REAL, Row
from studies.workspace import REFERENCE, Study

# Pixels above the grid of a row.
LABEL_HEIGHT = 22
PER_SET = ("fid_0", "precision", "recall")


def correct_values(study: Study, row: Row, seed: int) -> Tensor:
    """Return 1 for each correct image of a row and 0 for the others, (N,)."""
    store = study.measured(row, seed)
    column = store.column("shapes")[:, 0] if study.is_shapes else store.column("accuracy")
    return torch.from_numpy(column.astype("float64"))


def clip_values(study: Study, row: Row, seed: int, name: str) -> Tensor:
    """Return the CLIP score of each image of a row, (N,)."""
    return torch.from_numpy(study.measured(row, seed).column(f"clip {name}").astype("float64")) * 100


def mean_and_interval(groups: Sequence[Tensor]) -> tuple[float, float, float]:
    """Return the mean over seeds and images, and its 95 % bootstrap interval."""
    mean = torch.stack([group.mean() for group in groups]).mean().item()
    return mean, *bootstrap_interval(groups)


def with_interval(groups: Sequence[Tensor], scale: float = 1.0, digits: int = 1) -> str:
    """Return the mean and the interval of ``mean_and_interval`` as text."""
    mean, low, high = (scale * value for value in mean_and_interval(groups))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def with_range(values: Sequence[float]) -> str:
    """Return the mean over seeds, and the lowest and the highest value."""
    mean = sum(values) / len(values)
    return f"{mean:.4g} ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else f"{mean:.4g}"


def cells(study: Study, row: Row) -> dict[str, str]:
    """Return the cells of a row by the heading of their column."""
    seeds = study.args.seeds
    right = [correct_values(study, row, seed) for seed in seeds]
    result = {"images": str(len(right[0]) * len(right)), "right, %": with_interval(right, 100)}
    for name in study.metrics.clips:
        scores = [clip_values(study, row, seed, name) for seed in seeds]
        result[f"CLIP score ({name})"] = with_interval(scores)
    sets = [study.results(row, seed) for seed in seeds]
    for name in PER_SET:
        # Sets of other sizes cannot be compared.
        comparable = name in sets[0] and not row.is_small
        result[name.removesuffix("_0")] = with_range([metrics[name] for metrics in sets]) if comparable else "-"
    return result | cost_cells(study, row)


def cost_cells(study: Study, row: Row) -> dict[str, str]:
    """Return the steps of a row's training, and its floating-point operations relative to the reference's."""
    if row.recipe is None:
        return {"steps": "-", "training cost": "-"}
    steps = study.steps_of(row.recipe)
    cost = steps * study.flops_of(row.recipe) / (study.args.steps * study.flops_of(REFERENCE))
    return {"steps": str(steps), "training cost": f"{cost:.2f}"}


def markdown(lines: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Return a Markdown table of rows, with a dash for a cell that is missing."""
    headings = list(dict.fromkeys(heading for _, row in lines for heading in row))
    table = [f"| | {' | '.join(headings)} |", "|" + "---|" * (len(headings) + 1)]
    for name, row in lines:
        table.append(f"| {name} | {' | '.join(row.get(heading, '-') for heading in headings)} |")
    return "\n".join(table) + "\n"


def explanation(study: Study) -> str:
    """Return the explanation above a table."""
    budget = "steps" if study.args.equal == "steps" else "floating-point operations"
    return (
        f"Equal budgets in {budget} (training cost: relative to the row without the CLIP loss). Learning rate and "
        "schedule of each row are those of the grid with the lowest validation loss, unless the row says its rate; "
        f"sampling parameters those that are best on the tuning split. Seeds {seed_list(study)}. In parentheses: 95 % "
        "bootstrap intervals over seeds and images; for FID, precision and recall the range over the seeds. FID is "
        f"omitted for rows with fewer images. {evaluator_error(study)}\n\n"
    )


def seed_list(study: Study) -> str:
    """Return the seeds as text."""
    return ", ".join(map(str, study.args.seeds))


def evaluator_error(study: Study) -> str:
    """Return a sentence about the error of the evaluator or classifier."""
    if study.is_shapes:
        right = [correct_values(study, REAL, seed) for seed in study.args.seeds]
        return f"The rules call {with_interval(right, 100, 2)} % of real images right."
    accuracy = study.classifier[1]["accuracy"]
    low, high = accuracy["interval"]
    return (
        f"The classifier is right on {accuracy['all']:.1%} ({low:.1%} to {high:.1%}) of {accuracy['images']} real "
        "validation images."
    )


def differences(study: Study, rows: Sequence[Row], baseline: Row) -> str:
    """Return a table of the differences to a baseline row; an interval that includes 0 shows no effect."""
    base = [correct_values(study, baseline, seed) for seed in study.args.seeds]
    lines = []
    for row in rows:
        if row != baseline and not row.is_small:
            right = [correct_values(study, row, seed) for seed in study.args.seeds]
            low, high = difference_interval(right, base)
            effect = "yes" if low > 0 or high < 0 else "no"
            mean = torch.stack([group.mean() for group in right]).mean() - torch.stack([g.mean() for g in base]).mean()
            cell = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            lines.append((row.name, {f"right, % more than {baseline.name!r}": cell, "effect shown": effect}))
    return markdown(lines)


def combined_grid(study: Study, rows: Sequence[Row]) -> Image.Image:
    """Return the grids of all rows, one below the other."""
    grids: list[Any] = [Image.open(study.folder(row, study.args.seeds[0]) / "grid.png") for row in rows]
    height = sum(image.height + LABEL_HEIGHT for image in grids)
    combined = Image.new("RGB", (grids[0].width, height), "white")
    top = 0
    for row, image in zip(rows, grids):
        ImageDraw.Draw(combined).text((6, top + 4), row.name, "black", ImageFont.load_default(size=14))
        combined.paste(image, (0, top + LABEL_HEIGHT))
        top += image.height + LABEL_HEIGHT
    return combined
