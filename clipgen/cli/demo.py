"""The command ``clipgen-demo``: train both stages on shapes, and check generated images of 200 prompts."""

from __future__ import annotations

import argparse
import csv
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from clipgen.cli.console import print_line, run_command
from clipgen.progress import duration
from clipgen.storage.files import one_line, user_path
from clipgen.storage.output_folder import free_folder

START_TIME = time.perf_counter()
DESCRIPTION = (
    "Train a tokenizer and a transformer on images of shapes from scratch, generate images of 200 prompts, and count "
    "how many of them show what the prompt says."
)
NUM_PROMPTS = 200
REPORT = "report.json"
DEFAULT_OUTPUT = Path("demo")
# Training steps of each stage as a fraction of --steps.
STEP_FRACTIONS = {"vqgan": 1.0, "transformer": 4 / 9}
# Duration of a step of stage 2 in steps of stage 1; 1.7 to 3.2 were measured, depending on the processor.
STEP_COST = 2.5
# If the demo takes more than this many seconds, it suggests --steps with this number.
MAX_SECONDS = 600
FEWER_STEPS = 360
EXAMPLE_PROMPT = "a large blue ring on a white background"
# The lower of the paper's two values for top_p, which is more accurate.
SAMPLING = {"temperature": 1.0, "top_k": 300, "top_p": 0.8}
# Types of the settings in the report that a resumed demo reads.
SETTING_TYPES = {"seed": int, "steps": int | None, "overrides": list[str]}
# Keys that the demo sets itself. It plots what logger=csv writes.
DEMO_KEYS = ("stage", "output", "vqgan", "resume", "logger")
# Losses that are plotted, without the prefix train/ or val/.
PLOTTED_LOSSES = {"vqgan": ("reconstruction_loss", "commitment_loss"), "transformer": ("cross_entropy",)}


def main() -> None:
    """Run the command."""
    run_command("clipgen-demo", run)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser("clipgen-demo", description=DESCRIPTION)
    parser.add_argument(
        "--output",
        type=user_path,
        default=DEFAULT_OUTPUT,
        help="folder for images and report; FOLDER-2, FOLDER-3, ... if it contains another demo (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="resume the interrupted demo in --output")
    parser.add_argument(
        "--steps",
        type=int,
        help="training steps of the tokenizer; the transformer takes 4/9 of them. "
        "Fewer are faster and less accurate (default: 1800)",
    )
    parser.add_argument("--seed", type=int, help="random seed (default: 0)")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="settings of both stages, as for clipgen-train, such as model.optimizer.learning_rate=1e-3",
    )
    return parser


def run() -> None:
    """Train, generate, evaluate and report."""
    args = make_parser().parse_intermixed_args()
    seconds: dict[str, float] = {}
    settings = choose_settings(args)
    stages = compose_stages(args.output, args.seed, args.steps, args.overrides)
    print_line(describe_plan(args.output, stages))
    with timed(seconds, "imports"):
        from clipgen.pipeline import TextToImage
        from clipgen.storage.files import write_json
        from clipgen.storage.output_folder import output_folder
    with output_folder(args.output, keep_pattern="*/checkpoints/*.ckpt"):
        # --resume reads the settings from the report.
        write_json(args.output / REPORT, {"settings": settings})
        train_stages(stages, args.output, seconds)
    with timed(seconds, "sampling"):
        pipe = TextToImage.load(args.output / "transformer")
        accuracy = generate_and_evaluate(pipe, args.output / "grid.png", args.seed)
    # The report is written before the plots, whose errors must not lose the result.
    write_report(args.output, accuracy, seconds, settings)
    with timed(seconds, "plots"):
        save_reconstructions(pipe, args.output / "reconstructions.png")
        plot_losses([args.output / stage / "metrics.csv" for stage in stages], args.output / "losses.png")
    seconds["total"] = time.perf_counter() - START_TIME
    write_report(args.output, accuracy, seconds, settings)
    print_results(args.output, accuracy, seconds)


# ------------------------------------------------------------------------------------------------------------ settings


