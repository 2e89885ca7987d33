"""Options that several systems of ``clipgen-baseline`` share, and what they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clipgen.storage.files import user_path

if TYPE_CHECKING:
    from clipgen import FrozenCLIP

PAPER_CLIP = "ViT-B-32-quickgelu:openai"
NO_PROMPT = "a prompt is needed: give --prompt, --prompts-file or --captions"


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the prompts."""
    parser.add_argument("--prompt", action="append", default=[], help="prompt; may be repeated")
    parser.add_argument(
        "--prompts-file", type=user_path, action="append", default=[], help="text file with one prompt per line"
    )
    parser.add_argument(
        "--captions",
        help="captions of images instead of prompts, in any format of clipgen-eval: the first of each image",
    )
    parser.add_argument(
        "--split", choices=("train", "test", "all"), help="split of a folder of CUB-200-2011 (default: test)"
    )


def add_clip(group: argparse._ArgumentGroup, default: str) -> None:
    """Add the option that names the CLIP."""
    group.add_argument(
        "--clip", help=f"CLIP as MODEL[:TAG]: bundled name, folder or open_clip model (default: {default})"
    )


def read_caption_groups(args: argparse.Namespace) -> list[list[str]]:
    """Return the prompts of the command line and of files, alone, and the captions of ``--captions`` by image."""
    from clipgen.evaluation.captions import group_by_image, read_captions
    from clipgen.generation import prompts as prompt_files

    prompts = list(args.prompt)
    for file in args.prompts_file:
        prompts += prompt_files.read_prompts(file)
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("prompt must not be empty, got ''")
    groups = [[prompt] for prompt in prompts]
    if args.captions:
        groups += group_by_image(read_captions(args.captions, args.split))
    if not groups:
        raise ValueError(NO_PROMPT)
    return groups


def image_seeds(args: argparse.Namespace) -> list[int]:
    """Return the seed of each image of a prompt."""
    return [args.seed + i for i in range(args.num_images)]


def load_search_clip(args: argparse.Namespace) -> FrozenCLIP:
    """Load the CLIP of ``--clip``, else that of the generator's run folder, else the papers'."""
    from clipgen import FrozenCLIP
    from clipgen.baselines.generators import is_run
    from clipgen.frozen_models import load_clip, run_folder

    if args.clip:
        clip = FrozenCLIP.from_spec(args.clip)
    elif is_run(args.generator):
        clip = load_clip(run_folder(Path(args.generator).expanduser()))
    else:
        clip = FrozenCLIP.from_spec(PAPER_CLIP)
    return clip.to(args.device)
