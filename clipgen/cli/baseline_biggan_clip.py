"""``clipgen-baseline biggan-clip``: its options, and the command."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clipgen.cli.baseline_args import add_clip, add_prompts, image_seeds, load_search_clip
from clipgen.cli.baseline_checks import DEFAULTS
from clipgen.cli.baseline_output import ImageOutput
from clipgen.cli.console import print_line

if TYPE_CHECKING:
    from torch import Tensor

PROGRESS_INTERVAL = 10  # seconds
LAYERED = ("generate", "num_layers", "layer_noise_dim", "num_classes")  # attributes of a ``LayeredGenerator``


def add_biggan_clip(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run_biggan_clip``."""
    parser.set_defaults(run=run_biggan_clip)
    add_prompts(parser)
    parser.add_argument("--penalize", action="append", default=[], help="prompt to stay away from; may be repeated")
    models = parser.add_argument_group("models")
    models.add_argument(
        "--generator",
        required=True,
        help="biggan:FILE_OR_FOLDER, or module:object with a condition per layer, which is code: name only one that "
        "you trust",
    )
    add_clip(models, "the papers' ViT-B/32")
    group = parser.add_argument_group("optimization")
    group.add_argument("--num-images", type=int, default=1, help="images per prompt (default: %(default)s)")
    group.add_argument("--steps", type=int, default=500, help="steps of Adam (default: %(default)s)")
    group.add_argument("--learning-rate", type=float, default=0.07, help="learning rate (default: %(default)s)")
    group.add_argument("--cutouts", type=int, default=128, help="views of the image per step (default: %(default)s)")
    group.add_argument("--center-bias", action="store_true", help="place views near the center")
    group.add_argument("--max-classes", type=int, help="classes per layer (default: all)")
    group.add_argument(
        "--class-temperature", type=float, help=f"with --max-classes (default: {DEFAULTS['class_temperature']})"
    )
    group.add_argument("--ema-decay", type=float, default=0.99, help="decay of the average (default: %(default)s)")
    group.add_argument("--keep-best-every", type=int, help="keep the best image, compared after this many steps")
    group.add_argument("--preview-every", type=int, help="write preview.png after this many steps")


def run_biggan_clip(args: argparse.Namespace) -> None:
    """Optimize images for each prompt."""
    from clipgen.baselines.biggan_clip import BigGANCLIPParams, biggan_clip
    from clipgen.baselines.search import real_score

    settings = {name: getattr(args, name) for name in BigGANCLIPParams.__dataclass_fields__}
    params = BigGANCLIPParams(**settings)
    if args.preview_every is not None and args.preview_every < 1:
        raise ValueError(f"preview_every must be at least 1, got {args.preview_every}")
    generator = load_layered(args.generator, args.device)
    clip = load_search_clip(args)
    penalized = clip.encode_text(args.penalize) if args.penalize else None
    output = ImageOutput(args, {**settings, "generator": args.generator, "penalized": args.penalize})
    for prompt in args.prompts:
        images = biggan_clip(
            generator,
            clip,
            clip.encode_text([prompt]),
            penalized,
            num_images=args.num_images,
            seed=args.seed,
            params=params,
            callback=progress(args, prompt),
        )
        scores = [real_score(clip, image[None], [prompt]) for image in images]
        output.add(images, prompt, image_seeds(args), [{"prompt": prompt, "clip_score": score} for score in scores])
        print_line(f"{prompt}: CLIP score {sum(scores) / len(scores):.4f}")
    output.save_grid()


def load_layered(source: str, device: str) -> Any:
    """Load a generator that takes one condition per layer: BigGAN's file, or an object of a module."""
    from clipgen.baselines.gan_files import is_gan_file, load_gan
    from clipgen.evaluation.features import import_function

    if is_gan_file(source):
        generator = load_gan(source).to(device)
    else:
        module, colon, name = source.partition(":")
        if not colon:
            raise ValueError(f"generator must be biggan:FILE_OR_FOLDER or module:object, got {source}")
        try:
            generator = import_function(module, name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"generator {source} cannot be imported: {error}") from error
    missing = [attribute for attribute in LAYERED if not hasattr(generator, attribute)]
    if missing:
        raise ValueError(f"generator must take a condition per layer, got {source}, which has no {', '.join(missing)}")
    return generator


def progress(args: argparse.Namespace, prompt: str) -> Callable[[int, int, float, Callable[[], Tensor]], None]:
    """Return a callback that prints the loss every few seconds, and writes previews."""
    start = last = time.perf_counter()

    def callback(number: int, step: int, loss: float, image: Callable[[], Tensor]) -> None:
        from clipgen.images import save_png, to_pil

        nonlocal last
        done = number * args.steps + step + 1
        total = args.num_images * args.steps
        now = time.perf_counter()
        if now - last > PROGRESS_INTERVAL or done == total:
            last = now
            speed = done / (now - start)
            print_line(
                f"{prompt}: step {done}/{total}, loss {loss:.3f}, {speed:.2f} it/s, ETA {(total - done) / speed:.0f} s"
            )
        if args.preview_every and (step + 1) % args.preview_every == 0:
            save_png(to_pil(image())[0], args.output / "preview.png", {"prompt": prompt, "step": step + 1})

    return callback
