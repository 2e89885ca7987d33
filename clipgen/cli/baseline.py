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
from clipgen.cli.output_dir import output_folder
from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.generation.file_names import file_name

if TYPE_CHECKING:
    from torch import Tensor

    from clipgen import VQGAN, FrozenCLIP
    from clipgen.baselines.search import SearchResult, SearchRow
    from clipgen.sampling import SamplingParams

PAPER_CLIP = "ViT-B-32-quickgelu:openai"


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


def add_search(p: argparse.ArgumentParser) -> None:
    """Add the options of ``run_search``."""
    p.set_defaults(run=run_search)
    add_prompts(p)
    models = p.add_argument_group("models")
    models.add_argument(
        "--generator",
        required=True,
        help="run folder of the class-conditional transformer, biggan:FILE_OR_FOLDER, sagan:FILE, TorchScript file, "
        "or module:function that is called with (noise, class_indices)",
    )
    models.add_argument("--truncation", type=float, help="truncation of BigGAN or SAGAN in (0, 1] (default: none)")
    models.add_argument("--noise-dim", type=int, help="noise dimension, if the generator has no noise_dim attribute")
    models.add_argument(
        "--class-names",
        help="class names, if the generator has no class_names attribute: .json list, text file with one name per "
        "line, or imagenet",
    )
    add_clip(models, "that of the run folder, else the papers' ViT-B/32")
    options = p.add_argument_group("search")
    options.add_argument("--k", type=int, default=10, help="number of classes to sample from (default: %(default)s)")
    options.add_argument(
        "--template", help='text for the CLIP embedding of a class (default: "An image of {label}", as in the paper)'
    )
    options.add_argument("--num-images", type=int, default=100, help="images per prompt, b_max (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=32, help="images per batch (default: %(default)s)")
    options.add_argument("--save-all", action="store_true", help="write all generated images below OUTPUT/all")
    add_table(p.add_argument_group("tables of the paper"))
    add_sampling_options(p.add_argument_group("sampling of a class-conditional transformer"), given_only=True)


def add_table(group: argparse._ArgumentGroup) -> None:
    """Add the options of the paper's tables."""
    group.add_argument("--table", action="store_true", help="search with all k of the paper; print tables, no images")
    group.add_argument(
        "--seeds", type=int, nargs="+", default=[42, 43, 44], help="seeds of --table (default: the paper's)"
    )
    group.add_argument(
        "--threshold",
        type=float,
        help="CLIP score that 'images needed' counts to in --table (see --real-images)",
    )
    group.add_argument(
        "--real-images",
        type=Path,
        help="folder of the training images, whose mean CLIP score with all of their captions is the threshold, as in "
        "the paper",
    )
    group.add_argument("--real-captions", help="file of their captions, in the formats of clipgen-eval --captions")


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
    if args.system != "class":
        args.prompts = read_prompts(args)
    if args.system == "search":
        check_threshold(args)
    args.device = args.device or default_device()
    with output_folder(args.output, keep_pattern="**/*.png"):
        args.run(args)


def check_threshold(args: argparse.Namespace) -> None:
    """Raise ValueError if the threshold of a search is not defined by one number, or by images with captions."""
    if (args.real_images is None) != (args.real_captions is None):
        raise ValueError("real_images and real_captions must be given together")
    if args.real_images is not None and (args.threshold is not None or not args.table):
        raise ValueError("real_images must be used with --table, and not with --threshold")


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


def run_search(args: argparse.Namespace) -> None:
    """Search the best image of each prompt, or compute the paper's tables over all prompts."""
    from clipgen.baselines.generators import load_generator, read_class_names
    from clipgen.baselines.search import encode_labels, search

    class_names = read_class_names(args.class_names) if args.class_names else None
    params = sampling_params(args)
    generator = load_generator(args.generator, args.noise_dim, class_names, args.device, params, args.truncation)
    clip = load_search_clip(args)
    if args.table:
        return run_search_table(args, generator, clip)
    truncation = {} if args.truncation is None else {"truncation": args.truncation}
    output = ImageOutput(args, {"k": args.k, "num_images": args.num_images, **truncation})
    label_embeddings = encode_labels(clip, generator.class_names, args.template)
    for number, prompt in enumerate(args.prompts):
        result = search(
            generator,
            clip,
            prompt,
            args.k,
            args.num_images,
            args.seed,
            batch_size=args.batch_size,
            label_embeddings=label_embeddings,
            return_images=args.save_all,
        )
        save_all(args, result, f"{number:05d}")
        name = generator.class_names[result.class_index]
        metadata = {"prompt": prompt, "clip_score": result.score, "label": name, "curve": result.curve.tolist()}
        output.add(result.image[None], prompt, [args.seed], [metadata])
        print(f"{prompt}: CLIP score {result.score:.4f}, class {name!r}")
    output.save_grid()


def run_search_table(args: argparse.Namespace, generator: Any, clip: FrozenCLIP) -> None:
    """Search with every k of the paper, and write its tables."""
    from clipgen.baselines.search import search_table

    if args.real_images:
        args.threshold = training_score(args, clip)

    def callback(k: int, seed: int, number: int, result: SearchResult) -> None:
        save_all(args, result, f"k{k}/seed{seed}/{number:05d}")

    rows = search_table(
        generator,
        clip,
        args.prompts,
        args.threshold,
        num_images=args.num_images,
        seeds=args.seeds,
        batch_size=args.batch_size,
        template=args.template,
        return_images=args.save_all,
        callback=callback,
    )
    write_table(rows, args)


def training_score(args: argparse.Namespace, clip: FrozenCLIP) -> float:
    """Return the mean CLIP score of a folder of images, each with all of its captions."""
    from clipgen.baselines.search import real_score
    from clipgen.evaluation.captions import read_captions
    from clipgen.evaluation.sources import FolderImages

    source = FolderImages(args.real_images, captions=read_captions(args.real_captions), all_captions=True)
    total = 0.0
    for chunk in source.chunks:
        for images, captions in source.read(chunk):
            total += real_score(clip, images.to(clip.device), captions) * len(images)
    score = total / len(source.captions)
    print(f"threshold, from {len(source.captions)} captions of real images: {score:.4f}")
    return score


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


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line and of the files."""
    from clipgen.generation import prompts as prompt_files

    prompts = list(args.prompt)
    for file in args.prompts_file:
        prompts += prompt_files.read_prompts(file)
    if not prompts:
        raise ValueError("a prompt is needed: give --prompt or --prompts-file")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("prompt must not be empty, got ''")
    return prompts


def image_seeds(args: argparse.Namespace) -> list[int]:
    """Return the seed of each image of a prompt."""
    return [args.seed + i for i in range(args.num_images)]


def sampling_params(args: argparse.Namespace) -> SamplingParams | None:
    """Return the sampling parameters; None if none was given."""
    from clipgen.sampling import SamplingParams

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


def save_all(args: argparse.Namespace, result: SearchResult, name: str) -> None:
    """Write all images of a search, if they were kept."""
    from clipgen.images import save_png, to_pil

    if result.images is None:
        return
    folder = args.output / "all" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(to_pil(result.images)):
        save_png(image, folder / f"{number:04d}.png")


def write_table(rows: list[SearchRow], args: argparse.Namespace) -> None:
    """Print Tables 1 and 2, write them with the curves of Figure 2 to ``search.json``, and draw the figure."""
    from clipgen.files import write_json
    from clipgen.images import save_png
    from clipgen.visualization import line_chart

    print(f"{'k':>5}  best CLIP score    images needed")
    for row in rows:
        mean, std = row.best_mean_std
        print(f"{row.k:5d}  {mean:.4f} ± {std:.4f}  {format_needed(row, args)}")
    report = {
        "generator": args.generator,
        "truncation": args.truncation,
        "prompts": len(args.prompts),
        "num_images": args.num_images,
        "seeds": args.seeds,
        "threshold": args.threshold,
        "rows": [{"k": row.k, "best": row.best, "needed": row.needed, "curve": row.curve.tolist()} for row in rows],
    }
    write_json(args.output / "search.json", report)
    print(args.output / "search.json")
    curves = {f"k = {row.k}": row.curve.tolist() for row in rows}
    print(save_png(line_chart(curves, "images", "best CLIP score", args.threshold), args.output / "search.png"))


def format_needed(row: SearchRow, args: argparse.Namespace) -> str:
    """Return the number of images needed as text."""
    if args.threshold is None:
        return "-"
    if row.needed_mean_std is None:
        return f"> {args.num_images}"
    mean, std = row.needed_mean_std
    return f"{mean:.2f} ± {std:.2f}"


if __name__ == "__main__":
    main()
