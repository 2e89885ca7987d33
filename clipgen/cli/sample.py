"""``clipgen-sample --prompt "..."``: pictures of sentences, of other pictures, and of what lies between them."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import guarded, rate_bar
from clipgen.cli.device import default_device
from clipgen.cli.output_dir import file_name, output_folder
from clipgen.cli.sampling_args import SETTINGS, add_settings, settings_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from clipgen.generation.prompts import Prompt
    from clipgen.pipeline import Preview, TextToImage

    Named = tuple[str, Prompt]  # for captions and file names

DTYPES = ("float32", "bfloat16")
SHEET = 1000  # pictures on the sheet of all: more are a file that no viewer opens, and gigabytes of memory


def command() -> None:
    """Entry point of the process: it ends when its work is done, where Python would tidy up for a second or two."""
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code)  # type: ignore[arg-type]  # a number: see ``guarded``


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-sample", run)


def parser() -> argparse.ArgumentParser:
    """The command line. Nothing heavy is imported before it is read."""
    p = argparse.ArgumentParser("clipgen-sample", description="Draw pictures of sentences.")
    what = p.add_argument_group("what to draw, any of them several times")
    what.add_argument("--prompt", action="append", default=[], help="a sentence")
    what.add_argument("--prompts-file", type=Path, action="append", default=[], help="a sentence a line")
    what.add_argument("--image", type=Path, action="append", default=[], help="a picture, for variations of it")
    what.add_argument("--mix", action="append", default=[], help='"0.7 a cat + 0.3 a dog"; weights may be negative')
    what.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        action="append",
        default=[],
        help="two sentences: a strip of --num-images pictures between them",
    )
    what.add_argument("--from", type=Path, dest="origin", help="a picture of this command: draw it again, exactly")
    p.add_argument(
        "--complete", type=Path, help="a picture whose upper half is taken over; alone, the rest shall suit it"
    )
    p.add_argument("--num-images", type=int, default=4, help="pictures a prompt (default: %(default)s)")
    p.add_argument(
        "--checkpoint",
        help="stage-2 run folder, checkpoint, pipeline folder or hf-hub: name; default: the "
        "newest finished run below outputs/, else shapes, the bundled model",
    )
    p.add_argument(
        "--output",
        type=Path,
        default=Path("samples"),
        help="folder for the PNGs, whose names end in their seed (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, help="picture i draws from seed + i (default: %(default)s)")
    add_settings(p)
    p.add_argument("--rerank-from", type=int, help="draw so many and keep those that CLIP finds nearest")
    p.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=A,B",
        help="all combinations on one labelled sheet: --sweep top_k=100,300 top_p=0.8,1.0",
    )
    p.add_argument("--preview", action="store_true", help="keep preview.png up to date with the rows drawn so far")
    p.add_argument("--device", help="cpu, cuda, mps (default: the fastest there is)")
    p.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of transformer and decoder (default: %(default)s)"
    )
    p.add_argument("--compile", action="store_true", help="draw by torch.compile: for many pictures on a GPU")
    return p


def run() -> None:
    """Check everything that can be checked, load the model, draw, write."""
    args = parser().parse_args()
    gc.disable()  # collecting garbage during the imports takes a second, and frees hardly anything
    from clipgen.generation.prompts import check_request
    from clipgen.pipeline import TextToImage
    from clipgen.sampling import SamplingParams

    gc.enable()
    if args.origin:
        repeat_(args)
    prompts = read_prompts(args)
    sweeps = read_sweep(args.sweep or [], settings_of(args))
    for settings in sweeps:
        SamplingParams(**settings)
    for prompt in (*(prompt for _, prompt in prompts), *(end for ends in args.interpolate for end in ends)):
        check_request(prompt, args.num_images, args.rerank_from)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {args.seed}")
    complete = read_picture(args.complete) if args.complete else None
    checkpoint = args.checkpoint or newest_run(Path("outputs")) or "shapes"
    with output_folder(args.output, keep="*.png"):
        pipe = prepared(TextToImage.load(checkpoint), args)
        print(f"Model: {'the bundled shapes model' if checkpoint == 'shapes' else checkpoint}")
        if args.origin and args.fingerprint not in (None, pipe.fingerprint):
            raise ValueError(f"{args.origin} was drawn by another model than {checkpoint}: name its --checkpoint")
        draw(pipe, prompts, sweeps, complete, args)


def prepared(pipe: TextToImage, args: argparse.Namespace) -> TextToImage:
    """The model on its device, cast and compiled as asked."""
    import torch

    pipe.to(args.device or default_device(), getattr(torch, args.dtype))
    return pipe.compile() if args.compile else pipe


def draw(
    pipe: TextToImage,
    prompts: list[Named],
    sweeps: list[dict[str, Any]],
    complete: Image.Image | None,
    args: argparse.Namespace,
) -> None:
    """Draw and write every picture, the strips, and the sheet of all pictures."""
    from clipgen.images import grid, save_png

    count = len(prompts) * (args.rerank_from or args.num_images) + len(args.interpolate) * strip_length(args)
    with rate_bar("drawing", count * len(sweeps)) as advance:
        preview = save_preview(args.output) if args.preview else None
        options = dict(seed=args.seed, outpaint=complete, preview=preview, progress=advance)
        drawn = draw_pictures(pipe, prompts, sweeps, options, args)
        draw_strips(pipe, sweeps, options, args)
    if drawn:
        columns = args.num_images if len(prompts) * len(sweeps) > 1 else None
        _, captions, pictures = zip(*sorted(drawn, key=lambda each: each[0]))
        print(save_png(grid(pictures, columns=columns, captions=captions), args.output / "grid.png"))
        if len(drawn) < (every := len(prompts) * len(sweeps) * args.num_images):
            print(f"It shows the first {len(drawn)} of {every} pictures")


def draw_pictures(
    pipe: TextToImage,
    prompts: list[Named],
    sweeps: list[dict[str, Any]],
    options: dict[str, Any],
    args: argparse.Namespace,
) -> list[tuple[int, str, Image.Image]]:
    """Draw and write those of all prompts -> number of prompt and settings, caption, picture, of the first of them."""
    from clipgen.images import save_png

    drawn, labels = [], labels_of(sweeps)
    for row, column, picture in all_of(pipe, prompts, sweeps, options, args):
        number, name, label = row * len(sweeps) + column, prompts[row][0], labels[column]
        file = file_name(f"{number:02d}", name, label, str(picture.info["seed"]))
        print(save_png(picture, args.output / file, picture.info))
        if number * args.num_images < SHEET:
            drawn.append((number, label or name, picture))
    return drawn


def draw_strips(
    pipe: TextToImage, sweeps: list[dict[str, Any]], options: dict[str, Any], args: argparse.Namespace
) -> None:
    """Draw and write what lies between two prompts."""
    from clipgen.generation.prompts import describe
    from clipgen.images import grid, save_png

    labelled = list(zip(labels_of(sweeps), sweeps))
    for (i, (first, second)), (label, settings) in product(enumerate(args.interpolate), labelled):
        strip = pipe.interpolate(first, second, strip_length(args), **options, **settings)
        file = file_name(f"interpolation_{i:02d}", describe(first), describe(second), label)
        print(save_png(grid(strip, columns=len(strip)), args.output / file, strip[0].info))


def strip_length(args: argparse.Namespace) -> int:
    """Pictures of an interpolation: its ends at least."""
    return max(args.num_images, 2)


def labels_of(sweeps: list[dict[str, Any]]) -> list[str]:
    """Each as what tells it from the others."""
    return [" ".join(f"{k}={s[k]}" for k in s if len({t[k] for t in sweeps}) > 1) for s in sweeps]


def all_of(
    pipe: TextToImage,
    prompts: list[Named],
    sweeps: list[dict[str, Any]],
    options: dict[str, Any],
    args: argparse.Namespace,
) -> Iterator[tuple[int, int, Image.Image]]:
    """Every prompt by all settings, as many prompts at once as fit -> index of the prompt, of the settings, picture."""
    guided = any(settings["guidance_scale"] != 1 for settings in sweeps)
    at_once = max(pipe.batch_size(guided) // (args.rerank_from or args.num_images), 1)
    for first, (column, settings) in product(range(0, len(prompts), at_once), enumerate(sweeps)):
        some = [prompt for _, prompt in prompts[first : first + at_once]]
        pictures = pipe(some, args.num_images, rerank_from=args.rerank_from, **options, **settings)
        for i, picture in enumerate(pictures):
            yield first + i // args.num_images, column, picture


def save_preview(folder: Path) -> Preview:
    """What keeps ``preview.png`` of a folder up to date."""
    from clipgen.images import grid, save_png, to_pil

    def save(images: Tensor) -> None:
        save_png(grid(to_pil(images)), folder / "preview.png")

    return save


# ------------------------------------------------------------------------------------------------------- what is asked


def read_prompts(args: argparse.Namespace) -> list[Named]:
    """Everything to draw, but interpolations; a picture to complete stands for itself where nothing else does."""
    from clipgen.generation.prompts import describe, parse_mixture, read_sentences

    lines = [line for file in args.prompts_file for line in read_sentences(file)]
    mixtures = [parse_mixture(mix) if isinstance(mix, str) else mix for mix in args.mix]
    prompts: list[Named] = [(describe(prompt), prompt) for prompt in (*args.prompt, *lines, *mixtures)]
    images = args.image or [args.complete] * bool(args.complete and not (prompts or args.interpolate))
    prompts += [(path.stem, read_picture(path)) for path in images]
    if not prompts and not args.interpolate:
        ways = "--prompt, --prompts-file, --image, --mix, --complete, --interpolate or --from"
        raise ValueError(f"there must be something to draw: give {ways}")
    return prompts


def read_picture(path: Path) -> Image.Image:
    """A picture file."""
    from clipgen.data.decoding import UnusableImageError, decode_image

    if not path.is_file():
        raise FileNotFoundError(f"no picture {path}")
    try:
        return decode_image(path)
    except UnusableImageError as error:
        raise ValueError(f"{path} cannot be used as an image: {error}") from error


def read_sweep(sweep: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """``["top_k=1,2", "top_p=0.8"]`` -> all combinations, over the other settings."""
    axes = []
    for text in sweep:
        key, _, values = text.partition("=")
        try:
            axes.append([(key, SETTINGS[key][0](value)) for value in values.split(",")])
        except (KeyError, ValueError):
            names = ", ".join(SETTINGS)
            raise ValueError(f"sweep must be KEY=VALUE,VALUE with a key of {names}, got {text!r}") from None
    return [settings | dict(choice) for choice in product(*axes)]


def repeat_(args: argparse.Namespace) -> None:
    """Take over from a picture's metadata what made it."""
    from PIL import Image

    try:
        with Image.open(args.origin) as picture:
            picture.load()
            found = dict(getattr(picture, "text", {}))
        known = {name: json.loads(found[name]) for name in ("seed", *SETTINGS)}
        strip, args.dtype = json.loads(found.get("interpolate", "[]")), found.get("dtype", DTYPES[0])
        asked, count = strip or [found["prompt"]], int(found.get("steps", 1))
        if args.dtype not in DTYPES:
            raise ValueError(args.dtype)
    except (KeyError, ValueError, OSError, SyntaxError) as error:  # Pillow's, of a file that breaks off
        if isinstance(error, OSError) and error.filename:  # the system's
            raise
        raise ValueError(f"{args.origin} is no picture of clipgen-sample: it does not tell its settings") from error
    varied = asked == ["an image"] and args.image
    for prompt in asked:
        if prompt in ("an image", "an embedding") and not varied:
            raise ValueError(f"{args.origin} was drawn of {prompt}, which it does not hold: give --image")
    if "complete" in found and not args.complete:
        raise ValueError(f"{args.origin} completes a picture which it does not hold: give --complete")
    if "mixture" in found:
        args.mix.append(json.loads(found["mixture"]))
    elif strip:
        args.interpolate.append(strip)
    elif not varied:
        args.prompt += asked
    for name, value in known.items():
        setattr(args, name, value)
    args.num_images, args.fingerprint = count, found.get("model")


def newest_run(outputs: Path) -> str | None:
    """The stage-2 run that finished last, below a folder of runs."""
    finished = sorted(outputs.rglob("transformer/config.json"), key=lambda file: file.stat().st_mtime)
    return str(finished[-1].parent.parent) if finished else None


if __name__ == "__main__":
    command()
