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

from clipgen.cli.biggan_clip import add_biggan_clip
from clipgen.cli.console import guarded
from clipgen.cli.device import default_device
from clipgen.cli.model_path import check_generator_path, check_model_path
from clipgen.cli.output_dir import output_folder
from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.cli.search import add_search, check_threshold
from clipgen.generation.file_names import file_name
from clipgen.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from clipgen import VQGAN, FrozenCLIP

PAPER_CLIP = "ViT-B-32-quickgelu:openai"
NO_PROMPT = "a prompt is needed: give --prompt, --prompts-file or --captions"


def main() -> None:
    """Run the command."""
    guarded("clipgen-baseline", run)


def parser() -> argparse.ArgumentParser:
    """Return the argument parser. No module that imports torch is imported before the arguments are parsed."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("clipgen-baseline", description=__doc__.replace("``", ""), formatter_class=raw)
    systems = p.add_subparsers(dest="system", required=True)
    add_vqgan_clip(systems.add_parser("vqgan-clip", help="optimize a tokenizer's latents until they match the prompt"))
    add_biggan_clip(systems.add_parser("biggan-clip", help="optimize a BigGAN's latents until they match the prompt"))
    add_search(systems.add_parser("search", help="generate images of the classes nearest to the prompt, keep the best"))
    add_class(systems.add_parser("class", help="generate images of classes with the class-conditional transformer"))
    for system in systems.choices.values():
        group = system.add_argument_group("output and hardware")
        group.add_argument("--output", type=Path, default=Path("baseline"), help="output folder (default: %(default)s)")
        group.add_argument("--seed", type=int, default=0, help="seed; image i uses seed + i (default: %(default)s)")
        group.add_argument("--device", help="cpu, cuda or mps (default: CUDA if available, else MPS, else CPU)")
    return p


def add_vqgan_clip(p: argparse.ArgumentParser) -> None:
    """Add the options of ``run_vqgan_clip``."""
    p.set_defaults(run=run_vqgan_clip)
    add_prompts(p)
    models = p.add_argument_group("models")
    models.add_argument(
        "--checkpoint",
        default="shapes",
        help="text-to-image model whose tokenizer and CLIP are used (default: the bundled shapes model)",
    )
    models.add_argument("--vqgan", help="another tokenizer: stage-1 run folder, checkpoint or model folder")
    add_clip(models, "that of --checkpoint")
    optimization = p.add_argument_group("optimization")
    optimization.add_argument("--num-images", type=int, default=4, help="images per prompt (default: %(default)s)")
    optimization.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    optimization.add_argument(
        "--learning-rate", type=float, default=0.1, help="learning rate of Adam (default: %(default)s)"
    )
    optimization.add_argument("--cutouts", type=int, default=32, help="augmented views per step (default: %(default)s)")
    optimization.add_argument("--image-size", type=int, help="size in pixels (default: the tokenizer's resolution)")
    optimization.add_argument("--batch-size", type=int, default=1, help="images per batch (default: %(default)s)")


def add_class(p: argparse.ArgumentParser) -> None:
    """Add the options of ``run_class``."""
    p.set_defaults(run=run_class)
    p.add_argument(
        "--class",
        dest="classes",
        action="append",
        required=True,
        help="name or number of a class; may be repeated",
    )
    p.add_argument("--checkpoint", required=True, help="run folder of the class-conditional transformer")
    p.add_argument("--num-images", type=int, default=4, help="images per class (default: %(default)s)")
    add_sampling_options(p.add_argument_group("sampling"), given_only=True)


def add_prompts(p: argparse.ArgumentParser) -> None:
    """Add the options that name the prompts."""
    p.add_argument("--prompt", action="append", default=[], help="prompt; may be repeated")
    p.add_argument("--prompts-file", type=Path, action="append", default=[], help="text file with one prompt per line")
    p.add_argument(
        "--captions",
        help="captions of images instead of prompts, in any format of clipgen-eval: the first of each image",
    )
    p.add_argument(
        "--split", choices=("train", "test", "all"), help="split of a folder of CUB-200-2011 (default: test)"
    )


def add_clip(group: argparse._ArgumentGroup, default: str) -> None:
    """Add the option that names the CLIP."""
    group.add_argument(
        "--clip", help=f"CLIP as MODEL[:TAG]: bundled name, folder or open_clip model (default: {default})"
    )


def run() -> None:
    """Check the arguments and run the system."""
    args = parser().parse_args()
    if args.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {args.num_images}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {args.seed}")
    if args.system == "search":
        check_threshold(args)
    check_paths(args)
    if args.system != "class":
        args.caption_groups = read_caption_groups(args)
        args.prompts = [group[0] for group in args.caption_groups]
    args.device = args.device or default_device()
    with output_folder(args.output, keep_pattern="**/*.png"):
        args.run(args)


def check_paths(args: argparse.Namespace) -> None:
    """Find missing prompts, models and files without importing torch, which takes seconds.

    Raises:
        ValueError: there is no prompt.
        FileNotFoundError: a file or a model does not exist.
    """
    if args.system == "class":
        check_model_path(args.checkpoint, "ClassConditionalTransformer")
        sampling_params(args)
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
        print(f"{prompt}: CLIP score {sum(scores) / len(scores):.4f}, {seconds:.1f} s per image")
    output.save_grid()


def run_class(args: argparse.Namespace) -> None:
    """Generate images of each class."""
    import torch

    from clipgen.baselines.class_conditional import ClassConditionalGenerator

    generator = ClassConditionalGenerator.load(args.checkpoint, sampling_params(args)).to(args.device)
    indices = [generator.class_index(name) for name in args.classes]
    output = ImageOutput(args, asdict(generator.params))
    for index in indices:
        images = generator.generate(torch.full((args.num_images,), index), args.seed)
        name = generator.class_names[index]
        output.add(images, name, image_seeds(args), [{"label": name, "class_index": index}] * len(images))
    output.save_grid()


# --------------------------------------------------------------------------------------------------------------- input


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


def sampling_params(args: argparse.Namespace) -> SamplingParams | None:
    """Return the sampling parameters; None if none was given."""
    options = sampling_options(args)
    return SamplingParams(**options) if options else None


def load_vqgan_and_clip(args: argparse.Namespace) -> tuple[VQGAN, FrozenCLIP]:
    """Load the tokenizer and CLIP of VQGAN-CLIP; the model of ``--checkpoint`` only if it is needed."""
    from clipgen import VQGAN, FrozenCLIP, TextToImage

    pipe = None if args.vqgan and args.clip else TextToImage.load(args.checkpoint)
    vqgan = VQGAN.load(args.vqgan) if args.vqgan or pipe is None else pipe.vqgan
    clip = FrozenCLIP.from_spec(args.clip) if args.clip or pipe is None else pipe.clip
    return vqgan.to(args.device), clip.to(args.device)


def load_search_clip(args: argparse.Namespace) -> FrozenCLIP:
    """Load the CLIP of ``--clip``, else that of the generator's run folder, else the papers'."""
    from clipgen import FrozenCLIP
    from clipgen.baselines.generators import is_run
    from clipgen.run_folder import load_clip, run_folder

    if args.clip:
        clip = FrozenCLIP.from_spec(args.clip)
    elif is_run(args.generator):
        clip = load_clip(run_folder(Path(args.generator).expanduser()))
    else:
        clip = FrozenCLIP.from_spec(PAPER_CLIP)
    return clip.to(args.device)


# -------------------------------------------------------------------------------------------------------------- output


class ImageOutput:
    """The images of a command: one PNG each, whose metadata says how it was made, and all of them in ``grid.png``."""

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any]):
        import clipgen

        self.folder = args.output
        self.columns = args.num_images if args.system != "search" else None
        self.metadata = {"baseline": args.system, **settings, "clipgen": clipgen.__version__}
        self.num_groups = 0
        self.images: list[Any] = []
        self.captions: list[str] = []

    def add(self, images: Tensor, caption: str, seeds: list[int], metadata: list[dict[str, Any]]) -> None:
        """Write the images (B, 3, H, W) of one prompt or class.

        Args:
            images: the images.
            caption: the prompt or class.
            seeds: seed of each image.
            metadata: metadata of each image.
        """
        from clipgen.images import save_png, to_pil

        for image, seed, own_metadata in zip(to_pil(images), seeds, metadata):
            path = self.folder / file_name(f"{self.num_groups:02d}", caption, str(seed))
            print(save_png(image, path, {"seed": seed, **own_metadata, **self.metadata}))
            score = own_metadata.get("clip_score")
            self.images.append(image)
            self.captions.append(caption if score is None else f"{caption} ({score:.3f})")
        self.num_groups += 1

    def save_grid(self) -> None:
        """Write the grid of all images."""
        from clipgen.images import save_png
        from clipgen.visualization import grid

        columns = self.columns if self.num_groups > 1 else None
        print(save_png(grid(self.images, columns, self.captions), self.folder / "grid.png"))


if __name__ == "__main__":
    main()
