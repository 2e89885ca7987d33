"""``clipgen-baseline``: the systems that the papers compare with, at work on a sentence or a class.

clipgen-baseline vqgan-clip --prompt "a large blue ring on a white background"
clipgen-baseline search --generator RUN --prompt "a small red star on a black background" --k 10
clipgen-baseline label --checkpoint RUN --label dog
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.cli.console import guarded
from clipgen.cli.device import default_device
from clipgen.cli.output_dir import file_name, output_folder
from clipgen.cli.sampling_args import add_sampling_options, sampling_options

if TYPE_CHECKING:
    from torch import Tensor

    from clipgen import VQGAN, FrozenCLIP
    from clipgen.baselines.search import Row, SearchResult

OPENAI = ("ViT-B-32-quickgelu", "openai")  # the papers' CLIP


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-baseline", run)


def parser() -> argparse.ArgumentParser:
    """The command line. Nothing heavy is imported before it is read."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("clipgen-baseline", description=__doc__, formatter_class=raw)
    systems = p.add_subparsers(dest="system", required=True)
    add_vqgan_clip(systems.add_parser("vqgan-clip", help="optimise a tokenizer's latents against CLIP"))
    add_search(
        systems.add_parser("search", help="draw from the classes nearest to the sentence, keep what CLIP finds best")
    )
    add_label(systems.add_parser("label", help="pictures of classes, by the label-conditioned transformer"))
    for system in systems.choices.values():
        system.add_argument("--output", type=Path, default=Path("baseline"), help="folder (default: %(default)s)")
        system.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
        system.add_argument("--device", help="cpu, cuda, mps (default: the fastest there is)")
    return p


def add_vqgan_clip(p: argparse.ArgumentParser) -> None:
    """The options of ``run_vqgan_clip``."""
    p.set_defaults(run=run_vqgan_clip)
    p.add_argument(
        "--checkpoint",
        default="shapes",
        help="of clipgen-sample, for its tokenizer and CLIP (default: the bundled shapes model)",
    )
    p.add_argument("--vqgan", help="another tokenizer: a run folder, checkpoint or model folder of stage 1")
    p.add_argument("--num-images", type=int, default=4, help="pictures a prompt (default: %(default)s)")
    p.add_argument("--steps", type=int, default=300, help="of Adam (default: %(default)s)")
    p.add_argument("--learning-rate", type=float, default=0.1, help="(default: %(default)s)")
    p.add_argument("--cutouts", type=int, default=32, help="augmented views a step (default: %(default)s)")
    p.add_argument("--image-size", type=int, help="pixels (default: as the tokenizer was trained)")
    p.add_argument("--batch-size", type=int, default=1, help="pictures at a time (default: %(default)s)")
    add_prompts(p)


