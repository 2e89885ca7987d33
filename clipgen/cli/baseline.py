"""``clipgen-baseline``: generate images of a prompt or a class with the systems that the papers compare with.

clipgen-baseline vqgan-clip --prompt "a large blue ring on a white background"
clipgen-baseline search --generator RUN --prompt "a small red star on a black background" --k 10
clipgen-baseline class --checkpoint RUN --class dog
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.bundled import BUNDLED_NAMES, DEFAULT
from clipgen.cli.baseline_args import (
    NO_PROMPT,
    add_clip,
    add_prompts,
    image_seeds,
    read_caption_groups,
)
from clipgen.cli.baseline_biggan_clip import add_biggan_clip
from clipgen.cli.baseline_checks import DEFAULTS, check_effects
from clipgen.cli.baseline_output import ImageOutput
from clipgen.cli.baseline_search import add_search, check_threshold
from clipgen.cli.console import print_line, run_command
from clipgen.cli.given_options import fill_defaults
from clipgen.cli.model_path import check_generator_path, check_model_path
from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.hardware.device import default_device
from clipgen.sampling_params import check_seed
from clipgen.storage.files import user_path
from clipgen.storage.output_folder import free_folder, output_folder

if TYPE_CHECKING:
    from clipgen import VQGAN, FrozenCLIP


def main() -> None:
    """Run the command."""
    run_command("clipgen-baseline", run)


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser. No module that imports torch is imported before the arguments are parsed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("clipgen-baseline", description=__doc__.replace("``", ""), formatter_class=raw)
    systems = parser.add_subparsers(dest="system", required=True)
    add_vqgan_clip(systems.add_parser("vqgan-clip", help="optimize a tokenizer's latents until they match the prompt"))
    add_biggan_clip(systems.add_parser("biggan-clip", help="optimize a BigGAN's latents until they match the prompt"))
    add_search(systems.add_parser("search", help="generate images of the classes nearest to the prompt, keep the best"))
    add_class(systems.add_parser("class", help="generate images of classes with the class-conditional transformer"))
    for system in systems.choices.values():
        group = system.add_argument_group("output and hardware")
        group.add_argument(
            "--output",
            type=user_path,
            default=Path("baseline"),
            help="output folder, numbered if it contains results (default: %(default)s)",
        )
        group.add_argument("--seed", type=int, help=f"seed; image i uses seed + i (default: {DEFAULTS['seed']})")
        group.add_argument("--device", help="cpu, cuda or mps (default: CUDA if available, else MPS, else CPU)")
    return parser


def add_vqgan_clip(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run_vqgan_clip``."""
    parser.set_defaults(run=run_vqgan_clip)
    add_prompts(parser)
    models = parser.add_argument_group("models")
    models.add_argument(
        "--checkpoint",
        help="text-to-image model whose tokenizer and CLIP are used: stage-2 run folder, checkpoint, pipeline folder, "
        f"hf-hub:OWNER/NAME, {BUNDLED_NAMES} (default: {DEFAULT})",
    )
    models.add_argument("--vqgan", help="another tokenizer: stage-1 run folder, checkpoint or model folder")
    add_clip(models, "that of --checkpoint")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--num-images", type=int, default=4, help="images per prompt (default: %(default)s)")
    optimization.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    optimization.add_argument(
        "--learning-rate", type=float, default=0.1, help="learning rate of Adam (default: %(default)s)"
    )
    optimization.add_argument("--cutouts", type=int, default=32, help="augmented views per step (default: %(default)s)")
    optimization.add_argument("--image-size", type=int, help="size in pixels (default: the tokenizer's resolution)")
    optimization.add_argument("--batch-size", type=int, default=1, help="images per batch (default: %(default)s)")


