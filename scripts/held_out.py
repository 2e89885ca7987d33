"""How often a model draws what it never saw: sentences of the pairs of a shape and a colour that training left out.

    clipgen-demo --output held_out data.held_out=0.1
    python scripts/held_out.py held_out/transformer --fraction 0.1

The rest of the sentences, drawn once each, stands beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from clipgen import TextToImage
from clipgen.data.shapes import ALL_ATTRIBUTES, Attributes, held_out_attributes
from clipgen.evaluation.shapes_evaluator import ATTRIBUTES, accuracy
from clipgen.files import write_json

NAMES = ("all", *ATTRIBUTES)


def row(name: str, images: Tensor, wanted: list[Attributes]) -> dict[str, float]:
    """Judge pictures; print it as a row of the table."""
    found = accuracy(images, wanted)
    print(f"| {name} | {len(wanted)} | {' | '.join(f'{found[key]:.1%}' for key in NAMES)} |")
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="a run folder of stage 2")
    p.add_argument("--fraction", type=float, default=0.1, help="data.held_out of its training")
    p.add_argument("--draws", type=int, default=20, help="pictures of each sentence")
    p.add_argument("--top-p", type=float, default=0.8)
    p.add_argument("--guidance-scale", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="JSON to write")
    args = p.parse_args()
    pipe, hidden = TextToImage.load(args.checkpoint), held_out_attributes(args.fraction)
    parts = {"held out": hidden, "seen": [a for a in ALL_ATTRIBUTES if a not in set(hidden)]}
    settings = {"top_p": args.top_p, "guidance_scale": args.guidance_scale}
    found = {}
    print(f"| sentences | pictures | {' | '.join(NAMES)} |\n|{'---|' * 7}")
    for name, attributes in parts.items():
        wanted = [a for a in attributes for _ in range(args.draws if name == "held out" else 1)]
        images = pipe.generate(pipe.encode_text([str(a) for a in wanted]), args.seed, **settings)
        found[name] = row(name, images, wanted)
        for pair in sorted({(a.color, a.shape) for a in hidden}) * (name == "held out"):
            rows = [i for i, a in enumerate(wanted) if (a.color, a.shape) == pair]
            found[" ".join(pair)] = row(" ".join(pair), images[rows], [wanted[i] for i in rows])
    if args.output:
        write_json(args.output, {"fraction": args.fraction, **settings, **found})


if __name__ == "__main__":
    main()
