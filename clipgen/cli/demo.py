"""``clipgen-demo``: both stages from scratch on shapes, pictures of 200 sentences, and a judge's verdict."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipgen.cli.console import guarded
from clipgen.cli.list_runs import free_folder

START = time.perf_counter()
PROMPTS = 200
REPORT = "report.json"
SHARES = {"vqgan": 1.0, "transformer": 4 / 9}  # of --steps
STEP_COST = 2.5  # a step of stage 2 in steps of stage 1; 1.7 to 3.2 were measured, by the kind of processor
LONG, SHORT = 600, 360  # seconds after which --steps is named, and with how many
EXAMPLE = "a large blue ring on a white background"
SAMPLING = {"temperature": 1.0, "top_k": 300, "top_p": 0.8}  # of the paper's values for p, the surer


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-demo", run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("clipgen-demo", description=__doc__)
    p.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        help="folder for pictures and report; if it holds another demo, FOLDER-2, FOLDER-3, ... (default: %(default)s)",
    )
    p.add_argument("--resume", action="store_true", help="continue the demo in --output that was stopped")
    p.add_argument(
        "--steps",
        type=int,
        help="training steps of the tokenizer, of which the transformer takes 4/9: "
        "fewer are faster and less accurate (default: 1800)",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    p.add_argument(
        "overrides", nargs="*", help="configuration of both stages, as for clipgen-train: model.learning_rate=1e-3"
    )
    return p


def run() -> None:
    """Train, sample, judge, report."""
    args = parser().parse_intermixed_args()
    seconds: dict[str, float] = {}
    settings = settle(args)
    stages = configs(args.output, args.seed, args.steps, args.overrides)
    print(plan(args.output, stages), flush=True)
    with timed(seconds, "imports"):
        from clipgen.cli.output_dir import output_folder
        from clipgen.files import write_json
        from clipgen.pipeline import TextToImage
    with output_folder(args.output, keep_pattern="*/checkpoints/*.ckpt"):
        write_json(args.output / REPORT, {"settings": settings})  # for --resume
        train_stages(stages, args.output, seconds)
    with timed(seconds, "sampling"):
        pipe = TextToImage.load(args.output / "transformer")
        accuracy = sample_and_judge(pipe, args.output / "grid.png", args.seed)
    with timed(seconds, "plots"):
        draw_reconstructions(pipe, args.output / "reconstructions.png")
        draw_losses([args.output / stage / "metrics.csv" for stage in stages], args.output / "losses.png")
    seconds["total"] = time.perf_counter() - START
    report(args.output, accuracy, seconds, settings)


def settle(args: argparse.Namespace) -> dict[str, Any]:
    """Choose the folder, and take the settings of a demo that is resumed; return them for the report.

    Raises:
        FileNotFoundError: there is no demo to resume.
        ValueError: steps are out of range, or a resumed demo is given settings of its own.
    """
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"steps must be at least 1, got {args.steps}")
    if args.resume:
        if args.overrides or args.steps is not None:
            raise ValueError("resume continues a demo with its own settings: leave out --steps and overrides")
        path = args.output / REPORT
        if not path.is_file():
            raise FileNotFoundError(f"no demo to resume in {args.output}: there is no {path}")
        found = json.loads(path.read_text("utf-8"))["settings"]
        args.seed, args.steps, args.overrides = found["seed"], found.get("steps"), found["overrides"]
    else:
        asked, args.output = args.output, free_folder(args.output, REPORT)
        if asked != args.output and not (asked / "grid.png").is_file():
            print(f"{asked} holds a demo that was stopped: {resume_command(asked)} continues it")
    return {
        "seed": args.seed,
        "steps": args.steps,
        "overrides": args.overrides,
        "prompts": PROMPTS,
        "sampling": SAMPLING,
    }


def resume_command(output: Path) -> str:
    """Return the command that continues a demo."""
    return "clipgen-demo --resume" + (f" --output {shlex.quote(str(output))}" if output != Path("demo") else "")


def configs(output: Path, seed: int, steps: int | None, overrides: list[str]) -> dict[str, Any]:
    """The configuration of each stage, composed before the first begins."""
    from clipgen.cli.config import composed

    for override in overrides:
        if override.split("=")[0] in ("stage", "output", "vqgan"):
            raise ValueError(f"overrides must leave stage, output and vqgan to the demo, got {override}")
    stages = {}
    for stage, share in SHARES.items():
        fewer = [] if steps is None else [f"trainer.max_steps={max(round(steps * share), 1)}"]
        settings = [f"stage={stage}", "experiment=shapes", "logger=csv", f"seed={seed}", *fewer, *overrides]
        config = stages[stage] = composed(*settings)
        if not isinstance(config.trainer.max_steps, int):
            raise TypeError(f"trainer.max_steps must be int, got {config.trainer.max_steps!r}")
        config.output = str(output / stage)  # not as overrides: Hydra's grammar breaks on some paths
        if (output / stage / "checkpoints" / "last.ckpt").is_file():
            config.resume = config.output
    stages["transformer"].vqgan = str(output / "vqgan")
    return stages


def plan(output: Path, stages: dict[str, Any]) -> str:
    """Return what the demo is going to do."""
    vqgan, transformer = (config.trainer.max_steps for config in stages.values())
    return (
        f"clipgen-demo trains a tokenizer ({vqgan} steps) and a transformer ({transformer} steps) on images of shapes, "
        f"then draws {PROMPTS} sentences and judges the images. All files go to {output}/. It takes 4 to 6 minutes on "
        "two CPU cores at the default steps; the time left is shown after some steps. Ctrl-C saves and stops."
    )


def train_stages(stages: dict[str, Any], output: Path, seconds: dict[str, float]) -> None:
    """Train the stages that are not finished."""
    from clipgen.cli import train
    from clipgen.cli.list_runs import finished_model
    from clipgen.training.progress import TotalTime

    for name, config in stages.items():
        if finished_model(output / name, name):
            print(f"Finished before: stage={name}")
            continue
        print(f"Training stage={name} ...", flush=True)
        later = stages["transformer"].trainer.max_steps * STEP_COST if name == "vqgan" else 0
        with timed(seconds, name):
            train.train(config, callbacks=[TotalTime(later, tell_time)], resume_by=resume_command(output))


def tell_time(stage: float, total: float) -> None:
    """Print the time left in this stage and in all, and what to do where it is long."""
    from clipgen.training.progress import duration

    print(f"About {duration(total)} left, {duration(stage)} of it in this stage", flush=True)
    if total > LONG:
        print(
            f"This machine is slow for the demo: --steps {SHORT} would take a fifth of the time, with less accurate "
            f'images; without training, clipgen-sample "{EXAMPLE}" draws from the bundled model',
            flush=True,
        )


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note how long a part took."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def sample_and_judge(pipe: Any, path: Path, seed: int) -> dict[str, float]:
    """Draw one picture for each of 200 sentences and read them back."""
    import torch

    from clipgen.data.shapes import ALL_ATTRIBUTES
    from clipgen.evaluation.shapes_evaluator import accuracy
    from clipgen.images import grid, save_png, to_pil

    order = torch.randperm(len(ALL_ATTRIBUTES), generator=torch.Generator().manual_seed(seed))[:PROMPTS]
    attributes = [ALL_ATTRIBUTES[i] for i in order]
    prompts = [str(a) for a in attributes]
    images = pipe.generate(pipe.clip.encode_text(prompts), seed, **SAMPLING)
    save_png(grid(to_pil(images), columns=20, captions=prompts, cell=96), path)
    return accuracy(images, attributes)


def draw_reconstructions(pipe: Any, path: Path) -> None:
    """Fresh renders beside what the tokenizer makes of them."""
    import torch

    from clipgen.data.shapes import ShapesDataset
    from clipgen.images import grid, save_png, to_pil

    images = ShapesDataset(32, seed=123_456).render(range(32))
    with torch.no_grad():
        pairs = torch.stack([images, pipe.vqgan(images)], dim=1).flatten(0, 1)
    save_png(grid(to_pil(pairs), columns=16, cell=96), path)


def draw_losses(files: list[Path], path: Path) -> None:
    """Training and validation curves of both stages."""
    from matplotlib.figure import Figure

    from clipgen.files import atomic_write

    columns = {"vqgan": ("reconstruction_loss", "commitment_loss"), "transformer": ("cross_entropy",)}
    figure = Figure(figsize=(5 * len(files), 3.5), layout="constrained")
    for axis, file in zip(figure.subplots(1, len(files)), files):
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        for name in (f"{split}/{column}" for column in columns[file.parent.name] for split in ("train", "val")):
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            axis.plot(*zip(*points), label=name, marker="o" if name.startswith("val") else None)
        axis.set(title=f"stage={file.parent.name}", xlabel="step", yscale="log")
        axis.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def report(output: Path, accuracy: dict[str, float], seconds: dict[str, float], settings: dict[str, Any]) -> None:
    """Write report.json and print a short table."""
    from clipgen.files import read_json, write_json

    content = {
        "accuracy": accuracy,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "versions": read_json(output / "transformer" / "versions.json"),
        "settings": settings,
    }
    write_json(output / REPORT, content)
    print(f"\n{PROMPTS} sentences, none seen in training; part of the pictures that the judge finds right:")
    for name, value in accuracy.items():
        print(f"  {name:<11} {value:6.1%}")
    print("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"Look at {output}/grid.png, reconstructions.png, losses.png; then try")
    print(f'  clipgen-sample --checkpoint {shlex.quote(str(output))}/transformer --prompt "{EXAMPLE}" --top-p 0.8')


if __name__ == "__main__":
    main()
