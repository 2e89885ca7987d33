"""``clipgen-convert``: other projects' published tokenizers -> our model folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipgen.cli.console import guarded


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-convert", run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("clipgen-convert", description=__doc__)
    p.add_argument("project", choices=("taming", "hfailab"), help="taming-transformers, or HFAiLab/clip-gen")
    p.add_argument("checkpoint", type=Path, help="last.ckpt, or vqgan_*.pt")
    p.add_argument("config", type=Path, nargs="?", help="model.yaml of taming-transformers")
    p.add_argument("--output", type=Path, required=True, help="model folder to write")
    p.add_argument("--training", action="store_true", help="keep what only a training needs: discriminator and LPIPS")
    return p


def run() -> None:
    """Read, convert, write."""
    args = parser().parse_args()
    from clipgen import VQGAN

    if (args.config is None) == (args.project == "taming"):
        raise ValueError(f"{args.project} needs {'its model.yaml' if args.project == 'taming' else 'no model.yaml'}")
    taming = args.project == "taming"
    vqgan = VQGAN.from_taming(args.checkpoint, args.config) if taming else VQGAN.from_hfailab(args.checkpoint)
    print(vqgan.save(args.output, training=args.training))


if __name__ == "__main__":
    main()
