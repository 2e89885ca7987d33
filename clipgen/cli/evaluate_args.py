"""The options of ``clipgen-eval``, and the checks that need no torch."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipgen.bundled import BUNDLED_NAMES
from clipgen.cli.given_options import fill_defaults, is_given, option_name
from clipgen.cli.model_path import check_model_path
from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.data.class_names import NAME_LISTS
from clipgen.data.folder_listing import check_holds_images
from clipgen.data.urls import expand_urls
from clipgen.hardware.ranks import rank_and_world_size
from clipgen.storage.files import user_path

DEFAULT_CLIP = "ViT-B-32-quickgelu:openai"  # the papers' CLIP
# Options that have no effect in some combinations; None in the parser, so that it is known whether they are given.
DEFAULT_SETTINGS: dict[str, Any] = {
    "num_images": 30_000,
    "seed": 0,
    "template": "A photo of a {label}.",
    "blur": [0, 1, 2],
}
DESCRIPTION = """Compute the papers' metrics of a model, of a folder of images, or of a tokenizer.

  clipgen-eval --checkpoint RUN --captions captions_val2014.json --reference val2014
  clipgen-eval --checkpoint RUN --classes imagenet --template "A photo of a {label}." --reference 'val-*.tar'
  clipgen-eval --images FOLDER --captions captions.json --reference val2014 --name "another system"
  clipgen-eval --vqgan RUN --reference val2014
  clipgen-eval --checkpoint shapes --captions shapes --shapes-eval --features none --clip shapes

An interrupted evaluation resumes when the command is repeated. Under torchrun or in a SLURM array, processes share the
images; --vqgan runs in one process."""


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser. No module that imports torch is imported before the arguments are parsed."""
    parser = argparse.ArgumentParser(
        "clipgen-eval", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser.add_argument_group("what to evaluate, one of"))
    add_captions(parser.add_argument_group("captions"))
    add_sampling(parser.add_argument_group("sampling of --checkpoint"))
    add_protocol(parser.add_argument_group("protocol"))
    add_output(parser.add_argument_group("output and hardware"))
    return parser


def add_subject(group: argparse._ArgumentGroup) -> None:
    """Add the options that name what is evaluated."""
    subject = group.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--checkpoint",
        help="text-to-image model: stage-2 run folder, checkpoint, pipeline folder, hf-hub:OWNER/NAME, "
        f"{BUNDLED_NAMES}",
    )
    subject.add_argument("--images", type=user_path, help="folder of images, of any system")
    subject.add_argument(
        "--vqgan",
        help="tokenizer, whose reconstructions are evaluated: stage-1 run folder, checkpoint, model folder, "
        f"hf-hub:OWNER/NAME, {BUNDLED_NAMES}",
    )


def add_captions(group: argparse._ArgumentGroup) -> None:
    """Add the options that name the captions."""
    group.add_argument(
        "--captions",
        help="file of captions: text (one per line, or FILE<tab>caption), JSON (list, mapping, COCO), JSON lines "
        "(file_name, and text or caption), a folder with a text file per image (CUB-200-2011), or 'shapes' (default "
        "with --images: PNG metadata or .txt files next to the images)",
    )
    group.add_argument("--split", choices=("train", "test", "all"), help="split of CUB-200-2011 (default: test)")
    group.add_argument(
        "--all-captions",
        action="store_true",
        help="score each of --images with all of its captions instead of the first alone; needs --features none",
    )
    group.add_argument(
        "--classes",
        help="class names instead of captions: a file of the same formats, LOC_synset_mapping.txt, imagenet (CLIP's "
        "wording) or imagenet-torchvision",
    )
    group.add_argument("--template", help=f"caption of a class (default: {DEFAULT_SETTINGS['template']})")
    group.add_argument(
        "--num-images",
        type=int,
        help="number of images to generate, one per caption, and to render for --reference shapes; of captions that "
        "name files, one of each of as many files (default: 30000, as in the papers; with --vqgan: 10000)",
    )


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """Add the options of sampling."""
    group.add_argument("--seed", type=int, help="seed; image i uses seed + i (default: 0)")
    add_sampling_options(group)
    group.add_argument(
        "--rerank-from",
        type=int,
        default=1,
        help="number of candidates per caption, of which the one with the highest CLIP score is kept (default: 1)",
    )


def add_protocol(group: argparse._ArgumentGroup) -> None:
    """Add the options of the metrics."""
    group.add_argument(
        "--reference",
        help="real images: folder, tar shards, shapes, or a folder of parts that was measured before; without it FID, "
        "KID, precision and recall are omitted. If the captions name files of the folder, only the images that they "
        "describe are used: those of the selected captions, or those that --images contains",
    )
    group.add_argument("--whole-reference", action="store_true", help="use all images of the reference in any case")
    group.add_argument(
        "--features",
        default="inception",
        help="feature space of IS, FID, KID, precision and recall: inception (torch-fidelity's resize), "
        "inception-clean, inception:FILE, clip:MODEL[:TAG], classifier:FILE, torchvision:MODEL, timm:MODEL, "
        "module:function (code: name only one that you trust), none (default: %(default)s)",
    )
    group.add_argument(
        "--blur",
        type=int,
        nargs="+",
        help="blur radii of FID-0, FID-1, FID-2; the other metrics use radius 0 (default: 0 1 2)",
    )
    group.add_argument(
        "--clip",
        action="append",
        help=f"MODEL[:TAG] of a CLIP score, may be repeated; none disables it (default: {DEFAULT_CLIP} if there are "
        "captions)",
    )
    group.add_argument("--captioner", help="captioner of CapS: blip, blip:NAME_OR_FOLDER, module:function (code)")
    group.add_argument("--shapes-eval", action="store_true", help="read the images by the rules of the shapes data")
    group.add_argument(
        "--image-size", type=int, help="size of --images and the reference in pixels (default: as the images)"
    )


