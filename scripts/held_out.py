"""Measure how often a model generates combinations of shape and color that were left out of its training.

    clipgen-demo --output held_out data.held_out=0.1
    python -m clipgen held_out held_out/transformer --fraction 0.1

The table also has the other prompts, each sampled once.
"""

from __future__ import annotations

import argparse

from torch import Tensor

from clipgen import TextToImage
from clipgen.data.shapes import ALL_ATTRIBUTES, Attributes, held_out_attributes
from clipgen.evaluation.shapes_evaluator import ATTRIBUTES, accuracy
from clipgen.storage.files import user_path, write_json

COLUMNS = ("all", *ATTRIBUTES)


def print_row(name: str, images: Tensor, expected: list[Attributes]) -> dict[str, float]:
    """Evaluate images, print them as a row of the table, and return the accuracies."""
    results = accuracy(images, expected)
    print(f"| {name} | {len(expected)} | {' | '.join(f'{results[column]:.1%}' for column in COLUMNS)} |")
    return results


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder of stage 2")
    parser.add_argument(
        "--fraction", type=float, default=0.1, help="data.held_out of the training (default: %(default)s)"
    )
    parser.add_argument("--num-images", type=int, default=20, help="images per held-out prompt (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.8, help="see clipgen-sample (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="see clipgen-sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed; image i uses seed + i (default: %(default)s)")
    parser.add_argument("--output", type=user_path, help="JSON file to write")
    return parser


def main() -> None:
    """Evaluate held-out prompts, each of their pairs, and the other prompts."""
    args = make_parser().parse_args()
    pipe = TextToImage.load(args.checkpoint)
    held_out = held_out_attributes(args.fraction)
    seen = [attributes for attributes in ALL_ATTRIBUTES if attributes not in set(held_out)]
    sampling = {"top_p": args.top_p, "guidance_scale": args.guidance_scale}

    def generate(expected: list[Attributes]) -> Tensor:
        return pipe.generate(pipe.encode_text([str(attributes) for attributes in expected]), args.seed, **sampling)

    print(f"| prompts | images | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    repeated = []
    indices_by_pair: dict[str, list[int]] = {}
    for attributes in held_out:
        first = len(repeated)
        repeated += [attributes] * args.num_images
        pair = f"{attributes.color} {attributes.shape}"
        indices_by_pair.setdefault(pair, []).extend(range(first, len(repeated)))
    images = generate(repeated)
    results = {"held out": print_row("held out", images, repeated)}
    for pair, indices in sorted(indices_by_pair.items()):
        results[pair] = print_row(pair, images[indices], [repeated[i] for i in indices])
    results["seen"] = print_row("seen", generate(seen), seen)
    if args.output:
        write_json(args.output, {"fraction": args.fraction, **sampling, **results})


if __name__ == "__main__":
    main()
