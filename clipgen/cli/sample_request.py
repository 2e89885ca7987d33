"""The request of ``clipgen-sample``: prompts, images and sampling parameters, checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipgen.cli.given_options import is_given, option_name
from clipgen.cli.model_path import check_model_path
from clipgen.cli.sampling_args import sampling_options
from clipgen.generation.sampling_options import DTYPES, SAMPLING_OPTIONS
from clipgen.sampling_params import SamplingParams, check_num_images

if TYPE_CHECKING:
    from argparse import Namespace

    from PIL import Image

    from clipgen.cli.image_metadata import ImageMetadata
    from clipgen.generation.gallery import Gallery
    from clipgen.generation.prompts import Prompt
    from clipgen.generation.sweep import Axis

# Larger images are reduced to this width and height: CLIP sees at most a few hundred pixels, and a small file can
# contain an image of gigabytes in floating-point numbers.
MAX_IMAGE_SIDE = 4096
# Options in addition to the sampling parameters that an image to be reproduced contains, with their defaults.
DEFAULT_SETTINGS: dict[str, Any] = {"num_images": 4, "seed": 0, "dtype": DTYPES[0], "keep_fraction": 0.5}
NO_PROMPT = (
    'there must be a prompt: give a text in quotes ("a red ring"), --prompt, --prompts-file, --image, --prompt-mix, '
    "--outpaint, --interpolate, --gallery or --reproduce"
)


class NamedPrompt(NamedTuple):
    """A prompt, and its name in captions and file names."""

    name: str
    prompt: Prompt


@dataclass
class SampleRequest:
    """The images to generate.

    Args:
        prompts: prompts of single images.
        interpolations: pairs of prompts between which a strip of images is generated.
        sweep: sampling parameters that differ from the model's; every prompt is generated with each of them.
        num_images: images per prompt.
        rerank_from: candidates per prompt; None disables reranking.
        seed: seed of the first image of each prompt.
        dtype: dtype of the transformer and the decoder.
        outpaint: image to complete.
        keep_fraction: fraction of the height of ``outpaint`` that is kept.
        fingerprint: fingerprint of the model that must be used; None allows any.
        heading: paragraphs above the grid.
    """

    prompts: list[NamedPrompt]
    interpolations: list[Sequence[Prompt]]
    sweep: list[dict[str, Any]]
    num_images: int
    rerank_from: int | None
    seed: int
    dtype: str
    outpaint: Image.Image | None
    keep_fraction: float
    fingerprint: str | None = None
    heading: list[str] = field(default_factory=list)

    @property
    def num_candidates(self) -> int:
        """Images that are generated per prompt."""
        return self.rerank_from or self.num_images

    @property
    def strip_length(self) -> int:
        """Images per interpolation, which has at least its two ends."""
        return max(self.num_images, 2)

    @property
    def total_images(self) -> int:
        """Images that are generated for the whole request."""
        images = len(self.prompts) * self.num_candidates + len(self.interpolations) * self.strip_length
        return images * len(self.sweep)

    def named_prompts(self) -> list[NamedPrompt]:
        """Return all prompts, with the ends of the interpolations."""
        from clipgen.generation.prompts import describe

        ends = chain.from_iterable(self.interpolations)
        return self.prompts + [NamedPrompt(describe(end), end) for end in ends]

    def named_inputs(self) -> list[NamedPrompt]:
        """Return all prompts, and the image to complete unless it is one of them."""
        inputs = self.named_prompts()
        if self.outpaint and self.outpaint not in [prompt for _, prompt in inputs]:
            inputs.append(NamedPrompt("--outpaint", self.outpaint))
        return inputs

    def check(self) -> None:
        """Raise ValueError if the request cannot be fulfilled by any model."""
        from clipgen.generation.prompts import check_request
        from clipgen.sampling import per_sample_seeds

        if not self.prompts and not self.interpolations:
            raise ValueError(NO_PROMPT)
        for _, prompt in self.named_prompts():
            check_request(prompt, self.num_images, self.rerank_from)
        per_sample_seeds(self.seed, self.num_candidates)
        for values in self.sweep:
            SamplingParams(**values)


# --------------------------------------------------------------------------------------------------------- early checks


def join_words(words: list[str]) -> list[str]:
    """Return positional arguments as prompts; several single words are one text whose quotes were forgotten."""
    only_words = not any(" " in word.strip() for word in words)
    return [" ".join(words)] if len(words) > 1 and only_words else words


def check_early(args: Namespace) -> None:
    """Find the errors that need no torch, whose import takes seconds.

    Raises:
        ValueError: the prompt is missing, a gallery does not allow it, or a sampling parameter is out of range.
        FileNotFoundError: a file or the checkpoint does not exist.
    """
    texts = (args.prompt, args.prompts_file, args.prompt_mix)
    if args.gallery:
        check_gallery(args)
    elif not any((*texts, args.image, args.outpaint, args.interpolate, args.reproduce)):
        raise ValueError(NO_PROMPT)
    for path in (*args.image, args.outpaint, args.reproduce):
        if path and not path.is_file():
            raise FileNotFoundError(f"there is no image {path}")
    for path in args.prompts_file:
        path.stat()  # raises the system's error
    check_combination(args)
    hint = ", `clipgen-sample --list` shows what there is"
    check_model_path(args.checkpoint, "ConditionalTransformer", hint)


def check_combination(args: Namespace) -> None:
    """Raise ValueError if one option contradicts another one or makes it ineffective."""
    num_images = args.num_images if is_given(args, "num_images") else DEFAULT_SETTINGS["num_images"]
    check_num_images(num_images, args.rerank_from)
    options = sampling_options(args)
    settings = [name for name in ("rerank_from", *DEFAULT_SETTINGS) if is_given(args, name)]
    if args.reproduce and (options or settings):
        names = ", ".join(map(option_name, (*options, *settings)))
        raise ValueError(f"an image is reproduced with its own settings: leave out {names}")
    if args.keep_fraction is not None and not args.outpaint:
        raise ValueError("--keep-fraction needs an image to complete: give --outpaint, or leave it out")
    others = (args.prompt, args.prompts_file, args.prompt_mix, args.image)
    if args.interpolate and args.rerank_from and not any(others):
        raise ValueError("the images of an interpolation are not reranked: leave out --rerank-from")
    swept = set()
    for text in args.sweep or []:
        name, _ = parse_axis(text)
        if name in options:
            raise ValueError(f"{name} is given twice: leave out {option_name(name)} or its --sweep")
        if name in swept:
            raise ValueError(f"{name} is swept twice: give all of its values at once, --sweep {name}=A,B")
        swept.add(name)


def check_gallery(args: Namespace) -> None:
    """Raise ValueError if the gallery is unknown, or if other prompts or settings are given with it."""
    from clipgen.generation.gallery import load_gallery

    gallery = load_gallery(args.gallery)
    texts = (args.prompt, args.prompts_file, args.prompt_mix)
    if any((*texts, args.image, args.outpaint, args.interpolate, args.reproduce, args.sweep)):
        raise ValueError(
            f"gallery {gallery.name} has its own prompts and settings: leave out other prompts and --sweep"
        )
    for name in gallery.varied:
        if is_given(args, name):
            raise ValueError(f"gallery {gallery.name} varies {name}: leave out {option_name(name)}")


# -------------------------------------------------------------------------------------------------------------- reading


def read_request(args: Namespace) -> SampleRequest:
    """Read the request from the command line and the files that it names.

    Raises:
        ValueError: the request cannot be fulfilled, or a file is damaged.
        OSError: a file cannot be read.
    """
    from clipgen.cli.image_metadata import read_metadata
    from clipgen.generation.gallery import load_gallery
    from clipgen.generation.sweep import expand_sweep

    settings = {name: getattr(args, name) for name in DEFAULT_SETTINGS if is_given(args, name)}
    request = SampleRequest(
        prompts=read_text_prompts(args),
        interpolations=list(args.interpolate),
        sweep=[sampling_options(args)],
        rerank_from=args.rerank_from,
        outpaint=read_image(args.outpaint) if args.outpaint else None,
        **(DEFAULT_SETTINGS | settings),
    )
    if args.reproduce:
        add_reproduction(request, read_metadata(args.reproduce), args)
    request.prompts += [NamedPrompt(path.stem, read_image(path)) for path in args.image]
    if request.outpaint and not request.prompts and not request.interpolations:
        request.prompts.append(NamedPrompt(args.outpaint.stem, request.outpaint))
    combinations = expand_sweep([parse_axis(text) for text in args.sweep or []])
    request.sweep = [request.sweep[0] | values for values in combinations]
    if args.gallery:
        add_gallery(request, load_gallery(args.gallery))
    request.check()
    return request


def read_text_prompts(args: Namespace) -> list[NamedPrompt]:
    """Return the texts and mixtures of texts of the command line and of prompt files."""
    from clipgen.generation.prompts import describe, parse_mixture, read_prompts

    prompts: list[Prompt] = list(args.prompt)
    for path in args.prompts_file:
        prompts.extend(read_prompts(path))
    for text in args.prompt_mix:
        prompts.append(parse_mixture(text))
    return [NamedPrompt(describe(prompt), prompt) for prompt in prompts]


def add_gallery(request: SampleRequest, gallery: Gallery) -> None:
    """Add the prompts, settings and heading of a gallery to a request."""
    options = request.sweep[0]
    request.prompts += [NamedPrompt(prompt.label, prompt.text) for prompt in gallery.prompts]
    request.sweep = [options | setting for setting in gallery.settings] or [options]
    request.heading = [gallery.title, gallery.source]
    if gallery.settings:
        # The captions below the images name the settings, not the prompt.
        request.heading.insert(1, gallery.prompts[0].text)


def read_image(path: Path) -> Image.Image:
    """Read an image file; one that is larger than any model needs is reduced."""
    from clipgen.data.decoding import UnusableImageError, decode_image

    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}")
    try:
        image = decode_image(path)
    except UnusableImageError as error:
        raise ValueError(f"{path} cannot be used as an image: {error}") from error
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    return image


def parse_axis(text: str) -> Axis:
    """Parse ``"top_k=100,300"`` as ``("top_k", [100, 300])``."""
    name, _, values = text.partition("=")
    try:
        value_type = SAMPLING_OPTIONS[name].type
        return name, [value_type(value) for value in values.split(",")]
    except (KeyError, ValueError):
        names = ", ".join(SAMPLING_OPTIONS)
        raise ValueError(f"sweep must be KEY=VALUE,VALUE with a key of {names}, got {text!r}") from None


# ---------------------------------------------------------------------------------------------------------- reproducing


def add_reproduction(request: SampleRequest, metadata: ImageMetadata, args: Namespace) -> None:
    """Add the prompt of an image to a request, and take over the settings that generated it.

    Raises:
        ValueError: a file is needed that the image does not contain.
    """
    from clipgen.generation.prompts import describe

    is_variation = metadata.kinds == ["image"] and bool(args.image)
    check_reproducible(metadata, is_variation, args)
    if metadata.ends:
        request.interpolations.append(metadata.ends)
    elif not is_variation:  # the prompt of a variation is `args.image`
        prompt = metadata.prompt_mix or metadata.prompt or ""
        request.prompts.append(NamedPrompt(describe(prompt), prompt))
    request.sweep = [asdict(metadata.params)]
    request.seed = metadata.seed
    request.dtype = metadata.dtype
    request.num_images = metadata.steps
    request.fingerprint = metadata.model
    if metadata.keep_fraction is not None:
        request.keep_fraction = metadata.keep_fraction


def check_reproducible(metadata: ImageMetadata, is_variation: bool, args: Namespace) -> None:
    """Raise ValueError if an image was generated from another image, or from an embedding, which is not given."""
    for kind in metadata.kinds:
        if kind in ("image", "embedding") and not is_variation:
            raise ValueError(f"{args.reproduce} was generated from an {kind}, which it does not contain: give --image")
    if metadata.keep_fraction is not None and not args.outpaint:
        raise ValueError(f"{args.reproduce} completes an image that it does not contain: give --outpaint")
    if metadata.keep_fraction is None and args.outpaint:
        raise ValueError(f"{args.reproduce} completes no other image: leave out --outpaint")
