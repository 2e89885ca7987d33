"""``clipgen-baseline search``: its options, the command, and the tables of its paper."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from clipgen.cli.baseline_args import add_clip, add_prompts, load_search_clip
from clipgen.cli.baseline_checks import DEFAULTS
from clipgen.cli.baseline_output import ImageOutput
from clipgen.cli.console import print_line
from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.storage.files import user_path

if TYPE_CHECKING:
    from clipgen import FrozenCLIP
    from clipgen.baselines.search import ScoringCLIP, SearchResult, SearchRow
    from clipgen.baselines.search_protocol import SearchProtocol

PROTOCOLS = ("csc2516",)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run_search``."""
    parser.set_defaults(run=run_search)
    add_prompts(parser)
    models = parser.add_argument_group("models")
    models.add_argument(
        "--generator",
        required=True,
        help="run folder of the class-conditional transformer, biggan:FILE_OR_FOLDER, sagan:FILE, TorchScript file, "
        "or module:function that is called with (noise, class_indices); the last two are code: name only those that "
        "you trust",
    )
    models.add_argument(
        "--truncation",
        type=float,
        help="truncation of BigGAN or SAGAN in (0, 1] (default: none; 0.4 for BigGAN-deep with --protocol csc2516)",
    )
    models.add_argument("--noise-dim", type=int, help="noise dimension, if the generator has no noise_dim attribute")
    models.add_argument(
        "--class-names",
        help="class names, if the generator has no class_names attribute: .json list, text file with one name per "
        "line, LOC_synset_mapping.txt, imagenet_class_index.json, imagenet (CLIP's wording) or imagenet-torchvision",
    )
    add_clip(models, "that of the run folder, else the papers' ViT-B/32")
    options = parser.add_argument_group("search")
    options.add_argument("--k", type=int, help=f"number of classes to sample from (default: {DEFAULTS['k']})")
    options.add_argument(
        "--template", help='text for the CLIP embedding of a class (default: "An image of {label}", as in the paper)'
    )
    options.add_argument("--num-images", type=int, default=100, help="images per prompt, b_max (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=32, help="images per batch (default: %(default)s)")
    options.add_argument("--save-all", action="store_true", help="write all generated images below OUTPUT/all")
    add_table(parser.add_argument_group("tables of the paper"))
    add_sampling_options(parser.add_argument_group("sampling of a class-conditional transformer"))


def add_table(group: argparse._ArgumentGroup) -> None:
    """Add the options of the paper's tables."""
    group.add_argument("--table", action="store_true", help="search with all k of the paper; print tables, no images")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="--table as the paper's authors ran it; other options given with it are stated as deviations",
    )
    group.add_argument("--seeds", type=int, nargs="+", help="seeds of --table (default: the paper's)")
    group.add_argument(
        "--threshold",
        type=float,
        help="CLIP score that 'images needed' counts to in --table, see --real-images (default: none; the paper's "
        "0.2841796875 with --protocol csc2516)",
    )
    group.add_argument(
        "--real-images",
        type=user_path,
        help="folder of the training images, whose mean CLIP score with all of their captions is the threshold, as in "
        "the paper",
    )
    group.add_argument("--real-captions", help="their captions, in the formats of clipgen-eval --captions")
    group.add_argument(
        "--clip-input",
        choices=("published", "normalized"),
        help="images in [-1, 1] without CLIP's normalization, as in the public code, or as CLIP expects them; with "
        f"--protocol (default: {DEFAULTS['clip_input']})",
    )
    group.add_argument(
        "--one-caption",
        action="store_true",
        help="score all images of a prompt against one caption, not against random ones of the same image; with "
        "--protocol",
    )
    group.add_argument("--save-best", action="store_true", help="write the best image of each search of --table")


def check_threshold(args: argparse.Namespace) -> None:
    """Raise ValueError if the threshold of a search is not defined by one number, or by images with captions."""
    if (args.real_images is None) != (args.real_captions is None):
        raise ValueError("real_images and real_captions must be given together")
    if args.real_images is not None and (args.threshold is not None or not (args.table or args.protocol)):
        raise ValueError("real_images must be used with --table or --protocol, and not with --threshold")


