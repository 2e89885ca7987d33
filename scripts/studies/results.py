"""Tables of a study, with intervals, and the sheet of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clipgen.evaluation.classifier import accuracy_sentence
from clipgen.evaluation.intervals import bootstrap_interval, difference_interval
from studies import rows as study_rows
from studies.rows import REAL, RECIPES, Row
from studies.workspace import REFERENCE, SEARCH_CANDIDATES, Study

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
    correct = [correct_values(study, row, seed) for seed in seeds]
    result = {"images": str(len(correct[0]) * len(correct)), "correct, %": with_interval(correct, 100)}
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
    """Return the costs of a row: its training, relative to the reference's, and the sampling of an image."""
    sampling = {"sampling cost": sampling_cost(study, row)}
    if row.recipe is None:
        return sampling
    steps = study.steps_of(row.recipe)
    cost = steps * study.flops_of(row.recipe) / (study.args.steps * study.flops_of(REFERENCE))
    training = {"rate": tuned_rate(study, row.recipe), "steps": str(steps), "training cost": f"{cost:.2f}"}
    return training | sampling


def tuned_rate(study: Study, recipe: str) -> str:
    """Return the learning rate and schedule of a recipe, with a mark if the tuned rate is at an end of the grid."""
    rate, schedule = study.tuned_training(recipe)
    is_tuned = RECIPES[recipe].rate is None and len(study_rows.LEARNING_RATES) > 1
    ends = (min(study_rows.LEARNING_RATES), max(study_rows.LEARNING_RATES))
    return f"{rate:.3g}, {schedule}" + (" (end of the grid)" if is_tuned and rate in ends else "")


def sampling_cost(study: Study, row: Row) -> str:
    """Return the cost of an image of a row: passes over all tokens by the transformer, or steps of an optimization."""
    if row.system == "real":
        return "-"
    if row.is_small:
        return f"{study.args.optimization_steps} steps of {study.args.cutouts} views"
    candidates = SEARCH_CANDIDATES if row.system == "search" else row.best_of / row.keep
    passes = candidates * (1 if study.tuned_params(row).guidance_scale == 1 else 2)
    return f"{passes:g} pass{'es' * (passes != 1)}"


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
        "schedule of each row are those of the grid with the lowest validation loss, unless the row says its rate; at "
        "an end of the grid, a better rate may lie beyond it. Sampling parameters are those that are best on the "
        f"tuning split. Seeds {seed_list(study)}. In parentheses: 95 % bootstrap intervals over seeds and images; for "
        "FID, precision and recall the range over the seeds. FID is omitted for rows with fewer images. Sampling cost: "
        "passes of the transformer over all tokens of an image, twice as many with guidance, or steps of an "
        f"optimization. {clip_note(study)} {evaluator_error(study)}\n\n"
    )


def clip_note(study: Study) -> str:
    """Return a sentence that says which CLIP scores the images."""
    if study.second_clip is None:
        return (
            "There is no independent CLIP (--second-clip): the CLIP that scores images is the one that they were "
            "conditioned on, selected by or optimized for."
        )
    return "The independent CLIP (--second-clip) has conditioned, selected and optimized nothing."


def seed_list(study: Study) -> str:
    """Return the seeds as text."""
    return ", ".join(map(str, study.args.seeds))


def evaluator_error(study: Study) -> str:
    """Return a sentence about the accuracy of the evaluator or classifier."""
    if study.is_shapes:
        correct = [correct_values(study, REAL, seed) for seed in study.args.seeds]
        return f"The rules accept {with_interval(correct, 100, 2)} % of the real images."
    return accuracy_sentence(study.classifier[1])


def differences(study: Study, rows: Sequence[Row], baseline: Row) -> str:
    """Return a table of the differences to a baseline row; an interval that includes 0 shows no effect."""
    base = [correct_values(study, baseline, seed) for seed in study.args.seeds]
    lines = []
    for row in rows:
        if row != baseline and not row.is_small:
            correct = [correct_values(study, row, seed) for seed in study.args.seeds]
            low, high = difference_interval(correct, base)
            effect = "yes" if low > 0 or high < 0 else "no"
            mean = (
                torch.stack([group.mean() for group in correct]).mean() - torch.stack([g.mean() for g in base]).mean()
            )
            cell = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            lines.append((row.name, {f"correct, % more than {baseline.name!r}": cell, "effect shown": effect}))
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
