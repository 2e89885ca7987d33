"""Compare the paper's method, a public recipe, ours and the baselines, at equal budget and with one tokenizer.

    python -m clipgen study shapes --output study/shapes
    python -m clipgen study cifar10 --data data/cifar10 --clip runs/cifar10-clip --vqgan RUN --output study/cifar10
    python -m clipgen study shapes --output study/shapes --rows gap       # ways to close the modality gap
    python -m clipgen study shapes --output study/shapes --rows search    # Tables 1 and 2, Figure 2 of the search
    python -m clipgen study shapes --output study/shapes --rows curve     # the CLIP loss over its weight
    python -m clipgen study shapes --output study/shapes --rows biggan --generator biggan:FILE    # BigGAN-CLIP alone

All transformers are trained on one token cache, with equal floating-point operations (--equal steps: as many steps).
Rate and schedule of each row are tuned on one small grid, its sampling parameters on prompts (CIFAR-10: seeds) that
are not reported. --second-clip names a CLIP of another seed and other data, which scores the images of the first one;
for CIFAR-10 the first one (--clip) is then trained on the other half of the shards:

    python -m clipgen train_shapes_clip --output runs/second-clip --seed 1
    python -m clipgen train_clip --data data/cifar10 --output runs/first-clip --shards 'train-00000[0-4].tar'
    python -m clipgen train_clip --data data/cifar10 --output runs/second-clip --seed 1 --shards 'train-00000[5-9].tar'

Existing results are kept: an interrupted study resumes, and --seeds may be extended.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from studies import rows as study_rows
from studies.clip_loss_curve import draw_clip_loss_curves
from studies.results import cells, combined_grid, differences, explanation, markdown
from studies.rows import Row
from studies.search_tables import search_tables
from studies.workspace import Study

from clipgen.cli.console import set_up_logging
from clipgen.images import save_png
from clipgen.storage.files import atomic_write, read_json, user_path, write_json
from clipgen.storage.resumable_store import require_same_identity
from clipgen.storage.run_lock import hold_lock


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["shapes", "cifar10"], help="dataset and sizes of the models")
    parser.add_argument("--output", type=user_path, required=True, help="folder of the study")
    parser.add_argument(
        "--rows",
        choices=["systems", "gap", "search", "curve", "biggan"],
        default="systems",
        help="table (default: systems)",
    )
    add_models(parser.add_argument_group("data and frozen models"))
    add_budget(parser.add_argument_group("budget and sizes"))
    return parser


def add_models(group: argparse._ArgumentGroup) -> None:
    """Add the options of the frozen models."""
    group.add_argument("--data", type=user_path, help="shards of python -m clipgen make_shards, for cifar10")
    group.add_argument("--clip", default="shapes", help="folder of python -m clipgen train_clip, for cifar10")
    group.add_argument("--second-clip", help="another CLIP that only scores (default: none)")
    group.add_argument(
        "--generator", help="biggan:FILE of the row BigGAN-CLIP, as python -m clipgen train_generator writes it"
    )
    group.add_argument("--vqgan", help="run of stage 1 (default: the bundled one for shapes)")
    group.add_argument(
        "--classifier",
        type=user_path,
        default=Path("runs/classifier/classifier.pt"),
        help="file of python -m clipgen train_classifier, for cifar10 (default: %(default)s)",
    )


def add_budget(group: argparse._ArgumentGroup) -> None:
    """Add the options of budget and sizes."""
    group.add_argument(
        "--equal", choices=["flops", "steps"], default="flops", help="what is equal for all rows (default: flops)"
    )
    group.add_argument(
        "--steps", type=int, default=600, help="steps of the row without the CLIP loss (default: %(default)s)"
    )
    numbers = {
        "--num-images": (576, "images per row and seed"),
        "--num-optimized": (48, "images per seed of VQGAN-CLIP and BigGAN-CLIP"),
        "--num-tuning": (288, "images per sampling setting that is tried"),
        "--num-reference": (5000, "real images of the reference, for shapes"),
        "--train-size": (12_000, "training images, for shapes"),
        "--search-images": (100, "images per search"),
        "--optimization-steps": (300, "steps of VQGAN-CLIP and BigGAN-CLIP"),
        "--cutouts": (32, "augmented views per step of VQGAN-CLIP and BigGAN-CLIP"),
    }
    for name, (default, text) in numbers.items():
        group.add_argument(name, type=int, default=default, help=f"{text} (default: %(default)s)")
    group.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training runs (default: 0 1 2)"
    )
    group.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=study_rows.CURVE_WEIGHTS,
        help="weights of the CLIP loss in --rows curve (default: %(default)s)",
    )


def rows_of(study: Study) -> list[Row]:
    """Return the rows of the requested table."""
    if study.args.rows == "systems":
        return study_rows.system_rows() + ([study_rows.BIGGAN_CLIP] if study.args.generator else [])
    if study.args.rows == "gap":
        return study_rows.gap_rows(study.setting)
    if study.args.rows == "biggan":
        return [study_rows.REAL, study_rows.BIGGAN_CLIP]
    return study_rows.curve_rows(study.args.weights)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute a table in a folder that no other process uses."""
    args = make_parser().parse_args(argv)
    if args.rows == "biggan" and not args.generator:
        raise SystemExit("--rows biggan needs --generator biggan:FILE; python -m clipgen train_generator makes one")
    set_up_logging()
    args.output.mkdir(parents=True, exist_ok=True)
    with hold_lock(args.output):
        require_same_settings(args)
        run(Study(args))


def require_same_settings(args: argparse.Namespace) -> None:
    """Exit if the folder contains results of other settings, which would appear in one table with new ones."""
    free = ("output", "rows", "seeds", "weights", "generator")
    settings = {name: str(value) for name, value in vars(args).items() if name not in free}
    path = args.output / "study.json"
    try:
        require_same_identity(args.output, read_json(path) if path.is_file() else settings, settings)
    except ValueError as error:
        raise SystemExit(f"python -m clipgen study: error: {error}") from error
    write_json(path, settings)


def run(study: Study) -> None:
    """Compute a table, row by row, the differences to its baseline, and the grid of its images."""
    args = study.args
    if args.rows == "search":
        return write(args.output / "search.md", search_tables(study))
    rows = rows_of(study)
    # The first row that is trained, if there is one.
    baseline = next((row for row in rows if row.recipe in ("no_clip_loss", "dropout")), rows[0])
    table = []
    for row in rows:
        table.append((row.name, cells(study, row)))
        write(args.output / f"{args.rows}.md", explanation(study) + markdown(table))
    write(args.output / f"{args.rows}_differences.md", differences(study, rows, baseline))
    save_png(combined_grid(study, rows), args.output / f"{args.rows}.png")
    if args.rows == "curve":
        draw_clip_loss_curves(study, rows, args.weights)


def write(path: Path, text: str) -> None:
    """Write the table so far, and print it."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