def add_search(p: argparse.ArgumentParser) -> None:
    """The options of ``run_search``."""
    p.set_defaults(run=run_search)
    p.add_argument(
        "--generator",
        required=True,
        help="run of the label-conditioned transformer, biggan-deep-256, "
        "TorchScript file or module:function that is called with (noise, class_indices)",
    )
    p.add_argument("--noise-dim", type=int, help="of a generator that does not say it itself")
    p.add_argument("--class-names", help="of such a generator: .json list, text file with a name a line, or imagenet")
    p.add_argument("--k", type=int, default=10, help="classes to draw from (default: %(default)s)")
    p.add_argument("--template", help='how CLIP is asked about a class (default: "An image of {label}", the paper\'s)')
    p.add_argument("--num-images", type=int, default=100, help="pictures to draw, b_max (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=32, help="pictures at a time (default: %(default)s)")
    p.add_argument("--table", action="store_true", help="all k of the paper with --seeds: tables instead of pictures")
    p.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of --table (default: the paper's)")
    p.add_argument("--threshold", type=float, help="of --table: mean CLIP score of real images, to count images to")
    p.add_argument("--keep-all", action="store_true", help="write every picture drawn, below OUTPUT/all")
    add_prompts(p)
    add_sampling_options(p.add_argument_group("drawing, by our transformer"), given_only=True)


def add_label(p: argparse.ArgumentParser) -> None:
    """The options of ``run_label``."""
    p.set_defaults(run=run_label)
    p.add_argument("--checkpoint", required=True, help="its run folder")
    p.add_argument("--label", action="append", required=True, help="a class's name or number; several times")
    p.add_argument("--num-images", type=int, default=4, help="pictures a class (default: %(default)s)")
    add_sampling_options(p, given_only=True)


def add_prompts(p: argparse.ArgumentParser) -> None:
    """What is asked for in sentences, and of which CLIP."""
    p.add_argument("--prompt", action="append", default=[], help="a sentence; several times")
    p.add_argument("--prompts-file", type=Path, action="append", default=[], help="a sentence a line")
    p.add_argument("--clip", help="another CLIP: a bundled name, a folder or an open_clip model")
    p.add_argument("--clip-pretrained", help="weights of the open_clip model")


def run() -> None:
    """Check what can be checked, then let the system work."""
    args = parser().parse_args()
    if args.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {args.num_images}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {args.seed}")
    if args.system != "label":
        args.prompts = read_prompts(args)
    args.device = args.device or default_device()
    with output_folder(args.output, keep_pattern="**/*.png"):
        args.run(args)


def run_vqgan_clip(args: argparse.Namespace) -> None:
    """Every picture from random codes of its own."""
    import torch

    from clipgen.baselines.vqgan_clip import vqgan_clip

    vqgan, clip = load_pair(args)
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("steps", "learning_rate", "cutouts", "image_size", "batch_size")
    }
    sheet = Sheet(args, {"steps": args.steps, "learning_rate": args.learning_rate, "cutouts": args.cutouts})
    for prompt in args.prompts:
        target, start = clip.encode_text([prompt]), time.perf_counter()
        images = vqgan_clip(vqgan, clip, target.expand(args.num_images, -1), seed=args.seed, **options)
        seconds = (time.perf_counter() - start) / args.num_images
        with torch.no_grad():
            scores = (clip.encode_image(images) @ target[0]).tolist()
        sheet.add(images, [prompt] * len(images), seeds(args), [{"prompt": prompt, "clip_score": s} for s in scores])
        print(f"{prompt}: CLIP score {sum(scores) / len(scores):.4f}, {seconds:.1f} s an image")
    sheet.save()


def run_search(args: argparse.Namespace) -> None:
    """The best picture of each prompt, or the paper's tables over all prompts."""
    from clipgen.baselines.generators import load_generator, names_of
    from clipgen.baselines.search import encode_labels, search, search_table

    names = names_of(args.class_names) if args.class_names else None
    generator = load_generator(args.generator, args.noise_dim, names, args.device, **sampling_options(args))
    clip = load_clip_of(args)
    if args.table:
        rows = search_table(
            generator,
            clip,
            args.prompts,
            args.threshold,
            num_images=args.num_images,
            seeds=args.seeds,
            batch_size=args.batch_size,
            template=args.template,
            keep=args.keep_all,
            watch=lambda k, seed, number, found: keep_all(args, found, f"k{k}/seed{seed}/{number:05d}"),
        )
        return write_table(rows, args)
    sheet = Sheet(args, {"k": args.k, "num_images": args.num_images})
    labels = encode_labels(clip, generator.class_names, args.template)
    for number, prompt in enumerate(args.prompts):
        found = search(
            generator,
            clip,
            prompt,
            args.k,
            args.num_images,
            args.seed,
            batch_size=args.batch_size,
            labels=labels,
            keep=args.keep_all,
        )
        keep_all(args, found, f"{number:05d}")
        name = generator.class_names[found.class_index]
        info = {"prompt": prompt, "clip_score": found.score, "label": name, "curve": found.curve.tolist()}
        sheet.add(found.image[None], [prompt], [args.seed], [info])
        print(f"{prompt}: CLIP score {found.score:.4f}, of class {name!r}")
    sheet.save()


def run_label(args: argparse.Namespace) -> None:
    """Pictures of classes."""
    import torch

    from clipgen.baselines.class_conditional import ClassConditionalGenerator

    model = ClassConditionalGenerator.load(args.checkpoint, **sampling_options(args)).to(args.device)
    classes = [model.find(label) for label in args.label]
    sheet = Sheet(args, asdict(model.params))
    for index in classes:
        images = model.draw(torch.full((args.num_images,), index), args.seed)
        name = model.class_names[index]
        sheet.add(images, [name] * len(images), seeds(args), [{"label": name, "class_index": index}] * len(images))
    sheet.save()


# ------------------------------------------------------------------------------------------------------- what is asked


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All sentences."""
    from clipgen.generation.prompts import read_prompts

    prompts = [*args.prompt, *(line for file in args.prompts_file for line in read_prompts(file))]
    if not prompts:
        raise ValueError("there must be something to draw: give --prompt or --prompts-file")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("prompt must not be empty, got ''")
    return prompts


def seeds(args: argparse.Namespace) -> list[int]:
    """Picture i draws from seed + i."""
    return [args.seed + i for i in range(args.num_images)]


def load_pair(args: argparse.Namespace) -> tuple[VQGAN, FrozenCLIP]:
    """Tokenizer and CLIP of VQGAN-CLIP."""
    from clipgen import VQGAN, FrozenCLIP, TextToImage

    if args.vqgan and args.clip:
        vqgan, clip = VQGAN.load(args.vqgan), FrozenCLIP(args.clip, args.clip_pretrained)
    else:
        pipe = TextToImage.load(args.checkpoint)
        vqgan = VQGAN.load(args.vqgan) if args.vqgan else pipe.vqgan
        clip = FrozenCLIP(args.clip, args.clip_pretrained) if args.clip else pipe.clip
    return vqgan.to(args.device), clip.to(args.device)


def load_clip_of(args: argparse.Namespace) -> FrozenCLIP:
    """The CLIP that was named; else the one that a run of ours was made with; else the papers'."""
    from clipgen import FrozenCLIP
    from clipgen.run_folder import load_clip, run_folder

    if args.clip:
        return FrozenCLIP(args.clip, args.clip_pretrained).to(args.device)
    path = Path(args.generator).expanduser()
    ours = path.is_dir() or path.suffix == ".ckpt"
    return (load_clip(run_folder(path)) if ours else FrozenCLIP(*OPENAI)).to(args.device)


# ----------------------------------------------------------------------------------------------------- what is written


class Sheet:
    """The pictures of a call: each as a PNG that says what made it, and all in ``grid.png``."""

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any]):
        import clipgen

        self.output, self.number = args.output, 0
        self.columns = args.num_images if args.system != "search" else None
        self.common = {"baseline": args.system, **settings, "clipgen": clipgen.__version__}
        self.pictures: list[Any] = []
        self.captions: list[str] = []

    def add(self, images: Tensor, captions: list[str], seeds: list[int], infos: list[dict[str, Any]]) -> None:
        """Write the pictures of one prompt or class."""
        from clipgen.images import save_png, to_pil

        for picture, caption, seed, info in zip(to_pil(images), captions, seeds, infos):
            name = file_name(f"{self.number:02d}", caption, str(seed))
            print(save_png(picture, self.output / name, {"seed": seed, **info, **self.common}))
            self.pictures.append(picture)
            shown = f" ({info['clip_score']:.3f})" if "clip_score" in info else ""
            self.captions.append(caption + shown)
        self.number += 1

    def save(self) -> None:
        """Write the sheet of all."""
        from clipgen.images import grid, save_png

        columns = self.columns if self.number > 1 else None
        print(save_png(grid(self.pictures, columns, self.captions), self.output / "grid.png"))