def run_search(args: argparse.Namespace) -> None:
    """Search the best image of each prompt, or compute the paper's tables over all prompts."""
    generator = load_search_generator(args)
    clip = load_search_clip(args)
    if args.protocol:
        return run_protocol(args, generator, clip)
    if args.table:
        if args.real_images:
            args.threshold = mean_caption_score(args, clip)
        return write_table(search_rows(args, generator, clip, args.prompts, None, args.threshold), args)
    search_images(args, generator, clip)


def search_images(args: argparse.Namespace, generator: Any, clip: FrozenCLIP) -> None:
    """Search the best image of each prompt, and write them."""
    from clipgen.baselines.search import encode_labels, search

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
        print_line(f"{prompt}: CLIP score {result.score:.4f}, class {name!r}")
    output.save_grid()


def load_search_generator(args: argparse.Namespace) -> Any:
    """Load the generator of ``--generator``."""
    from clipgen.baselines.generators import load_generator, read_class_names

    class_names = read_class_names(args.class_names) if args.class_names else None
    sampling = sampling_options(args)
    return load_generator(args.generator, args.noise_dim, class_names, args.device, sampling, args.truncation)


def search_rows(
    args: argparse.Namespace,
    generator: Any,
    clip: ScoringCLIP,
    prompts: list[str],
    captions: list[list[str]] | None,
    threshold: float | None,
) -> list[SearchRow]:
    """Search with every k of the paper."""
    from clipgen.baselines.search import search_table

    def callback(k: int, seed: int, number: int, result: SearchResult) -> None:
        save_all(args, result, f"k{k}/seed{seed}/{number:05d}")
        save_best(args, result, f"k{k}/seed{seed}/{number:05d}")

    return search_table(
        generator,
        clip,
        prompts,
        threshold,
        num_images=args.num_images,
        seeds=args.seeds,
        batch_size=args.batch_size,
        template=args.template,
        captions=captions,
        return_images=args.save_all,
        callback=callback,
    )


def mean_caption_score(args: argparse.Namespace, clip: Any) -> float:
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
    print_line(f"threshold, from {len(source.captions)} captions of real images: {score:.4f}")
    return score


# ------------------------------------------------------------------------------------------------------------ protocol


def run_protocol(args: argparse.Namespace, generator: Any, clip: Any) -> None:
    """Compute the tables as the paper's authors ran them."""
    from clipgen.baselines.search_protocol import PublishedCLIPInput, prepare_caption, ranking_caption

    protocol = resolve_protocol(args, generator)
    groups = []
    prompts = []
    for number, texts in enumerate(args.caption_groups):
        groups.append(list(map(prepare_caption, texts)))
        prompts.append(ranking_caption(groups[-1], number))
    scoring = PublishedCLIPInput(clip) if protocol.clip_input == "published" else clip
    if args.real_images:
        protocol.threshold = mean_caption_score(args, scoring)
    captions = None if protocol.one_caption else groups
    rows = search_rows(args, generator, scoring, prompts, captions, protocol.threshold)
    args.threshold = protocol.threshold
    args.truncation = protocol.truncation
    several = max(map(len, groups)) > 1
    write_table(rows, args, protocol.deviations(generator, several))


def resolve_protocol(args: argparse.Namespace, generator: Any) -> SearchProtocol:
    """Return the settings of the protocol, and apply truncation and class names to the generator."""
    from clipgen.baselines.search import PAPER_TEMPLATE
    from clipgen.baselines.search_protocol import SearchProtocol, keras_names, published_truncation

    if args.truncation is None:
        args.truncation = published_truncation(generator)
        generator.truncation = args.truncation
    names = keras_names()
    use_published_names = args.class_names is None and len(generator.class_names) == len(names)
    if use_published_names:
        generator.class_names = names
    protocol = SearchProtocol(
        truncation=args.truncation,
        template=args.template or PAPER_TEMPLATE,
        num_images=args.num_images,
        seeds=args.seeds,
        clip_input=args.clip_input,
        one_caption=args.one_caption,
        own_class_names=not use_published_names,
    )
    if args.threshold is not None or args.clip_input != "published":
        protocol.threshold = args.threshold
    return protocol


