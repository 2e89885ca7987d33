"""``clipgen-sample --prompt "..."``: pictures of sentences."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from clipgen.cli.console import guarded
from clipgen.cli.output import output_folder


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-sample", run)


def parser() -> argparse.ArgumentParser:
    """The command line. Nothing heavy is imported before it is read."""
    p = argparse.ArgumentParser("clipgen-sample", description="Draw pictures of sentences.")
    p.add_argument("--prompt", action="append", required=True, help="a sentence; may be given several times")
    p.add_argument("--num-images", type=int, default=4, help="pictures a sentence (default: %(default)s)")
    p.add_argument("--checkpoint", help="stage-2 run folder, checkpoint or pipeline folder; default: the newest "
                   "finished run below outputs/, else the bundled shapes model")  # fmt: skip
    p.add_argument("--output", type=Path, default=Path("samples"), help="folder for the PNGs (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="picture i draws from seed + i (default: %(default)s)")
    p.add_argument(
        "--top-k", type=int, default=300, help="keep the k likeliest codes (default: %(default)s, the paper's)"
    )
    p.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest codes up to p (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (default: %(default)s)")
    p.add_argument("--guidance-scale", type=float, default=1.0, help="1 is none; needs a model trained for it")
    p.add_argument("--rerank-from", type=int, help="draw so many and keep those that CLIP finds nearest")
    p.add_argument("--device", help="cpu, cuda, mps (default: the fastest there is)")
    return p


def run() -> None:
    """Check everything that can be checked, load the model, draw, write."""
    args = parser().parse_args()
    from clipgen.images import grid, save_png
    from clipgen.pipeline import TextToImage, check_request
    from clipgen.sampling import check_sampling

    settings = dict(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, guidance_scale=args.guidance_scale
    )
    check_sampling(**settings)
    for prompt in args.prompt:
        check_request(prompt, args.num_images, args.rerank_from)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {args.seed}")
    checkpoint = args.checkpoint or newest_run(Path("outputs")) or "shapes"
    with output_folder(args.output):
        pipe = TextToImage.load(checkpoint).to(args.device or best_device())
        print(f"Model: {'the bundled shapes model' if checkpoint == 'shapes' else checkpoint}")
        pictures, captions = [], []
        for number, prompt in enumerate(args.prompt):
            for picture in pipe(prompt, args.num_images, seed=args.seed, rerank_from=args.rerank_from, **settings):
                name = f"{number:02d}_{slug(prompt)}_{picture.info['seed']}.png"
                print(save_png(picture, args.output / name, picture.info))  # type: ignore[arg-type]
                pictures.append(picture)
                captions.append(prompt)
        columns = args.num_images if len(args.prompt) > 1 else None
        print(save_png(grid(pictures, columns=columns, captions=captions), args.output / "grid.png"))


def newest_run(outputs: Path) -> str | None:
    """The stage-2 run that finished last, below a folder of runs."""
    finished = sorted(outputs.rglob("transformer/config.json"), key=lambda file: file.stat().st_mtime)
    return str(finished[-1].parent.parent) if finished else None


def best_device() -> str:
    """The fastest device of this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]


if __name__ == "__main__":
    main()
