"""``clipgen-demo``: both stages from scratch on shapes, pictures of 200 sentences, and a judge's verdict."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipgen.cli.console import guarded

START = time.perf_counter()
PROMPTS = 200
SAMPLING = {"temperature": 1.0, "top_k": 300, "top_p": 0.8}  # of the paper's values for p, the surer


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-demo", run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("clipgen-demo", description=__doc__)
    p.add_argument(
        "--output", type=Path, default=Path("demo"), help="folder for pictures and report (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "overrides", nargs="*", help="configuration of both stages, as for clipgen-train: trainer.max_steps=100"
    )
    return p


def run() -> None:
    """Train, sample, judge, report."""
    args = parser().parse_args()
    seconds: dict[str, float] = {}
    with timed(seconds, "imports"):
        from clipgen.cli import train
        from clipgen.pipeline import TextToImage
    vqgan, transformer = args.output / "vqgan", args.output / "transformer"
    for name, config in configs(args.output, args.seed, args.overrides).items():
        print(f"Training stage={name} ...")
        with timed(seconds, name):
            train.train(config)
    with timed(seconds, "sampling"):
        pipe = TextToImage.load(transformer)
        accuracy = sample_and_judge(pipe, args.output / "grid.png", args.seed)
    with timed(seconds, "plots"):
        draw_reconstructions(pipe, args.output / "reconstructions.png")
        draw_losses([vqgan / "metrics.csv", transformer / "metrics.csv"], args.output / "losses.png")
    seconds["total"] = time.perf_counter() - START
    settings = {"seed": args.seed, "overrides": args.overrides, "prompts": PROMPTS, "sampling": SAMPLING}
    report(args.output, accuracy, seconds, settings)


def configs(output: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The configuration of each stage, composed before the first begins."""
    from clipgen.cli.config import composed

    for override in overrides:
        if override.split("=")[0] in ("stage", "output", "vqgan"):
            raise ValueError(f"overrides must leave stage, output and vqgan to the demo, got {override}")
    found = {
        stage: composed(f"stage={stage}", "experiment=shapes", "logger=csv", f"seed={seed}", *overrides)
        for stage in ("vqgan", "transformer")
    }
    for stage, config in found.items():  # not as overrides: Hydra's grammar breaks on some paths
        config.output = str(output / stage)
    found["transformer"].vqgan = str(output / "vqgan")
    return found


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
    write_json(output / "report.json", content)
    print(f"\n{PROMPTS} sentences, none seen in training; part of the pictures that the judge finds right:")
    for name, value in accuracy.items():
        print(f"  {name:<11} {value:6.1%}")
    print("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"Look at {output}/grid.png, reconstructions.png, losses.png; then try")
    prompt = '"a large blue ring on a white background" --top-p 0.8'
    print(f"  clipgen-sample --checkpoint {output}/transformer --prompt {prompt}")


if __name__ == "__main__":
    main()
