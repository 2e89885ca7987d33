"""Measure speed and memory, as ratios within one run.

    python -m clipgen benchmark vqgan --size cifar
    python -m clipgen benchmark vqgan --size paper --device cuda --batch 16 --variants plain bf16 compile bf16+compile
    python -m clipgen benchmark transformer --size cifar --clip ViT-B-32-quickgelu --variants plain
    python -m clipgen benchmark transformer --size cifar --isa avx2 --variants plain muon
    python -m clipgen benchmark transformer --size medium --device cuda --batch 32 --variants bf16 bf16+compile
    python -m clipgen benchmark encode
    python -m clipgen benchmark sample --batches 1 8 --num-tokens 64 256 1024 --plot growth.png
    python -m clipgen benchmark sample --device cuda --bf16 --compile --decode --n-layer 24 --n-head 16 --n-embd 1024 \\
        --codebook-size 16384 --batches 1 64 256 1024
    python -m clipgen benchmark rerank
    python -m clipgen benchmark app
    python -m clipgen benchmark scale
    python -m clipgen benchmark muon --size medium
    python -m clipgen benchmark muon --curves --steps 800

``--isa avx2`` imitates a processor without AVX-512 on one that has it. A variant ``a+b`` combines two others. Each
variant runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse

from benchmarks.encoding import run_encode
from benchmarks.models import TRANSFORMER_SIZES, VARIANTS, VQGAN_SIZES
from benchmarks.muon import run_muon
from benchmarks.sampling import run_rerank, run_sample
from benchmarks.scale import run_scale
from benchmarks.timing import IMITATE, describe_machine, imitate_processor
from benchmarks.training import run_transformer, run_vqgan
from benchmarks.web_page import run_app

from clipgen.storage.files import user_path, write_json

RUNS = {
    "vqgan": run_vqgan,
    "transformer": run_transformer,
    "encode": run_encode,
    "sample": run_sample,
    "rerank": run_rerank,
    "app": run_app,
    "scale": run_scale,
    "muon": run_muon,
}
DEFAULT_VARIANTS = {
    "vqgan": ["plain", "channels_last", "checkpointing", "compile"],
    "transformer": [
        "plain",
        "muon",
        "compile",
        "checkpointing",
        "ema",
        "clip_loss",
        "clip_loss+every_4",
        "clip_loss+quarter",
    ],
}


def add_training_options(parser: argparse.ArgumentParser, part: str) -> None:
    parser.add_argument("--batch", type=int, help="batch size")
    known = ", ".join(VARIANTS[part])
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS[part], help=f"{known}, joined by +")


def add_vqgan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=VQGAN_SIZES, default="cifar")
    parser.add_argument("--perceptual", action="store_true", help="with LPIPS (random weights)")
    add_training_options(parser, "vqgan")
    add_common_options(parser, steps=10)


def add_transformer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=TRANSFORMER_SIZES, default="cifar")
    add_clip_option(parser, "shapes")
    add_training_options(parser, "transformer")
    add_common_options(parser, steps=20)


def add_encode_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=8, help="batch size")
    parser.add_argument("--augmentations", type=int, default=10, help="views of each ImageNet image")
    add_clip_option(parser, "ViT-B-32-quickgelu")
    add_common_options(parser, steps=3)


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    for name, default in (("n-layer", 8), ("n-head", 8), ("n-embd", 512), ("codebook-size", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--plot", type=user_path, help="PNG file of seconds per image against the number of tokens")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step with torch.compile")
    parser.add_argument("--decode", action="store_true", help="also decode images by a tokenizer of the paper's size")
    add_common_options(parser, steps=3)


def add_rerank_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="shapes")
    parser.add_argument("--prompt", default="a large blue ring on a white background")
    parser.add_argument("--batches", type=int, nargs="+", default=[64], help="numbers of candidates")
    add_common_options(parser, steps=3)


def add_app_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, steps=5)


def add_scale_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, nargs="+", default=[10**8, 10**9], help="numbers of images")
    parser.add_argument("--ranks", type=int, default=512, help="number of processes, with 8 workers each")
    parser.add_argument("--scratch", type=user_path, help="folder for the sparse files of a token cache")
    add_common_options(parser, steps=1)


def add_muon_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=TRANSFORMER_SIZES, default="cifar")
    parser.add_argument(
        "--curves", action="store_true", help="train the demo's stage 2 with iterations in float32 and in bfloat16"
    )
    add_common_options(parser, steps=5)


def add_clip_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--clip", default=default, help="shapes, or an architecture of open_clip (default: %(default)s)"
    )


def add_common_options(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument("--steps", type=int, default=steps, help="measured steps, after the warm-up")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=user_path, help="JSON file to write")
    parser.add_argument("--isa", choices=IMITATE, help="instruction set to imitate on a newer x86 processor")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    add_vqgan_options(parts.add_parser("vqgan", help="stage 1: training, encoding, decoding"))
    add_transformer_options(parts.add_parser("transformer", help="stage 2: training from images and from a cache"))
    add_encode_options(parts.add_parser("encode", help="clipgen-encode at the paper's size"))
    add_sample_options(parts.add_parser("sample", help="the decoding loop"))
    add_muon_options(parts.add_parser("muon", help="a step of Muon compared with AdamW; loss curves of both dtypes"))
    add_rerank_options(parts.add_parser("rerank", help="reranking by CLIP score compared with generating"))
    add_app_options(parts.add_parser("app", help="the web page: start, and seconds to the first row"))
    add_scale_options(parts.add_parser("scale", help="memory and start-up with many images, simulated"))
    return parser


def check_variants(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error unless every variant is known to the part that is measured."""
    for variant in getattr(args, "variants", []):
        for name in variant.split("+"):
            if name not in VARIANTS[args.part]:
                parser.error(f"variants must be among {', '.join(VARIANTS[args.part])}, got {name}")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    check_variants(parser, args)
    imitate_processor(args.isa)
    results = {"part": args.part, "machine": describe_machine(args.device), **RUNS[args.part](args)}
    print(f"\n{results['machine']}")
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