def add_output(group: argparse._ArgumentGroup) -> None:
    """Add the options of the output."""
    group.add_argument(
        "--output", type=user_path, default=Path("evaluation"), help="output folder (default: %(default)s)"
    )
    group.add_argument("--name", help="name of the system in the table (default: its path)")
    group.add_argument("--batch-size", type=int, default=50, help="images per batch (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda or mps (default: CUDA if available, else MPS, else CPU)")


# --------------------------------------------------------------------------------------------------------------- checks


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError if no evaluation is possible with the arguments."""
    check_numbers(args)
    check_combination(args)
    check_effects(args)
    if args.classes and args.template and "{label}" not in args.template:
        raise ValueError(f"template must contain {{label}}, the place of the class, got {args.template!r}")
    if args.checkpoint and not (args.captions or args.classes):
        raise ValueError("a model needs captions to generate: give --captions or --classes")
    if args.all_captions and not (args.images and args.captions and args.features == "none"):
        raise ValueError(
            "all_captions must be used with --images, --captions and --features none, because it repeats images"
        )
    if args.vqgan and not args.reference:
        raise ValueError("a tokenizer needs images to reconstruct: give --reference")
    if args.features != "none" and not args.vqgan and find_spec("torch_fidelity") is None:
        raise ImportError("IS and KID need torch-fidelity: pip install torch-fidelity, or give --features none")
    if args.reference and args.features == "none" and not args.vqgan:
        raise ValueError(
            "a reference is compared in a feature space: give --features other than none, or no --reference"
        )


def check_combination(args: argparse.Namespace) -> None:
    """Raise ValueError if an option would have no effect together with another one."""
    if args.captions and args.classes:
        raise ValueError("captions and classes exclude each other: give --captions or --classes")
    options = list(sampling_options(args))
    if args.rerank_from > 1:
        options.append("rerank_from")
    if not args.checkpoint and options:
        raise ValueError(f"{options[0]} applies to --checkpoint only: leave out {option_name(options[0])}")
    for name in ("captions", "classes", "split", "clip", "captioner", "shapes_eval"):
        if args.vqgan and getattr(args, name) not in (None, False, ["none"]):
            raise ValueError(f"{name} does not apply to reconstructions: leave out {option_name(name)}")


def check_effects(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is given that has no effect with what is evaluated."""
    effects = {
        "num_images": (args.checkpoint or args.reference == "shapes", "--checkpoint or --reference shapes"),
        "seed": (args.checkpoint, "--checkpoint"),
        "template": (args.classes, "--classes"),
        "split": (args.captions not in (None, "shapes"), "a folder of text files in --captions"),
        "blur": (args.features != "none" and not args.vqgan, "a feature space of images, not of reconstructions"),
        "whole_reference": (args.reference and not args.vqgan, "--reference of images, not of reconstructions"),
    }
    for name, (has_effect, needed) in effects.items():
        if is_given(args, name) and not has_effect:
            raise ValueError(f"{name} has an effect only with {needed}: leave out {option_name(name)}")
    _, world_size = rank_and_world_size()
    if args.vqgan and world_size > 1:
        raise ValueError(f"a tokenizer is evaluated by one process, got {world_size}: start clipgen-eval only once")


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError if a number is out of range."""
    for name, least in (("num_images", 2), ("batch_size", 1), ("rerank_from", 1), ("image_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if any(radius < 0 for radius in args.blur or []):
        raise ValueError(f"blur must be radii of at least 0, got {min(args.blur)}")


def check_paths(args: argparse.Namespace) -> None:
    """Raise an error if a file or a folder on the command line does not exist, or if ``--images`` contains no image."""
    check_model_path(args.checkpoint, "ConditionalTransformer")
    check_model_path(args.vqgan, "VQGAN")
    if args.images:
        check_holds_images(args.images, "--images")
    if args.captions not in (None, "shapes") and not Path(args.captions).expanduser().exists():
        raise FileNotFoundError(f"captions must be 'shapes', an existing file or a folder, got {args.captions}")
    if args.classes not in (None, "shapes", *NAME_LISTS) and not Path(args.classes).expanduser().is_file():
        names = ", ".join(map(repr, NAME_LISTS))
        raise FileNotFoundError(f"classes must be {names} or an existing file, got {args.classes}")
    if args.reference in (None, "shapes") or Path(args.reference).expanduser().exists():
        return
    try:
        expand_urls(args.reference)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(f"reference must be a folder of images, shards or shapes: {error}") from error


def complete_arguments(args: argparse.Namespace) -> None:
    """Set the options that were not given to their defaults; that of --num-images differs for a tokenizer."""
    args.num_reconstructed = 10_000 if args.num_images is None else args.num_images
    fill_defaults(args, DEFAULT_SETTINGS)