def choose_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Choose the folder, and read the settings of a demo that is resumed; return them for the report.

    Raises:
        FileNotFoundError: there is no demo to resume.
        ValueError: the steps are out of range, or a resumed demo is given settings of its own.
    """
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"steps must be at least 1, got {args.steps}")
    if args.resume:
        read_settings(args)
    else:
        args.seed = args.seed or 0
        choose_folder(args)
    return {
        "seed": args.seed,
        "steps": args.steps,
        "overrides": args.overrides,
        "prompts": NUM_PROMPTS,
        "sampling": SAMPLING,
    }


def read_settings(args: argparse.Namespace) -> None:
    """Take the settings of the demo that is resumed from its report."""
    if args.overrides or args.steps is not None or args.seed is not None:
        raise ValueError("--resume uses the settings of the interrupted demo: leave out --steps, --seed and overrides")
    path = args.output / REPORT
    if not path.is_file():
        raise FileNotFoundError(f"no demo to resume in {args.output}: there is no {path}")
    from clipgen.cli.resume_args import harmless_arguments
    from clipgen.storage.files import read_json
    from clipgen.type_checks import check_values

    settings = read_json(path, "settings")["settings"]
    try:
        check_values({name: settings.get(name) for name in SETTING_TYPES}, SETTING_TYPES)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    args.seed = settings["seed"]
    args.steps = settings.get("steps")
    # The folder may come from somebody else.
    args.overrides = list(harmless_arguments(settings["overrides"], path).values())


def choose_folder(args: argparse.Namespace) -> None:
    """Choose a folder without another demo, and print the command that resumes an interrupted one."""
    requested = args.output
    args.output = free_folder(requested, REPORT)
    if args.output != requested and not (requested / "grid.png").is_file():
        print_line(f"{requested} contains an interrupted demo: {resume_command(requested)} resumes it")


def resume_command(output: Path) -> str:
    """Return the command that resumes a demo."""
    option = "" if output == DEFAULT_OUTPUT else f" --output {shlex.quote(str(output))}"
    return f"clipgen-demo --resume{option}"


def compose_stages(output: Path, seed: int, steps: int | None, overrides: list[str]) -> dict[str, Any]:
    """Return the configuration of each stage, so that errors appear before the first one is trained."""
    from clipgen.cli.config import compose_config

    for override in overrides:
        section = override.split("=")[0].lstrip("+~").split(".")[0]
        if section in DEMO_KEYS:
            raise ValueError(f"overrides must leave {', '.join(DEMO_KEYS)} to the demo, got {override}")
    stages = {}
    for stage, fraction in STEP_FRACTIONS.items():
        max_steps = [] if steps is None else [f"trainer.max_steps={max(round(steps * fraction), 1)}"]
        defaults = [f"stage={stage}", "experiment=shapes", "logger=csv", f"seed={seed}"]
        config = compose_config(*defaults, *max_steps, *overrides)
        if not isinstance(config.trainer.max_steps, int):
            raise TypeError(f"trainer.max_steps must be int, got {config.trainer.max_steps!r}")
        # This is not an override, because Hydra's grammar does not accept all paths.
        config.output = str(output / stage)
        if (output / stage / "checkpoints" / "last.ckpt").is_file():
            config.resume = config.output
        stages[stage] = config
    stages["transformer"].vqgan = str(output / "vqgan")
    return stages


def describe_plan(output: Path, stages: dict[str, Any]) -> str:
    """Return a description of the steps of the demo."""
    return (
        f"clipgen-demo trains a tokenizer ({stages['vqgan'].trainer.max_steps} steps) and a transformer "
        f"({stages['transformer'].trainer.max_steps} steps) on images of shapes, then generates an image of each of "
        f"{NUM_PROMPTS} prompts and checks them. All files go to {output}/. With the default steps it takes 3 to 6 "
        "minutes on two CPU cores; the time left is shown after the first steps. Ctrl-C saves a checkpoint and stops."
    )


# ------------------------------------------------------------------------------------------------------------ training


def train_stages(stages: dict[str, Any], output: Path, seconds: dict[str, float]) -> None:
    """Train the stages that are not finished."""
    from clipgen.cli.train import train_from_config
    from clipgen.runs import finished_model
    from clipgen.training.callbacks import TimeForecast

    for stage, config in stages.items():
        if finished_model(output / stage, stage):
            print_line(f"stage={stage} is already trained")
            continue
        print_line(f"Training stage={stage} ...")
        later_steps = stages["transformer"].trainer.max_steps * STEP_COST if stage == "vqgan" else 0
        forecast = TimeForecast(partial(print_forecast, stages["vqgan"].trainer.max_steps, later_steps))
        with timed(seconds, stage):
            train_from_config(config, callbacks=[forecast], resume_command=resume_command(output))


def print_forecast(steps: int, later_steps: float, steps_left: float, seconds_per_step: float) -> None:
    """Print the time left in this stage and in all, and what to do if it is long.

    Args:
        steps: value of --steps.
        later_steps: cost of the later stages, in steps of this one.
        steps_left: steps left in this stage.
        seconds_per_step: duration of a step of this stage.
    """
    stage_seconds = steps_left * seconds_per_step
    total_seconds = (steps_left + later_steps) * seconds_per_step
    print_line(f"About {duration(total_seconds)} left, {duration(stage_seconds)} of it in this stage")
    if total_seconds > MAX_SECONDS:
        print_line(f"The demo is slow on this machine. {faster_demo(steps)}")


def faster_demo(steps: int) -> str:
    """Return advice for a demo that takes long with its value of --steps."""
    without_training = f'clipgen-sample "{EXAMPLE_PROMPT}" uses the bundled model, without training'
    if steps <= FEWER_STEPS:
        return without_training
    return (
        f"--steps {FEWER_STEPS} would take {FEWER_STEPS / steps:.0%} of the time, with less accurate images; "
        f"{without_training}"
    )


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Measure the duration of a part of the demo."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------------- results


def generate_and_evaluate(pipe: Any, path: Path, seed: int) -> dict[str, float]:
    """Generate an image of each prompt, save them as a grid, and return the accuracy of each attribute."""
    import torch

    from clipgen.data.shapes import ALL_ATTRIBUTES
    from clipgen.evaluation.shapes_evaluator import accuracy
    from clipgen.images import save_png, to_pil
    from clipgen.visualization import grid

    order = torch.randperm(len(ALL_ATTRIBUTES), generator=torch.Generator().manual_seed(seed))
    attributes = [ALL_ATTRIBUTES[i] for i in order[:NUM_PROMPTS]]
    prompts = [str(a) for a in attributes]
    images = pipe.generate(pipe.clip.encode_text(prompts), seed, **SAMPLING)
    save_png(grid(to_pil(images), columns=20, captions=prompts, cell=96), path)
    return accuracy(images, attributes)


def save_reconstructions(pipe: Any, path: Path) -> None:
    """Save new images next to their reconstructions by the tokenizer."""
    import torch

    from clipgen.data.shapes import ShapesDataset
    from clipgen.images import save_png, to_pil
    from clipgen.visualization import grid

    images = ShapesDataset(32, seed=123_456).render(range(32))
    with torch.no_grad():
        pairs = torch.stack([images, pipe.vqgan(images)], dim=1).flatten(0, 1)
    save_png(grid(to_pil(pairs), columns=16, cell=96), path)


def plot_losses(files: list[Path], path: Path) -> None:
    """Plot the training and validation losses of both stages."""
    from matplotlib.figure import Figure

    from clipgen.storage.files import atomic_write

    figure = Figure(figsize=(5 * len(files), 3.5), layout="constrained")
    for axis, file in zip(figure.subplots(1, len(files)), files):
        stage = file.parent.name
        for name, points in read_losses(file, stage).items():
            axis.plot(*zip(*points), label=name, marker="o" if name.startswith("val") else None)
        axis.set(title=f"stage={stage}", xlabel="step", yscale="log")
        axis.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def read_losses(file: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of the plotted losses in a ``metrics.csv``, by name."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    losses = {}
    for name in PLOTTED_LOSSES[stage]:
        for split in ("train", "val"):
            key = f"{split}/{name}"
            losses[key] = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
    return losses


def write_report(output: Path, accuracy: dict[str, float], seconds: dict[str, float], settings: dict[str, Any]) -> None:
    """Write ``report.json``."""
    from clipgen.storage.files import read_json, write_json

    report = {
        "accuracy": accuracy,
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "versions": read_json(output / "transformer" / "versions.json"),
        "settings": settings,
    }
    write_json(output / REPORT, report)


def print_results(output: Path, accuracy: dict[str, float], seconds: dict[str, float]) -> None:
    """Print the accuracy as a table, the durations and what to do next."""
    print_line("")
    print_line(
        f"Correct images of {NUM_PROMPTS} prompts; the generator has seen none of the prompts, its CLIP has seen all:"
    )
    for name, value in accuracy.items():
        print_line(f"  {name:<11} {value:6.1%}")
    print_line("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print_line(f"See {output}/grid.png, reconstructions.png and losses.png; then try")
    print_line(
        f'  clipgen-sample --checkpoint {shlex.quote(str(output))}/transformer --prompt "{EXAMPLE_PROMPT}" --top-p 0.8'
    )


if __name__ == "__main__":
    main()