def add_class(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run_class``."""
    parser.set_defaults(run=run_class)
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        required=True,
        help="name or number of a class; may be repeated",
    )
    parser.add_argument("--checkpoint", required=True, help="run folder of the class-conditional transformer")
    parser.add_argument("--num-images", type=int, default=4, help="images per class (default: %(default)s)")
    add_sampling_options(parser.add_argument_group("sampling"))


def run() -> None:
    """Check the arguments and run the system."""
    args = make_parser().parse_args()
    if args.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {args.num_images}")
    check_effects(args)
    fill_defaults(args, DEFAULTS)
    check_seed(args.seed)
    if args.system == "search":
        check_threshold(args)
    check_paths(args)
    if args.system != "class":
        args.caption_groups = read_caption_groups(args)
        args.prompts = [group[0] for group in args.caption_groups]
    args.device = args.device or default_device()
    args.output = free_folder(args.output, "*.png", "search.*", "best", "all")
    with output_folder(args.output, keep_pattern="**/*.png"):
        args.run(args)


def check_paths(args: argparse.Namespace) -> None:
    """Find missing prompts, models and files without importing torch, which takes seconds.

    Raises:
        ValueError: the prompt is missing.
        FileNotFoundError: a file or a model does not exist.
    """
    if args.system == "class":
        check_model_path(args.checkpoint, "ClassConditionalTransformer")
        sampling_options(args)
        return
    if not args.prompt and not args.prompts_file and not args.captions:
        raise ValueError(NO_PROMPT)
    for path in args.prompts_file:
        path.stat()  # raises the system's error
    if args.system == "vqgan-clip":
        check_model_path(args.vqgan, "VQGAN")
        check_model_path(None if args.vqgan and args.clip else args.checkpoint, "ConditionalTransformer")
    elif args.system == "search" or args.generator.startswith("biggan:"):
        check_generator_path(args.generator)


def run_vqgan_clip(args: argparse.Namespace) -> None:
    """Optimize images for each prompt."""
    from clipgen.baselines.search import real_score
    from clipgen.baselines.vqgan_clip import vqgan_clip

    vqgan, clip = load_vqgan_and_clip(args)
    settings: dict[str, Any] = {
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "cutouts": args.cutouts,
    }
    output = ImageOutput(args, settings)
    for prompt in args.prompts:
        start = time.perf_counter()
        images = vqgan_clip(
            vqgan,
            clip,
            clip.encode_text([prompt]).expand(args.num_images, -1),
            image_size=args.image_size,
            seed=args.seed,
            batch_size=args.batch_size,
            **settings,
        )
        seconds = (time.perf_counter() - start) / args.num_images
        scores = [real_score(clip, image[None], [prompt]) for image in images]
        metadata = [{"prompt": prompt, "clip_score": score} for score in scores]
        output.add(images, prompt, image_seeds(args), metadata)
        print_line(f"{prompt}: CLIP score {sum(scores) / len(scores):.4f}, {seconds:.1f} s per image")
    output.save_grid()


def run_class(args: argparse.Namespace) -> None:
    """Generate images of each class."""
    import torch

    from clipgen.baselines.class_conditional import ClassConditionalGenerator

    generator = ClassConditionalGenerator.load(args.checkpoint, **sampling_options(args)).to(args.device)
    indices = [generator.class_index(name) for name in args.classes]
    output = ImageOutput(args, asdict(generator.params))
    for index in indices:
        images = generator.generate(torch.full((args.num_images,), index), args.seed)
        name = generator.class_names[index]
        output.add(images, name, image_seeds(args), [{"label": name, "class_index": index}] * len(images))
    output.save_grid()


# --------------------------------------------------------------------------------------------------------------- input


def load_vqgan_and_clip(args: argparse.Namespace) -> tuple[VQGAN, FrozenCLIP]:
    """Load the tokenizer and CLIP of VQGAN-CLIP; the model of ``--checkpoint`` only if it is needed."""
    from clipgen import VQGAN, FrozenCLIP, TextToImage

    pipe = None if args.vqgan and args.clip else TextToImage.load(args.checkpoint)
    vqgan = VQGAN.load(args.vqgan) if args.vqgan or pipe is None else pipe.vqgan
    clip = FrozenCLIP.from_spec(args.clip) if args.clip or pipe is None else pipe.clip
    return vqgan.to(args.device), clip.to(args.device)


if __name__ == "__main__":
    main()
