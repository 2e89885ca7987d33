"""``clipgen-sample --prompt "..."``: generate images of texts, variations of images, and interpolations."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from clipgen.bundled import BUNDLED, BUNDLED_NAMES, CONTENT, DEFAULT
from clipgen.cli.console import flush_stdout, print_line, run_command
from clipgen.cli.sample_request import DEFAULT_SETTINGS, check_early, join_words, read_request
from clipgen.cli.sampling_args import add_sampling_options
from clipgen.generation.sampling_options import DTYPES
from clipgen.hardware.device import default_device
from clipgen.runs import OUTPUTS, find_runs, newest_run, runs_table
from clipgen.storage.files import printable, user_path
from clipgen.storage.output_folder import free_folder, output_folder

if TYPE_CHECKING:
    from clipgen.cli.sample_request import SampleRequest
    from clipgen.pipeline import TextToImage

    Group = argparse._ArgumentGroup


def main() -> None:
    """Run the command."""
    run_command("clipgen-sample", run)


def main_and_exit() -> None:
    """Run the command, and exit by ``os._exit`` to skip 1-2 s of interpreter shutdown."""
    try:
        main()
    except SystemExit as end:
        flush_stdout()
        os._exit(end.code)  # type: ignore[arg-type]  # `run_command` exits with a number


# --------------------------------------------------------------------------------------------------------------- parser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser, without importing torch."""
    parser = argparse.ArgumentParser(
        "clipgen-sample",
        description="Generate images.",
        usage='%(prog)s --prompt "a red ring" [options]',
        add_help=False,
    )
    add_prompt_options(parser.add_argument_group("prompts (all but --gallery and --reproduce may be repeated)"))
    add_image_options(parser.add_argument_group("images"))
    sampling = parser.add_argument_group("sampling")
    add_sampling_options(sampling)
    sampling.add_argument(
        "--sweep",
        action="extend",
        nargs="+",
        metavar="KEY=A,B",
        help="values to combine, all images on one labeled grid, as in --sweep top_k=100,300 top_p=0.8,1.0",
    )
    add_model_options(parser.add_argument_group("model"))
    other = parser.add_argument_group("other")
    other.add_argument("--list", action="store_true", help="list the runs below outputs/ and the bundled models")
    other.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def add_prompt_options(group: Group) -> None:
    """Add the options that name the prompts."""
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text of the images")
    group.add_argument(
        "texts", nargs="*", metavar="TEXT", help="same as --prompt; words without quotes are joined to one text"
    )
    group.add_argument(
        "--prompts-file",
        type=user_path,
        action="append",
        default=[],
        metavar="FILE",
        help="text file, one prompt per line",
    )
    group.add_argument(
        "--image", type=user_path, action="append", default=[], metavar="FILE", help="image to generate variations of"
    )
    group.add_argument(
        "--prompt-mix",
        action="append",
        default=[],
        metavar="MIX",
        help='weighted texts, as in "0.7 a cat + 0.3 a dog"; weights may be negative',
    )
    group.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        action="append",
        default=[],
        help="two texts; --num-images images lead from one to the other",
    )
    group.add_argument(
        "--gallery",
        metavar="FIGURE",
        help="prompts and settings of a figure of the CLIP-GEN paper, as one labeled sheet: fig1, fig4 to fig10; list "
        "shows them",
    )
    group.add_argument(
        "--reproduce",
        type=user_path,
        metavar="FILE",
        help="image written by clipgen-sample, to generate again from its metadata",
    )


def add_image_options(group: Group) -> None:
    """Add the options of the images and the files."""
    group.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help=f"images per prompt (default: {DEFAULT_SETTINGS['num_images']})",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"seed; image i uses seed + i (default: {DEFAULT_SETTINGS['seed']})",
    )
    group.add_argument(
        "--rerank-from",
        type=int,
        metavar="N",
        help="number of candidates per prompt, of which CLIP chooses the images (default: no reranking)",
    )
    group.add_argument(
        "--outpaint",
        type=user_path,
        metavar="FILE",
        help="image to complete: its upper part is kept; without a prompt it is also the prompt",
    )
    group.add_argument(
        "--keep-fraction",
        type=float,
        metavar="FLOAT",
        help=f"fraction of the height of --outpaint that is kept (default: {DEFAULT_SETTINGS['keep_fraction']})",
    )
    group.add_argument(
        "--output",
        type=user_path,
        default=Path("samples"),
        metavar="FOLDER",
        help="folder for the PNGs, whose names end in their seed; FOLDER-2, FOLDER-3, ... if it contains PNGs already "
        "(default: %(default)s)",
    )
    group.add_argument("--preview", action="store_true", help="update preview.png with the rows generated so far")