def keep_all(args: argparse.Namespace, found: SearchResult, name: str) -> None:
    """Write every picture of a search, where they were kept."""
    from clipgen.images import save_png, to_pil

    if found.images is None:
        return
    folder = args.output / "all" / name
    folder.mkdir(parents=True, exist_ok=True)
    for b, picture in enumerate(to_pil(found.images)):
        save_png(picture, folder / f"{b:04d}.png")


def write_table(rows: list[Row], args: argparse.Namespace) -> None:
    """Print Tables 1 and 2 and write them, with the curves of Figure 2, to ``search.json``."""
    from clipgen.files import write_json

    print(f"{'k':>5}  best CLIP score    images needed")
    for row in rows:
        needed = row.needed_mean_std
        more = "-" if args.threshold is None else f"> {args.num_images}"
        count = f"{needed[0]:.2f} ± {needed[1]:.2f}" if needed else more
        mean, deviation = row.best_mean_std
        print(f"{row.k:5d}  {mean:.4f} ± {deviation:.4f}  {count}")
    report = {
        "generator": args.generator,
        "prompts": len(args.prompts),
        "num_images": args.num_images,
        "seeds": args.seeds,
        "threshold": args.threshold,
        "rows": [{"k": r.k, "best": r.best, "needed": r.needed, "curve": r.curve.tolist()} for r in rows],
    }
    write_json(args.output / "search.json", report)
    print(args.output / "search.json")


if __name__ == "__main__":
    main()
