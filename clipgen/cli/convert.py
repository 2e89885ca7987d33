"""``clipgen-convert``: convert published models of other projects to clipgen's folders.

clipgen-convert taming last.ckpt model.yaml --output vqgan-f16
clipgen-convert hfailab vqgan_coco.pt gpt_coco.pt --output coco
clipgen-sample --checkpoint coco --prompt "A city bus driving on the city street"
"""

from __future__ import annotations

import argparse

from clipgen.cli.console import print_line, run_command
from clipgen.storage.files import user_path

# The CLIP that the published models of HFAiLab/clip-gen were trained with.
HFAILAB_CLIP = "ViT-B-32-quickgelu:openai"


def main() -> None:
    """Run the command."""
    run_command("clipgen-convert", run)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("clipgen-convert", description=__doc__, formatter_class=raw)
    projects = parser.add_subparsers(dest="project", required=True)
    taming = projects.add_parser("taming", help="convert a tokenizer of CompVis/taming-transformers")
    taming.add_argument("vqgan", type=user_path, help="last.ckpt")
    taming.add_argument("config", type=user_path, help="model.yaml")
    hfailab = projects.add_parser("hfailab", help="convert the tokenizer of HFAiLab/clip-gen, or both of its models")
    hfailab.add_argument("vqgan", type=user_path, help="vqgan_*.pt")
    hfailab.add_argument(
        "transformer", type=user_path, nargs="?", help="gpt_*.pt; the output can then be used by clipgen-sample"
    )
    hfailab.add_argument(
        "--n-head", type=int, help="number of attention heads of the transformer (default: heads of dimension 64)"
    )
    hfailab.add_argument(
        "--clip",
        metavar="MODEL[:TAG]",
        help=f"CLIP that the transformer was trained with (default: {HFAILAB_CLIP})",
    )
    for project in (taming, hfailab):
        project.add_argument("--output", type=user_path, required=True, help="folder to write")
        project.add_argument(
            "--training", action="store_true", help="keep the discriminator and LPIPS, which only training needs"
        )
    return parser


def run() -> None:
    """Convert the files that the command line names."""
    args = make_parser().parse_args()
    if args.training and getattr(args, "transformer", None):
        raise ValueError("--training is only for a tokenizer alone: a pipeline generates images and cannot be trained")
    if getattr(args, "transformer", True) is None and (args.n_head is not None or args.clip is not None):
        raise ValueError("--n-head and --clip are settings of the transformer: also give its file, or leave them out")
    for name in ("vqgan", "config", "transformer"):
        path = getattr(args, name, None)
        if path and not path.is_file():
            raise FileNotFoundError(f"{name} must be an existing file, got {path}")
    from clipgen import VQGAN, ConditionalTransformer, FrozenCLIP, TextToImage

    if args.project == "taming":
        vqgan = VQGAN.from_taming(args.vqgan, args.config)
    else:
        vqgan = VQGAN.from_hfailab(args.vqgan)
    if args.project == "taming" or args.transformer is None:
        print_line(vqgan.save(args.output, training=args.training))
        return
    transformer = ConditionalTransformer.from_hfailab(args.transformer, args.n_head)
    clip = FrozenCLIP.from_spec(args.clip or HFAILAB_CLIP)
    print_line(TextToImage(vqgan, transformer, clip).save(args.output))


if __name__ == "__main__":
    main()
