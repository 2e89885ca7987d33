"""``clipgen-sample --prompt "..."``: pictures of sentences, of other pictures, and of what lies between them."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import flush_stdout, guarded, rate_bar, say
from clipgen.cli.device import default_device
from clipgen.cli.list_runs import OUTPUTS, find_runs, free_folder, newest_run, table
from clipgen.cli.output_dir import file_name, output_folder
from clipgen.cli.sampling_args import DTYPES, SETTINGS, add_settings, settings_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from clipgen.generation.prompts import Prompt
    from clipgen.pipeline import Preview, TextToImage

    Named = tuple[str, Prompt]  # for captions and file names

NOTHING = (
    'there must be something to draw: give a sentence in quotes ("a red ring"), --prompt, --prompts-file, --image, '
    "--mix, --complete, --interpolate or --from"
)
SHEET = 1000  # pictures on the sheet of all: more are a file that no viewer opens, and gigabytes of memory


def command() -> None:
    """Entry point of the process: it ends when its work is done, where Python would tidy up for a second or two."""
    try:
        main()
    except SystemExit as end:
        flush_stdout()
        os._exit(end.code)  # type: ignore[arg-type]  # a number: see ``guarded``


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-sample", run)


def parser() -> argparse.ArgumentParser:
    """The command line. Nothing heavy is imported before it is read."""
    p = argparse.ArgumentParser("clipgen-sample", description="Draw pictures of sentences.")
    what = p.add_argument_group("what to draw, any of them several times")
    what.add_argument(
        "sentences", nargs="*", metavar="SENTENCE", help="as --prompt; words without quotes are taken for one sentence"
    )
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
    p.add_argument("--list", action="store_true", help="list the runs below outputs/ and the bundled models")
    p.add_argument(
        "--output",
        type=Path,
        default=Path("samples"),
        help="folder for the PNGs, whose names end in "
        "their seed; if it holds PNGs already, FOLDER-2, FOLDER-3, ... (default: %(default)s)",
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
    args = parser().parse_intermixed_args()
    if args.list:
        list_models()
        return
    args.prompt += sentences_of(args.sentences)
    check_arguments(args)
    args.output = free_folder(args.output, "*.png")
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
    checkpoint = args.checkpoint or newest_run(OUTPUTS) or "shapes"
    with output_folder(args.output, keep="*.png"):
        pipe = prepared(TextToImage.load(checkpoint), args)
        say(f"Model: {'the bundled shapes model' if checkpoint == 'shapes' else checkpoint}")
        if args.origin and args.fingerprint not in (None, pipe.fingerprint):
            raise ValueError(f"{args.origin} was drawn by another model than {checkpoint}: name its --checkpoint")
        if checkpoint == "shapes":
            for line in remarks_on(prompts, args):
                print(line, file=sys.stderr)
        draw(pipe, prompts, sweeps, complete, args)


def prepared(pipe: TextToImage, args: argparse.Namespace) -> TextToImage:
    """The model on its device, cast and compiled as asked."""
    import torch

    from clipgen.processor import require_bf16_units

    device = args.device or default_device()
    if args.dtype == "bfloat16":
        require_bf16_units(device, "--dtype bfloat16", "--dtype float32")
    pipe.to(device, getattr(torch, args.dtype))
    return pipe.compile() if args.compile else pipe


def draw(
    pipe: TextToImage,
    prompts: list[Named],
    sweeps: list[dict[str, Any]],
    complete: Image.Image | None,
    args: argparse.Namespace,
) -> None:
    """Draw and write every picture, the strips, and the sheet of all pictures."""
    from clipgen.images import save_png
    from clipgen.visualization import grid

    images = len(prompts) * (args.rerank_from or args.num_images) + len(args.interpolate) * strip_length(args)
    with rate_bar("drawing", images * len(sweeps)) as advance:
        preview = save_preview(args.output) if args.preview else None
        options = dict(seed=args.seed, outpaint=complete, preview=preview, progress=advance)
        drawn = draw_pictures(pipe, prompts, sweeps, options, args)
        draw_strips(pipe, sweeps, options, args)
    if drawn:
        columns = args.num_images if len(prompts) * len(sweeps) > 1 else None
        _, captions, pictures = zip(*sorted(drawn, key=lambda each: each[0]))
        say(save_png(grid(pictures, columns=columns, captions=captions), args.output / "grid.png"))
        if len(drawn) < (every := len(prompts) * len(sweeps) * args.num_images):
            say(f"It shows the first {len(drawn)} of {every} pictures")


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
        say(save_png(picture, args.output / file, picture.info))
        if number * args.num_images < SHEET:
            drawn.append((number, label or name, picture))
    return drawn


def draw_strips(
    pipe: TextToImage, sweeps: list[dict[str, Any]], options: dict[str, Any], args: argparse.Namespace
) -> None:
    """Draw and write what lies between two prompts."""
    from clipgen.generation.prompts import describe
    from clipgen.images import save_png
    from clipgen.visualization import grid

    labelled = list(zip(labels_of(sweeps), sweeps))
    for (i, (first, second)), (label, settings) in product(enumerate(args.interpolate), labelled):
        strip = pipe.interpolate(first, second, strip_length(args), **options, **settings)
        file = file_name(f"interpolation_{i:02d}", describe(first), describe(second), label)
        say(save_png(grid(strip, columns=len(strip)), args.output / file, strip[0].info))


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
    from clipgen.images import save_png, to_pil
    from clipgen.visualization import grid

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
        raise ValueError(NOTHING)
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
    from clipgen.cli.image_metadata import read_metadata

    made = read_metadata(args.origin)
    varied = made.prompt == "an image" and args.image
    for prompt in made.ends or [made.prompt]:
        if prompt in ("an image", "an embedding") and not varied:
            raise ValueError(f"{args.origin} was drawn of {prompt}, which it does not hold: give --image")
    if made.complete and not args.complete:
        raise ValueError(f"{args.origin} completes a picture which it does not hold: give --complete")
    if made.mixture:
        args.mix.append(made.mixture)
    elif made.ends:
        args.interpolate.append(made.ends)
    elif not varied:
        args.prompt.append(made.prompt)
    for name, value in made.settings.items():
        setattr(args, name, value)
    args.seed, args.dtype = made.seed, made.dtype
    args.num_images, args.fingerprint = made.steps, made.model


def sentences_of(words: list[str]) -> list[str]:
    """Return what stands on the command line without an option as prompts: several words without a space among them
    are a sentence whose quotes were forgotten."""
    return [" ".join(words)] if len(words) > 1 and not any(" " in word.strip() for word in words) else words


def check_arguments(args: argparse.Namespace) -> None:
    """Raise an error that needs no torch before its import, which takes seconds.

    Raises:
        ValueError: there is nothing to draw.
        FileNotFoundError: a file, or the checkpoint, does not exist.
    """
    sources = (args.prompt, args.prompts_file, args.image, args.mix, args.complete, args.interpolate, args.origin)
    if not any(sources):
        raise ValueError(NOTHING)
    for path in (*args.image, *([args.complete] if args.complete else [])):
        if not path.is_file():
            raise FileNotFoundError(f"no picture {path}")
    for path in (*args.prompts_file, *([args.origin] if args.origin else [])):
        path.stat()  # raises the system's error
    name = args.checkpoint or "shapes"
    if name != "shapes" and not name.startswith("hf-hub:") and not Path(name).expanduser().exists():
        made = "`clipgen-train stage=transformer` makes one, `clipgen-sample --list` shows what there is"
        raise FileNotFoundError(f"no ConditionalTransformer checkpoint: {name} does not exist; {made}")


def list_models() -> None:
    """Print the runs below ``outputs/`` and the bundled models."""
    if runs := find_runs(OUTPUTS):
        print(*table(runs), sep="\n")
    else:
        print(f"There are no runs below {OUTPUTS}/: clipgen-train stage=vqgan begins one")
    print("Bundled: shapes, a tokenizer and a transformer for coloured shapes of 32 x 32 pixels (--checkpoint shapes)")


def remarks_on(prompts: list[Named], args: argparse.Namespace) -> list[str]:
    """Return what to tell about requests that are beyond the bundled model, line by line."""
    from PIL import Image

    from clipgen.cli.shapes_vocabulary import remarks

    asked = [prompt for _, prompt in prompts] + [end for ends in args.interpolate for end in ends]
    sentences = [prompt for prompt in asked if isinstance(prompt, str)]
    sentences += [text for prompt in asked if isinstance(prompt, Mapping) for text in prompt]
    strange = [name for name, prompt in prompts if isinstance(prompt, Image.Image) and prompt.size != (32, 32)]
    return remarks(sentences, strange)


if __name__ == "__main__":
    command()