# -------------------------------------------------------------------------------------------------------------- output


def save_all(args: argparse.Namespace, result: SearchResult, name: str) -> None:
    """Write all images of a search, if they were kept."""
    from clipgen.images import save_png, to_pil

    if result.images is None:
        return
    folder = args.output / "all" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(to_pil(result.images)):
        save_png(image, folder / f"{number:04d}.png")


def save_best(args: argparse.Namespace, result: SearchResult, name: str) -> None:
    """Write the best image of a search, if it is wanted."""
    from clipgen.images import save_png, to_pil

    if args.save_best:
        path = args.output / "best" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(to_pil(result.image[None])[0], path)


def write_table(rows: list[SearchRow], args: argparse.Namespace, deviations: list[str] | None = None) -> None:
    """Print Tables 1 and 2, write them with the curves of Figure 2 to ``search.json``, and draw the figure.

    Args:
        rows: the rows.
        args: the arguments.
        deviations: the deviations of the run from ``--protocol``; None for a run without a protocol.
    """
    from clipgen.images import save_png
    from clipgen.storage.files import atomic_write, write_json
    from clipgen.visualization import line_chart

    print_rows(rows, args)
    report = make_report(rows, args)
    system = args.generator
    if deviations is not None:
        report |= {"protocol": args.protocol, "clip_input": args.clip_input, "deviations": deviations}
        system = f"{args.generator}, {args.protocol}; deviations: {'; '.join(deviations)}"
        print_line(f"Deviations from {args.protocol}:")
        for text in deviations:
            print_line(f"- {text}")
    write_json(args.output / "search.json", report)
    with atomic_write(args.output / "search.md") as partial:
        partial.write_text(paper_tables(rows, system, args), encoding="utf-8")
    print_line(args.output / "search.json")
    print_line(args.output / "search.md")
    curves = {f"k = {row.k}": row.curve.tolist() for row in rows}
    print_line(save_png(line_chart(curves, "images", "best CLIP score", args.threshold), args.output / "search.png"))


def print_rows(rows: list[SearchRow], args: argparse.Namespace) -> None:
    """Print the best CLIP score and the number of images needed for every k."""
    print_line(f"{'k':>5}  best CLIP score    images needed")
    for row in rows:
        mean, std = row.best_mean_std
        print_line(f"{row.k:5d}  {mean:.4f} ± {std:.4f}  {format_needed(row, args)}")


def make_report(rows: list[SearchRow], args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of ``search.json``."""
    return {
        "generator": args.generator,
        "truncation": args.truncation,
        "prompts": len(args.prompts),
        "num_images": args.num_images,
        "seeds": args.seeds,
        "threshold": args.threshold,
        "rows": [{"k": row.k, "best": row.best, "needed": row.needed, "curve": row.curve.tolist()} for row in rows],
    }


def paper_tables(rows: list[SearchRow], system: str, args: argparse.Namespace) -> str:
    """Return the rows as the paper prints them: Table 1 without FID, and Table 2."""
    system = system.replace("|", "\\|")
    columns = []
    for row in rows:
        mean, std = row.best_mean_std
        columns.append((f"k = {row.k}", f"{mean:.4f} ± {std:.4f}", format_needed(row, args)))
    heading, bests, needed = map(" | ".join, zip(*columns))
    rule = "|---" * (len(rows) + 1) + "|"
    tables = []
    for title, values in (("Best CLIP score", bests), ("Images needed", needed)):
        tables.append(f"| {title} | {heading} |\n{rule}\n| {system} | {values} |\n")
    return "\n".join(tables)


def format_needed(row: SearchRow, args: argparse.Namespace) -> str:
    """Return the number of images needed as text."""
    if args.threshold is None:
        return "-"
    if row.needed_mean_std is None:
        return f"> {args.num_images}"
    mean, std = row.needed_mean_std
    return f"{mean:.2f} ± {std:.2f}"
