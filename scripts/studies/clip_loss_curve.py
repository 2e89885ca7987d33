"""The curve of the CLIP loss: the effect of Eq. 9, by its weight lambda, form and gradient estimator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from clipgen.images import save_png
from clipgen.visualization import interval_chart
from studies.results import clip_values, correct_values, mean_and_interval
from studies.rows import CURVE_FORMS, Row, curve_name, curve_recipe
from studies.workspace import Study

ValuesFn = Callable[[Row, int], Tensor]  # row, seed -> values (N,)


def draw_clip_loss_curves(study: Study, rows: Sequence[Row], weights: Sequence[float]) -> None:
    """Draw the share of correct images and the CLIP scores over lambda, with 95 % intervals."""

    def correct(row: Row, seed: int) -> Tensor:
        return 100 * correct_values(study, row, seed)

    charts: dict[str, tuple[str, ValuesFn]] = {"correct": ("correct, %", correct)}
    for name in study.metrics.clips:

        def score(row: Row, seed: int, name: str = name) -> Tensor:
            return clip_values(study, row, seed, name)

        charts[f"clip_{name}"] = (f"CLIP score ({name})", score)
    for file, (label, values) in charts.items():
        draw(study, rows, weights, values, label, file)


def draw(study: Study, rows: Sequence[Row], weights: Sequence[float], values: ValuesFn, label: str, file: str) -> None:
    """Draw one chart: a line per form of the loss, and the row without it."""
    by_recipe = {row.recipe: row for row in rows}
    series = {}
    for form, estimator in CURVE_FORMS:
        points = []
        for weight in weights:
            row = by_recipe[curve_recipe(form, estimator, weight)]
            points.append((weight, *mean_and_interval([values(row, seed) for seed in study.args.seeds])))
        series[curve_name(form, estimator)] = points
    baseline = mean_and_interval([values(by_recipe["no_clip_loss"], seed) for seed in study.args.seeds])[0]
    save_png(interval_chart(series, "lambda", label, baseline), study.output / f"curve_{file}.png")
