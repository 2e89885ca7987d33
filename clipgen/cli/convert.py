"""``clipgen-convert``: other projects' published models -> our folders.

clipgen-convert taming last.ckpt model.yaml --output vqgan-f16
clipgen-convert hfailab vqgan_coco.pt gpt_coco.pt --output coco
clipgen-sample --checkpoint coco --prompt "A city bus driving on the city street"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipgen.cli.console import guarded


def main() -> None:
    """Entry point of the command."""
    guarded("clipgen-convert", run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("clipgen-convert", description=__doc__, formatter_class=raw)
    projects = p.add_subparsers(dest="project", required=True)
    taming = projects.add_parser("taming", help="a tokenizer of CompVis/taming-transformers")
    taming.add_argument("vqgan", type=Path, help="last.ckpt")
    taming.add_argument("config", type=Path, help="model.yaml")
    hfailab = projects.add_parser("hfailab", help="HFAiLab/clip-gen's tokenizer, or both of its models")
    hfailab.add_argument("vqgan", type=Path, help="vqgan_*.pt")
    hfailab.add_argument("transformer", type=Path, nargs="?", help="gpt_*.pt: makes a folder that clipgen-sample takes")
    hfailab.add_argument("--n-head", type=int, help="of the transformer (default: heads of 64)")
    hfailab.add_argument("--clip", default="ViT-B-32-quickgelu", help="its CLIP (default: %(default)s, OpenAI's)")
    hfailab.add_argument("--clip-pretrained", default="openai", help="weights of the CLIP (default: %(default)s)")
    for project in (taming, hfailab):
        project.add_argument("--output", type=Path, required=True, help="folder to write")
        project.add_argument(
            "--training", action="store_true", help="keep what only a training needs: discriminator and LPIPS"
        )
    return p


def run() -> None:
    """Read, convert, write."""
    args = parser().parse_args()
    if args.training and getattr(args, "transformer", None):
        raise ValueError("--training is for a tokenizer alone: a pipeline draws, and keeps nothing for training")
    from clipgen import VQGAN, ConditionalTransformer, FrozenCLIP, TextToImage

    if args.project == "taming":
        vqgan = VQGAN.from_taming(args.vqgan, args.config)
    else:
        vqgan = VQGAN.from_hfailab(args.vqgan)
    if args.project == "taming" or args.transformer is None:
        print(vqgan.save(args.output, training=args.training))
        return
    transformer = ConditionalTransformer.from_hfailab(args.transformer, args.n_head)
    clip = FrozenCLIP(args.clip, args.clip_pretrained or None)
    print(TextToImage(vqgan, transformer, clip).save(args.output))


if __name__ == "__main__":
    main()