def add_model_options(group: Group) -> None:
    """Add the options of the model."""
    group.add_argument(
        "--checkpoint",
        metavar="MODEL",
        help="run folder of stage 2, checkpoint, pipeline folder, hf-hub:OWNER/NAME, or a bundled model: "
        f"{BUNDLED_NAMES} (default: the newest finished run below {OUTPUTS}/, else {DEFAULT})",
    )
    group.add_argument("--device", help="cpu, cuda or mps (default: cuda if available, else mps, else cpu)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help=f"dtype of the transformer and the decoder (default: {DEFAULT_SETTINGS['dtype']})",
    )
    group.add_argument(
        "--compile", action="store_true", help="use torch.compile, which pays off for many images on a GPU"
    )


# ------------------------------------------------------------------------------------------------------------------ run


def run() -> None:
    """Check the request, load the model, generate and write the images."""
    args = make_parser().parse_intermixed_args()
    if args.list:
        print_models()
        return
    if args.gallery == "list":
        print_galleries()
        return
    args.prompt += join_words(args.texts)
    check_early(args)
    output = free_folder(args.output, "*.png")
    with garbage_collection_paused():
        from clipgen.cli.sample_output import generate
        from clipgen.generation.bundled_vocabulary import prompt_warnings
    request = read_request(args)
    checkpoint = args.checkpoint or newest_run(OUTPUTS) or DEFAULT
    with output_folder(output, keep_pattern="*.png"):
        pipe = load_pipeline(checkpoint, request, args)
        print_line(f"Model: {f'the bundled {checkpoint} model' if checkpoint in BUNDLED else checkpoint}")
        if checkpoint in BUNDLED:
            inputs = request.named_inputs()
            lines = [gallery_warning(checkpoint)] if args.gallery else prompt_warnings(checkpoint, inputs)
            for line in lines:
                print(printable(line), file=sys.stderr)
            request.heading += lines if args.gallery else []
        generate(pipe, request, output, args.preview)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the garbage collector, which takes a second of the imports and frees hardly anything."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def load_pipeline(checkpoint: str, request: SampleRequest, args: argparse.Namespace) -> TextToImage:
    """Load the model, move it to its device, cast and compile it.

    Raises:
        ValueError: another model generated the image that is to be reproduced.
    """
    import torch

    from clipgen.hardware.processor import require_bf16_units
    from clipgen.pipeline import TextToImage

    pipe = TextToImage.load(checkpoint)
    device = args.device or default_device()
    if request.dtype == "bfloat16":
        require_bf16_units(device, "--dtype bfloat16", "--dtype float32")
    pipe.to(device, getattr(torch, request.dtype))
    if request.fingerprint not in (None, pipe.fingerprint):
        raise ValueError(f"{args.reproduce} was generated by another model than {checkpoint}: name its --checkpoint")
    return pipe.compile() if args.compile else pipe


def print_models() -> None:
    """Print the runs below ``outputs/`` and the bundled models."""
    runs = find_runs(OUTPUTS)
    if runs:
        for line in runs_table(runs):
            print_line(line)
    else:
        print_line(f"There are no runs below {OUTPUTS}/: start one with clipgen-train stage=vqgan")
    for name, content in CONTENT.items():
        print_line(f"Bundled: {name}, a tokenizer and a transformer for {content} (--checkpoint {name})")


def print_galleries() -> None:
    """Print the names and titles of the galleries."""
    from clipgen.generation.gallery import gallery_names, load_gallery

    for name in gallery_names():
        print_line(f"{name:6} {load_gallery(name).title}")


def gallery_warning(model: str) -> str:
    """Return a warning about a gallery by a bundled model, whose CLIP does not know the words."""
    return (
        f"Generated by the bundled {model} model, which does not know these words: it has seen {CONTENT[model]} and "
        "nothing else. Name another model by --checkpoint."
    )


if __name__ == "__main__":
    main()
